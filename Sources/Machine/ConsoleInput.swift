// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Linux

/// A stream of input for a serial port, read without waiting.
final class ConsoleInput: Sendable {
    enum Result {
        case bytes([UInt8])
        /// No input now; the descriptor becomes readable when there is some.
        case empty
        case end
    }

    let descriptor: FileDescriptor
    /// Indicates whether it has to be waited for; a regular file has not, and cannot.
    let isWaitable: Bool

    init(_ descriptor: consuming FileDescriptor) {
        isWaitable = (FileDescriptor.kind(of: descriptor.rawValue) ?? 0) != S_IFREG
        self.descriptor = descriptor
    }

    /// Indicates whether the other side of a socket has closed both directions, or is gone. What it has sent may still
    /// be unread.
    var isGone: Bool {
        var entry = pollfd(fd: descriptor.rawValue, events: 0, revents: 0)
        return unsafe poll(&entry, 1, 0) > 0 && entry.revents & Int16(POLLHUP | POLLERR) != 0
    }

    /// At most 256 bytes.
    func read() -> Result {
        // The descriptor may be one that waits: a socket, or a terminal that is shared with the shell.
        var entry = pollfd(fd: descriptor.rawValue, events: Int16(POLLIN), revents: 0)
        guard unsafe poll(&entry, 1, 0) > 0 else { return .empty }
        var failure: Int32 = 0
        let bytes = unsafe [UInt8](unsafeUninitializedCapacity: 256) { buffer, count in
            // The call writes at most the buffer's size, and returns how much that was.
            do throws(SystemCallError) {
                count = unsafe try descriptor.read(into: UnsafeMutableRawBufferPointer(buffer))
            } catch {
                failure = error.errno
                count = 0
            }
        }
        // EIO: a pseudo-terminal that no client has open now, or a terminal that is another job's.
        if failure == EAGAIN || failure == EIO { return .empty }
        return bytes.isEmpty ? .end : .bytes(bytes)
    }
}
