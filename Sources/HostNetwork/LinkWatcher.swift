// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The state of an interface as reported by the kernel.
public enum LinkState: Equatable, Sendable {
    /// - Parameters:
    ///   - isCarrying: whether frames can pass.
    ///   - mtu: the largest frame without its Ethernet header, in bytes.
    case present(isCarrying: Bool, mtu: Int)
    /// The interface was removed.
    case removed
    /// The interface was moved to another network namespace and is not visible.
    case elsewhere
}

/// Hears from the kernel when an interface is switched off and on, loses and gets its carrier, gets another MTU, or is
/// removed (rtnetlink(7), the group of links).
///
/// It listens in the network namespace of the thread that made it. Not for two threads at a time.
public struct LinkWatcher: ~Copyable, Sendable {
    private let socket: FileDescriptor
    /// For questions: no socket is opened later.
    private let netlink: RouteNetlink
    private let index: Int32

    /// Readable when the kernel has reported a change of an interface, possibly of this one.
    public var descriptor: Int32 { socket.rawValue }

    /// Begins to listen; ``current()`` reports the state before.
    init(index: Int32) throws(HostNetworkError) {
        let socket = try Self.open()
        let netlink = try RouteNetlink()
        self.socket = socket
        self.netlink = netlink
        self.index = index
    }

    private static func open() throws(HostNetworkError) -> FileDescriptor {
        func failure(_ call: String) -> HostNetworkError {
            .refused(action: "listening to changes of interfaces", .last(call), explanation: "")
        }
        let number = Glibc.socket(
            AF_NETLINK, Int32(SOCK_RAW.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), NETLINK_ROUTE)
        if number < 0 { throw failure("socket") }
        let socket = FileDescriptor(owning: number)
        var address = sockaddr_nl()
        address.nl_family = sa_family_t(AF_NETLINK)
        address.nl_groups = 1 << (RTNLGRP_LINK.rawValue - 1)
        // An address of its full size, as bind wants it.
        let result = unsafe withUnsafePointer(to: &address) { address in
            unsafe address.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                unsafe bind(number, $0, socklen_t(MemoryLayout<sockaddr_nl>.size))
            }
        }
        if result < 0 { throw failure("bind") }
        return socket
    }

    /// Reads the state of the interface; nil if it is not visible.
    public func current() -> LinkState? { (try? netlink.link(at: index))?.state }

    /// Returns the latest reported state since the last call; nil if there was no report.
    ///
    /// It reads a bounded number of messages: when there are more, the descriptor is still readable.
    public func latest() -> LinkState? {
        var latest: LinkState?
        for _ in 0..<64 {
            let datagram: [UInt8]
            do throws(SystemCallError) { datagram = try receiveFromKernel(socket) } catch {
                // Messages were lost for lack of room: the current state is requested.
                if error.errno == ENOBUFS { latest = current() ?? latest; continue }
                return latest
            }
            var rest = NetlinkBytes(bytes: datagram[...])
            while let message = rest.nextMessage() {
                // A bridge reports its ports in messages of its own family.
                guard message.payload.load(UInt8.self, at: 0) == UInt8(AF_UNSPEC),
                    message.payload.load(Int32.self, at: 4) == index
                else { continue }
                switch message.type {
                case RTM_NEWLINK: latest = RouteNetlink.parseLink(message.payload)?.state ?? latest
                // With a namespace's number it has moved there.
                case RTM_DELLINK:
                    latest = message.payload.slice(from: 16)?.attribute(IFLA_NEW_NETNSID) == nil ? .removed : .elsewhere
                default: break
                }
            }
        }
        return latest
    }
}

extension Link {
    var state: LinkState { .present(isCarrying: isCarrying, mtu: mtu) }
}
