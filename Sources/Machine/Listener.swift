internal import CLinux
internal import Linux

/// A listening UNIX socket, whose file is removed with it.
final class Listener: Sendable {
    let descriptor: FileDescriptor
    private let path: String

    /// - Throws: `EADDRINUSE` when the path exists, `ENAMETOOLONG` when it has more than 107 bytes.
    init(path: String) throws(SystemCallError) {
        let number = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), 0)
        guard number >= 0 else { throw .last("socket") }
        let descriptor = FileDescriptor(owning: number)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let bytes = Array(path.utf8)
        let fits = unsafe withUnsafeMutableBytes(of: &address.sun_path) { place in
            guard bytes.count < place.count, !bytes.contains(0), !bytes.isEmpty else { return false }
            unsafe place.copyBytes(from: bytes)
            return true
        }
        guard fits else { throw SystemCallError("bind", errno: ENAMETOOLONG) }
        let length = socklen_t(MemoryLayout<sockaddr_un>.size)
        let bound = unsafe withUnsafePointer(to: &address) {
            unsafe $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { unsafe bind(number, $0, length) }
        }
        guard bound == 0 else { throw .last("bind") }
        guard listen(number, 1) == 0 else {
            let error = SystemCallError.last("listen")
            unsafe unlink(path)
            throw error
        }
        self.descriptor = descriptor
        self.path = path
    }

    /// The next client, if one is waiting.
    func accept() -> FileDescriptor? {
        let number = clinux_accept_nonblocking(descriptor.rawValue)
        return number >= 0 ? FileDescriptor(owning: number) : nil
    }

    deinit { unsafe unlink(path) }
}
