// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
package import Linux

/// A connection to a program that carries Ethernet frames over a UNIX stream socket, as passt and others do: each
/// frame has its length before it, 32 bits, big-endian. There is no virtio header, so nothing is left to the peer.
public struct FrameStream: ~Copyable, Sendable {
    /// What is at the other end: `passt`, or the socket's path.
    public let name: String
    private let socket: FileDescriptor

    /// Bytes of a length.
    public static let lengthSize = 4
    /// From an Ethernet header to the largest packet of IP with a VLAN tag.
    public static let possibleLengths: ClosedRange<UInt32> = 14...(65536 + 18)
    /// The MTU that a card on such a connection can have.
    public static let possibleMTU = 68...65520
    /// The MTU without another one: Ethernet's own.
    public static let usualMTU = 1500

    /// The socket's number, valid while this value lives.
    public var descriptor: Int32 { socket.rawValue }

    package init(_ socket: consuming FileDescriptor, name: String) {
        self.socket = socket
        self.name = name
    }

    /// Connects to a socket that a program listens on.
    /// - Throws: `streamUnavailable`.
    public static func connect(to path: String) throws(HostNetworkError) -> FrameStream {
        do throws(SystemCallError) { return FrameStream(try open(path), name: path) } catch {
            throw .streamUnavailable(path, error)
        }
    }

    private static func open(_ path: String) throws(SystemCallError) -> FileDescriptor {
        // A program that accepts nobody would be waited for.
        let kind = Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue)
        let number = Glibc.socket(AF_UNIX, kind, 0)
        if number < 0 { throw .last("socket") }
        let socket = FileDescriptor(owning: number)
        var address = sockaddr_un()
        let capacity = MemoryLayout.size(ofValue: address.sun_path)
        address.sun_family = sa_family_t(AF_UNIX)
        let bytes = path.rawBytes
        guard !bytes.isEmpty, bytes.count < capacity else { throw SystemCallError("connect", errno: ENAMETOOLONG) }
        // It fits, with a zero behind it.
        unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: bytes) }
        while true {
            // An address of its full size.
            let result = unsafe withUnsafePointer(to: &address) { address in
                unsafe address.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                    unsafe Glibc.connect(number, $0, socklen_t(MemoryLayout<sockaddr_un>.size))
                }
            }
            if result == 0 { return socket }
            if errno != EINTR { throw .last("connect") }
        }
    }

    /// A pair of connected sockets; both are close-on-exec.
    static func pair() throws(SystemCallError) -> Pair {
        var ends: [Int32] = [-1, -1]
        // The kernel fills the two elements.
        let result = unsafe socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &ends)
        if result < 0 { throw .last("socketpair") }
        return Pair(own: FileDescriptor(owning: ends[0]), peer: FileDescriptor(owning: ends[1]))
    }

    struct Pair: ~Copyable {
        let own: FileDescriptor
        let peer: FileDescriptor
    }

    /// Ends the connection in both directions. The descriptor stays this value's.
    public func end() { _ = shutdown(socket.rawValue, Int32(SHUT_RDWR)) }
}
