// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux
internal import Synchronization

/// A listening socket: of the UNIX kind, whose file is removed with it, or a TCP port of this host's own.
final class Listener: Sendable {
    let descriptor: FileDescriptor
    /// The socket's file.
    private let file: SocketFile?
    /// Another process removes the file.
    private let isDelegated = Atomic<Bool>(false)

    /// A UNIX socket, whose file only its owner can connect to. A socket without a listener, left behind by a process
    /// that was killed, is replaced.
    /// - Parameter replacesStale: whether that is done; otherwise there must be no file at all.
    /// - Throws: `EADDRINUSE` when another process listens at the path, `EEXIST` when it is no socket, `ENAMETOOLONG`
    ///   when it has more than 107 bytes.
    /// - Parameter backlog: connections that may wait to be accepted.
    init(path: String, backlog: Int32 = 1, replacesStale: Bool = true) throws(SystemCallError) {
        let address = try Self.address(path)
        let descriptor = try Self.makeSocket(AF_UNIX)
        // The file is made with the socket's own mode, so no other user can connect before it is changed.
        if fchmod(descriptor.rawValue, 0o600) < 0 { throw .last("fchmod") }
        // One at a time checks whether a socket is stale and removes it: another one may have put its own there in
        // between.
        let turn = Self.lockDirectory(of: path)
        do throws(SystemCallError) { try Self.bind(descriptor, to: address) } catch {
            guard error.errno == EADDRINUSE, replacesStale else { throw error }
            try Self.removeStale(path, address)
            try Self.bind(descriptor, to: address)
        }
        guard listen(descriptor.rawValue, backlog) == 0 else {
            let error = SystemCallError.last("listen")
            removeName(path)
            throw error
        }
        _ = consume turn
        self.descriptor = descriptor
        file = SocketFile(path)
    }

    private static func address(_ path: String) throws(SystemCallError) -> sockaddr_un {
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let bytes = path.rawBytes
        let fits = unsafe withUnsafeMutableBytes(of: &address.sun_path) { place in
            guard bytes.count < place.count, !bytes.contains(0), !bytes.isEmpty else { return false }
            unsafe place.copyBytes(from: bytes)
            return true
        }
        guard fits else { throw SystemCallError("bind", errno: ENAMETOOLONG) }
        return address
    }

    /// Connects to such a socket.
    static func client(of path: String) throws(SystemCallError) -> FileDescriptor {
        let address = try address(path)
        let socket = try makeSocket(AF_UNIX)
        let length = socklen_t(MemoryLayout<sockaddr_un>.size)
        // Every kind of socket address begins as `sockaddr` does.
        let status = unsafe withUnsafePointer(to: address) {
            unsafe $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                unsafe connect(socket.rawValue, $0, length)
            }
        }
        guard status == 0 else { throw .last("connect") }
        return socket
    }

    /// The directory of a path, locked as far as that is possible: who may not read it, or waits for a second, goes
    /// without.
    private static func lockDirectory(of path: String) -> FileLock? {
        let directory = path.directoryAndName.directory
        for _ in 0..<100 {
            guard let descriptor = try? FileDescriptor.open(directory, O_RDONLY | O_DIRECTORY) else { return nil }
            if let lock = try? FileLock(descriptor) { return lock }
            usleep(10_000)
        }
        return nil
    }

    /// Removes a socket's file that no socket has any more.
    private static func removeStale(_ path: String, _ address: sockaddr_un) throws(SystemCallError) {
        guard let identity = FileIdentity(path) else { return }
        guard identity.isSocket else { throw SystemCallError("bind", errno: EEXIST) }
        // Of the other kind: the listener does not notice this, the kernel only reports that the kinds differ
        // (EPROTOTYPE). Where no socket has the file, it refuses.
        let probe = try makeSocket(AF_UNIX, SOCK_DGRAM)
        let length = socklen_t(MemoryLayout<sockaddr_un>.size)
        // Every kind of socket address begins as `sockaddr` does.
        let answer = unsafe withUnsafePointer(to: address) {
            unsafe $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { unsafe connect(probe.rawValue, $0, length) }
        }
        guard answer < 0, errno == ECONNREFUSED, FileIdentity(path) == identity else {
            throw SystemCallError("bind", errno: EADDRINUSE)
        }
        if path.withRawCString({ unsafe unlink($0) }) < 0, errno != ENOENT { throw .last("unlink") }
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
        file = nil
    }

    /// The TCP port; nil of a UNIX socket.
    var port: UInt16? {
        guard file == nil else { return nil }
        var address = sockaddr_in()
        var length = socklen_t(MemoryLayout<sockaddr_in>.size)
        let result = unsafe withUnsafeMutablePointer(to: &address) {
            unsafe $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                unsafe getsockname(descriptor.rawValue, $0, &length)
            }
        }
        return result == 0 ? UInt16(bigEndian: address.sin_port) : nil
    }

    private static func makeSocket(
        _ family: Int32, _ type: __socket_type = SOCK_STREAM
    ) throws(SystemCallError) -> FileDescriptor {
        let number = socket(family, Int32(type.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), 0)
        guard number >= 0 else { throw .last("socket") }
        return FileDescriptor(owning: number)
    }

    private static func bind<Address>(_ socket: borrowing FileDescriptor, to address: Address) throws(SystemCallError) {
        let length = socklen_t(MemoryLayout<Address>.size)
        // Every kind of socket address begins as `sockaddr` does.
        let bound = unsafe withUnsafePointer(to: address) {
            unsafe $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                unsafe CLinux.bind(socket.rawValue, $0, length)
            }
        }
        guard bound == 0 else { throw .last("bind") }
    }

    /// The next client, if one is waiting.
    func accept() -> FileDescriptor? {
        let number = clinux_accept_nonblocking(descriptor.rawValue)
        return number >= 0 ? FileDescriptor(owning: number) : nil
    }

    /// The directory of the socket's file, for a process that removes it; nil where there is none.
    var directory: Int32? {
        switch file {
        case .some(let file): file.directory.rawValue
        case .none: nil
        }
    }

    /// Leaves the file to that process, which calls ``removeFile()``.
    func delegateFile() { isDelegated.store(true, ordering: .relaxed) }

    func removeFile() {
        switch file {
        case .some(let file): file.remove()
        case .none: break
        }
    }

    /// Removes the socket's file, unless that is left to another process.
    func withdraw() {
        if !isDelegated.load(ordering: .relaxed) { removeFile() }
    }

    deinit { withdraw() }
}

/// A socket's file, and which one it is: another process may have put its own there since.
private struct SocketFile: ~Copyable, Sendable {
    let directory: FileDescriptor
    private let name: String
    private let identity: FileIdentity

    /// nil where there is none.
    init?(_ path: String) {
        let (place, name) = path.directoryAndName
        guard let directory = try? FileDescriptor.open(place, CLINUX_O_PATH | O_DIRECTORY),
            let identity = FileIdentity(name, in: directory)
        else { return nil }
        self.directory = directory
        (self.name, self.identity) = (name, identity)
    }

    func remove() {
        guard FileIdentity(name, in: directory) == identity else { return }
        // A text that ends with a NUL, for the call.
        _ = name.withRawCString { unsafe unlinkat(directory.rawValue, $0, 0) }
    }
}

/// Which file a path leads to, links not followed.
private struct FileIdentity: Equatable {
    let device: dev_t
    let inode: ino_t
    let isSocket: Bool

    /// nil where there is none.
    init?(_ path: String) {
        guard let status = fileStatus(ofPath: path, followsLinks: false) else { return nil }
        self.init(status)
    }

    /// That of a name in a directory.
    init?(_ name: String, in directory: borrowing FileDescriptor) {
        let number = directory.rawValue
        var status = stat()
        // It writes no more than the structure.
        let found = name.withRawCString { unsafe fstatat(number, $0, &status, AT_SYMLINK_NOFOLLOW) }
        guard found == 0 else { return nil }
        self.init(status)
    }

    private init(_ status: stat) {
        device = status.st_dev
        inode = status.st_ino
        isSocket = (status.st_mode & S_IFMT) == S_IFSOCK
    }
}
