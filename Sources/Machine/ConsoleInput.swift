internal import CLinux
internal import Linux

/// A stream of input for a serial port, read without waiting.
final class ConsoleInput: Sendable {
    enum Result {
        case bytes([UInt8])
        /// Nothing now; the descriptor becomes readable when there is more.
        case empty
        case end
    }

    let descriptor: FileDescriptor
    private let isSocket: Bool
    /// Whether it has to be waited for; a regular file has not, and cannot.
    let isWaitable: Bool

    init(_ descriptor: consuming FileDescriptor) {
        let kind = FileDescriptor.kind(of: descriptor.rawValue) ?? 0
        isSocket = kind == S_IFSOCK
        isWaitable = kind != S_IFREG
        self.descriptor = descriptor
    }

    /// At most 256 bytes.
    func read() -> Result {
        var failure: Int32 = 0
        let bytes = unsafe [UInt8](unsafeUninitializedCapacity: 256) { buffer, count in
            // Both calls write at most the buffer's size, and tell how much that was.
            let got: Int
            do throws(SystemCallError) {
                if isSocket {
                    let number = unsafe recv(descriptor.rawValue, buffer.baseAddress, buffer.count, Int32(MSG_DONTWAIT))
                    if number < 0 { throw .last("recv") }
                    got = number
                } else {
                    got = unsafe try descriptor.read(into: UnsafeMutableRawBufferPointer(buffer))
                }
            } catch {
                failure = error.errno
                got = 0
            }
            count = got
        }
        if failure == EAGAIN || failure == EINTR { return .empty }
        // EIO: a pseudo-terminal that no client has open now, or a terminal that is another job's.
        if failure == EIO { return .empty }
        return bytes.isEmpty ? .end : .bytes(bytes)
    }
}
