// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// A remote disk for tools: calls that wait, of any number of threads. One of the waiting threads serves the connection
/// for all.
extension NBDDisk {
    /// Reads a range, whose end may be beyond the disk's: there it is zero.
    func read(_ buffer: IOMemory, at offset: UInt64) throws(DiskImageError) {
        buffer.from(try transfer(.read, buffer, at: offset)).clear()
    }

    /// Reads a range of whole blocks as the first thing that a server is asked for. It has as long for that as for its
    /// greeting: who opens a disk is not to wait for one that is silent.
    /// - Parameter count: bytes, 1 MiB at most.
    func readFirst(_ count: Int, at offset: UInt64) throws(DiskImageError) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        defer { monitor.locked { endBy = nil } }
        var lists = try segmentLists(1)
        try bytes.withIOMemory { (memory) throws(DiskImageError) in
            // Both are there until it has ended.
            let segments = lists.list(0, memory)
            try perform("read") {
                let command = begin(.read, segments, at: offset, token: 0, isAwaited: true)
                drain(within: Self.connectTime)
                return command
            }
        }
        return bytes
    }

    /// Writes a range, which is inside the disk.
    func write(_ bytes: IOMemory, at offset: UInt64) throws(DiskImageError) {
        _ = try transfer(.write, bytes, at: offset)
    }

    /// Writes zeroes to a range inside the disk in the cheapest way. Its space may be freed.
    func clear(_ offset: UInt64, _ length: UInt64) throws(DiskImageError) {
        let mask = export.minimumBlock - 1, end = offset + length
        // The server's whole blocks, and what is left at both ends.
        let first = min((offset + mask) & ~mask, end), last = end == export.size ? end : max(end & ~mask, first)
        try writeZeroes(offset..<first)
        try clearBlocks(first..<last)
        try writeZeroes(last..<end)
    }

    /// Makes durable what has been written, as far as the server can.
    func flush() throws(DiskImageError) {
        try perform("flush") { begin(.flush, at: 0, length: 0, token: 0, isAwaited: true) }
    }

    private func clearBlocks(_ range: Range<UInt64>) throws(DiskImageError) {
        guard !range.isEmpty else { return }
        do throws(DiskImageError) {
            return try perform("write zeroes") {
                begin(
                    .zero, at: range.lowerBound, length: range.upperBound - range.lowerBound, token: 0, isAwaited: true)
            }
        } catch {
            // A server may also find out that it cannot when it is asked.
            guard case .request(_, let error) = error, error.errno == EOPNOTSUPP else { throw error }
        }
        // All that is not zero already: of a new disk, nothing.
        var place = range.lowerBound
        while place < range.upperBound {
            let piece = export.hasStatus ? try status(at: place)?.piece(at: place) : nil
            let end = min(piece?.end ?? range.upperBound, range.upperBound)
            if piece?.readsAsZeroes != true { try writeZeroes(place..<end) }
            place = end
        }
    }

    private func writeZeroes(_ range: Range<UInt64>) throws(DiskImageError) {
        guard !range.isEmpty else { return }
        let zeroes = [UInt8](repeating: 0, count: Int(min(range.upperBound - range.lowerBound, 1 << 20)))
        var place = range.lowerBound
        while place < range.upperBound {
            let count = Int(min(UInt64(zeroes.count), range.upperBound - place))
            try zeroes.withReadableIOMemory { (bytes) throws(DiskImageError) in
                try write(bytes.prefix(count), at: place)
            }
            place += UInt64(count)
        }
    }

    // MARK: - How it is stored

    /// Indicates whether there is data at a place, and up to where it is the same; what the server does not report
    /// counts as data. Replies are remembered, so this is for disks that are not written.
    func extent(at place: UInt64) throws(DiskImageError) -> (isData: Bool, end: UInt64) {
        guard place < export.size else { return (false, .max) }
        guard export.hasStatus else { return (true, .max) }
        if let piece = monitor.locked({ known.piece(at: place) }) { return (!piece.readsAsZeroes, piece.end) }
        guard let extents = try status(at: place) else { return (true, place + 1 << 20) }
        monitor.locked { known = extents }
        guard let piece = extents.piece(at: place) else { return (true, extents.offset + Self.statusLength) }
        return (!piece.readsAsZeroes, piece.end)
    }

    /// Asks how the disk is stored from a place on.
    /// - Returns: nil where the server has no answer.
    private func status(at place: UInt64) throws(DiskImageError) -> NBDExtents? {
        let extents = NBDExtents()
        let first = place & ~(export.minimumBlock - 1)
        let length = min(export.size - first, Self.statusLength)
        extents.offset = first
        do throws(DiskImageError) {
            try perform("block status") {
                begin(.status, at: first, length: length, token: 0, isAwaited: true, extents: extents)
            }
        } catch {
            if case .remote = error { throw error }
            return nil
        }
        return extents
    }

    /// Bytes of a single query.
    private static let statusLength: UInt64 = 1 << 30

    // MARK: - Commands

    /// Moves a range, in pieces of which several are under way.
    /// - Returns: bytes moved: fewer than there are only at the end of the disk.
    private func transfer(_ request: NBDRequest, _ memory: IOMemory, at offset: UInt64) throws(DiskImageError) -> Int {
        let what = request == .read ? "read" : "write", window = 4, count = memory.count
        // One for each command under way, which looks at it until it ends.
        var lists = try segmentLists(window)
        var running: [Int32] = []
        var begun = 0, asked = 0, moved = 0, isAtEnd = false
        var failure: DiskImageError?
        while true {
            while failure == nil, !isAtEnd, asked < count, running.count < window {
                // The oldest end first, so its list is free.
                let segments = lists.list(begun % window, memory.from(asked))
                guard
                    let (index, length) = ask(
                        waits: running.isEmpty,
                        {
                            begin(request, segments, at: offset + UInt64(asked), token: 0, isAwaited: true)
                        })
                else { break }
                running.append(index)
                begun += 1
                asked += length
                isAtEnd = length == 0
            }
            guard !running.isEmpty else { break }
            // All of them, also after a failure: the memory is in use until then.
            do throws(DiskImageError) { moved += try awaitEnd(running.removeFirst(), what) } catch {
                failure = failure ?? error
            }
        }
        if let failure { throw failure }
        return moved
    }

    private func segmentLists(_ count: Int) throws(DiskImageError) -> IOSegmentLists {
        return try IOSegmentLists(count: count, capacity: 1, path)
    }

    /// Asks for something and waits for its end.
    private func perform(_ what: String, _ begin: () -> Int32?) throws(DiskImageError) {
        if let (index, _) = ask(waits: true, begin) { _ = try awaitEnd(index, what) }
    }

    /// Asks for something that is waited for by ``awaitEnd(_:_:)``.
    /// - Parameter waits: whether to wait while others have all commands; not with one of one's own, for which others
    ///   may wait.
    /// - Returns: the command and the bytes that it moves; nil when there was none.
    private func ask(waits: Bool, _ begin: () -> Int32?) -> (index: Int32, length: Int)? {
        monitor.locked {
            while true {
                if let index = begin() {
                    // A command's length stays.
                    let length = Int(commands[index].length)
                    goOn()
                    return (index, length)
                }
                guard waits else { return nil }
                // One of them ends.
                monitor.wait(milliseconds: 1000)
            }
        }
    }

    /// Waits for the end of a command.
    /// - Returns: bytes moved.
    private func awaitEnd(_ index: Int32, _ what: String) throws(DiskImageError) -> Int {
        while true {
            let step: Step = monitor.locked {
                if commands[index].state == .ended {
                    let command = commands[index]
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
                    if isInterrupted?() == true { isCancelled = true }
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
