internal import CLinux
internal import Glibc
internal import Linux

/// A remote disk for tools: calls that wait, of any number of threads. One of those that wait looks after the connection for all.
extension NBDDisk {
    /// Reads a range, whose end may be beyond the disk's: there it is zero.
    func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(DiskImageError) {
        guard let start = buffer.baseAddress else { return }
        var done = 0
        while done < buffer.count {
            // What is left of the caller's buffer.
            var vector = unsafe iovec(iov_base: start + done, iov_len: buffer.count - done)
            let moved = try unsafe withUnsafePointer(to: &vector) { (vector) throws(DiskImageError) in
                try perform("read") { unsafe begin(.read, vector, count: 1, at: offset + UInt64(done), token: 0, isAwaited: true) }
            }
            guard moved > 0 else {
                unsafe (start + done).initializeMemory(as: UInt8.self, repeating: 0, count: buffer.count - done)
                return
            }
            done += moved
        }
    }

    /// Whether there is data at a place, and up to where it is the same; what the server does not tell is data.
    func extent(at place: UInt64) throws(DiskImageError) -> (isData: Bool, end: UInt64) {
        guard place < export.size else { return (false, .max) }
        guard export.hasStatus else { return (true, .max) }
        if let piece = monitor.locked({ known.piece(at: place) }) { return (!piece.readsAsZeroes, piece.end) }
        let extents = UnsafeMutablePointer<NBDExtents>.allocate(capacity: 1)
        // Until the command has ended, which `perform` waits for.
        defer { unsafe extents.deallocate() }
        unsafe extents.initialize(to: NBDExtents())
        let first = place & ~(export.minimumBlock - 1)
        let length = min(export.size - first, Self.statusLength)
        unsafe extents.pointee.offset = first
        do throws(DiskImageError) {
            _ = try perform("block status") { unsafe begin(.status, at: first, length: length, token: 0, isAwaited: true, extents: extents) }
        } catch {
            if case .remote = error { throw error }
            return (true, place + 1 << 20)
        }
        return monitor.locked {
            unsafe known = extents.pointee
            guard let piece = known.piece(at: place) else { return (true, first + length) }
            return (!piece.readsAsZeroes, piece.end)
        }
    }

    /// Bytes that are asked about at once.
    private static let statusLength: UInt64 = 1 << 30

    /// Asks for something and waits for its end.
    /// - Returns: bytes moved.
    private func perform(_ what: String, _ begin: () -> Int32?) throws(DiskImageError) -> Int {
        var index: Int32?
        while true {
            let step: Step = monitor.locked {
                if index == nil {
                    index = begin()
                    guard index != nil else {
                        // Others have all commands: one of them ends.
                        monitor.wait(milliseconds: 1000)
                        return .again
                    }
                    goOn()
                }
                if let index, unsafe self[index].pointee.state == .ended {
                    let command = unsafe self[index].pointee
                    release(index)
                    monitor.broadcast()
                    return .over(command.error, Int(command.length), failure)
                }
                if isLooking {
                    monitor.wait()
                    return .again
                }
                isLooking = true
                return .look
            }
            switch step {
            case .again:
                break
            case .over(0, let moved, _):
                return moved
            case .over(let error, _, let failure):
                if let failure { throw .remote(path: path, reason: failure) }
                throw .request(path: path, SystemCallError(what, errno: error))
            case .look:
                let events = look(timeout: -1)
                monitor.locked {
                    isLooking = false
                    handle(events)
                    monitor.broadcast()
                }
            }
        }
    }

    private enum Step {
        case again, look
        /// An errno value, bytes, and what has become of the connection.
        case over(Int32, Int, String?)
    }
}
