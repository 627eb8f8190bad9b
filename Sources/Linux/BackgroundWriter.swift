// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

/// Writes to a descriptor with a thread of its own, for callers that may not wait: a regular file's disk may be slow,
/// and a pipe or terminal that another process shares need not be non-blocking, or not stay so.
///
/// The buffer is bounded; a caller that offers more is refused, and notified when there is room. What a descriptor does
/// not accept for a reason other than lack of room (no reader, a full disk) is dropped.
public final class BackgroundWriter: Sendable {
    private let shared: Shared
    private let thread: Guarded<Thread?>

    /// - Parameters:
    ///   - name: the thread's.
    ///   - capacity: bytes that may wait.
    ///   - rotation: bounds the file; nil: nothing does.
    ///   - onRoom: called by the thread when bytes were written after some had been refused, or after
    ///     ``noticeNextWrite()``.
    ///   - onLoss: called by the thread when it has dropped so many bytes, for this reason.
    public init(
        _ descriptor: consuming FileDescriptor, name: String, capacity: Int = 64 << 10, rotation: FileRotation? = nil,
        onRoom: @escaping @Sendable () -> Void = {},
        onLoss: @escaping @Sendable (SystemCallError, Int) -> Void = { _, _ in }
    ) throws(SystemCallError) {
        _ = clinux_install_interrupting_signal(clinux_sigrtmin())
        let shared = Shared(descriptor, capacity: capacity, rotation: rotation, onRoom: onRoom, onLoss: onLoss)
        self.shared = shared
        thread = Guarded(try Thread.start(name: name) { shared.run() })
    }

    /// Takes as many bytes from the front as there is room for, and returns how many. It does not wait.
    public func take(_ bytes: Span<UInt8>) -> Int { shared.take(bytes) }

    /// Bytes that were taken and are not written yet.
    public var pending: Int { shared.pending }

    /// Has `onRoom` called after the next write.
    public func noticeNextWrite() { shared.noticeNextWrite() }

    deinit {
        guard let thread = thread.withLock({ $0.take() }) else { return }
        // The signal may come just before the thread enters the call that it is to interrupt: once more, until it has
        // ended. A call that no signal interrupts, as on a file system whose server is gone, keeps its thread; the
        // process's end does not wait for it.
        for _ in 0..<100 {
            thread.send(signal: clinux_sigrtmin())
            if shared.close(waitingFor: 10) { return thread.join() }
        }
        thread.detach()
    }

    /// What the thread keeps alive.
    private final class Shared: @unchecked Sendable {
        private let descriptor: FileDescriptor
        /// The thread's.
        private let rotation: FileRotation?
        private let onLoss: @Sendable (SystemCallError, Int) -> Void
        private let onRoom: @Sendable () -> Void
        // All below is touched within the monitor only: hence `Sendable`.
        private let monitor = Monitor()
        private let capacity: Int
        /// Grows to the capacity as it is filled for the first time, so that memory that is never needed is not
        /// touched.
        private var ring: [UInt8] = []
        private var start = 0
        private var count = 0
        private var wantsNotice = false
        private var isClosing = false
        private var hasEnded = false

        init(
            _ descriptor: consuming FileDescriptor, capacity: Int, rotation: FileRotation?,
            onRoom: @escaping @Sendable () -> Void, onLoss: @escaping @Sendable (SystemCallError, Int) -> Void
        ) {
            self.descriptor = descriptor
            self.rotation = rotation
            self.onLoss = onLoss
            self.onRoom = onRoom
            self.capacity = max(1, capacity)
            ring.reserveCapacity(self.capacity)
        }

        func take(_ bytes: Span<UInt8>) -> Int {
            monitor.locked {
                let taken = min(bytes.count, capacity - count)
                for index in 0..<taken {
                    let place = (start + count + index) % capacity
                    if place == ring.count { ring.append(bytes[index]) } else { ring[place] = bytes[index] }
                }
                if taken > 0, count == 0 { monitor.broadcast() }
                count += taken
                if taken < bytes.count { wantsNotice = true }
                return taken
            }
        }

        var pending: Int { monitor.locked { count } }

        func noticeNextWrite() { monitor.locked { wantsNotice = true } }

        /// - Returns: whether the thread has ended within so many milliseconds.
        func close(waitingFor milliseconds: Int) -> Bool {
            monitor.locked {
                isClosing = true
                monitor.broadcast()
                if !hasEnded { monitor.wait(milliseconds: milliseconds) }
                return hasEnded
            }
        }

        // MARK: The thread

        func run() {
            SignalSet([clinux_sigrtmin()]).unblock()
            while let piece = nextPiece() { remove(write(piece)) }
            monitor.locked {
                hasEnded = true
                monitor.broadcast()
            }
        }

        /// A copy of what is to be written next, which stays in the ring until it is; nil when the thread is to end. A
        /// slice of the ring would have the next byte that is taken copy all of the ring.
        private func nextPiece() -> ArraySlice<UInt8>? {
            monitor.locked {
                while count == 0, !isClosing { monitor.wait() }
                return isClosing ? nil : Array(ring[start..<min(start + count, capacity, start + 4096)])[...]
            }
        }

        /// - Returns: how many bytes are done with.
        private func write(_ piece: ArraySlice<UInt8>) -> Int {
            do throws(SystemCallError) {
                if let rotation { return try rotation.write(piece, to: descriptor) }
                return try descriptor.writeOnce(piece)
            } catch {
                switch error.errno {
                case EINTR: return 0
                case EAGAIN:
                    var entry = pollfd(fd: descriptor.rawValue, events: Int16(POLLOUT), revents: 0)
                    // One entry; a signal ends it too.
                    _ = unsafe poll(&entry, 1, -1)
                    return 0
                default:
                    onLoss(error, piece.count)
                    return piece.count
                }
            }
        }

        /// Removes from the ring what is done with.
        private func remove(_ written: Int) {
            let isNoticed = monitor.locked {
                count -= written
                // An empty ring is filled from its beginning: in the memory that was used before.
                start = count == 0 ? 0 : (start + written) % capacity
                defer { if written > 0 { wantsNotice = false } }
                return written > 0 && wantsNotice
            }
            if isNoticed { onRoom() }
        }
    }
}
