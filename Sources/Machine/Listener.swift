internal import CLinux
internal import Linux

/// A listening socket: of the UNIX kind, whose file is removed with it, or a TCP port of this host's own.
final class Listener: Sendable {
    let descriptor: FileDescriptor
    private let path: String?

    /// A UNIX socket.
    /// - Parameter mode: permission bits of its file; nil leaves them to the umask.
    /// - Throws: `EADDRINUSE` when the path exists, `ENAMETOOLONG` when it has more than 107 bytes.
    init(path: String, mode: mode_t? = nil) throws(SystemCallError) {
        let descriptor = try Self.makeSocket(AF_UNIX)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let bytes = Array(path.utf8)
        let fits = unsafe withUnsafeMutableBytes(of: &address.sun_path) { place in
            guard bytes.count < place.count, !bytes.contains(0), !bytes.isEmpty else { return false }
            unsafe place.copyBytes(from: bytes)
            return true
        }
        guard fits else { throw SystemCallError("bind", errno: ENAMETOOLONG) }
        // The file is made with the socket's own mode, so nobody else can connect before it is changed.
        if let mode, fchmod(descriptor.rawValue, mode) < 0 { throw .last("fchmod") }
        try Self.bind(descriptor, to: address)
        guard listen(descriptor.rawValue, 1) == 0 else {
            let error = SystemCallError.last("listen")
            unsafe unlink(path)
            throw error
        }
        self.descriptor = descriptor
        self.path = path
    }

    /// A port of 127.0.0.1; 0 takes any that is free.
    init(port: UInt16) throws(SystemCallError) {
        let descriptor = try Self.makeSocket(AF_INET)
        var on: Int32 = 1
        // A port whose last connection has just ended is free.
        _ = unsafe setsockopt(descriptor.rawValue, SOL_SOCKET, SO_REUSEADDR, &on, socklen_t(MemoryLayout<Int32>.size))
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_port = port.bigEndian
        address.sin_addr.s_addr = in_addr_t(0x7f00_0001).bigEndian
        try Self.bind(descriptor, to: address)
        guard listen(descriptor.rawValue, 1) == 0 else { throw .last("listen") }
        self.descriptor = descriptor
        path = nil
    }

    /// The TCP port; nil of a UNIX socket.
    var port: UInt16? {
        guard path == nil else { return nil }
        var address = sockaddr_in()
        var length = socklen_t(MemoryLayout<sockaddr_in>.size)
        let result = unsafe withUnsafeMutablePointer(to: &address) {
            unsafe $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { unsafe getsockname(descriptor.rawValue, $0, &length) }
        }
        return result == 0 ? UInt16(bigEndian: address.sin_port) : nil
    }

    private static func makeSocket(_ family: Int32) throws(SystemCallError) -> FileDescriptor {
        let number = socket(family, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), 0)
        guard number >= 0 else { throw .last("socket") }
        return FileDescriptor(owning: number)
    }

    private static func bind<Address>(_ socket: borrowing FileDescriptor, to address: Address) throws(SystemCallError) {
        let length = socklen_t(MemoryLayout<Address>.size)
        // Every kind of socket address begins as `sockaddr` does.
        let bound = unsafe withUnsafePointer(to: address) {
            unsafe $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { unsafe CLinux.bind(socket.rawValue, $0, length) }
        }
        guard bound == 0 else { throw .last("bind") }
    }

    /// The next client, if one is waiting.
    func accept() -> FileDescriptor? {
        let number = clinux_accept_nonblocking(descriptor.rawValue)
        return number >= 0 ? FileDescriptor(owning: number) : nil
    }

    deinit { if let path { unsafe unlink(path) } }
}
