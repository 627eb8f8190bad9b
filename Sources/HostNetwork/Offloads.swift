// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// Indicates whether checksums and segmentation may be left to what is behind an interface, and why it was decided so.
///
/// A frame that a guest leaves unfinished is finished by the kernel before it leaves the host, wherever the kernel
/// moves it: over a bridge, a macvtap, Open vSwitch's kernel datapath, its own stack. A process that reads the
/// interface itself gets it as it is.
public struct OffloadDecision: Equatable, Sendable, CustomStringConvertible {
    public let isOn: Bool
    /// A clause for a log: `it is a port of the bridge br0`.
    public let reason: String

    public var description: String { "offloads \(isOn ? "on" : "off"): \(reason)" }

    /// - Parameters:
    ///   - wanted: what the user has specified; nil: decided by what is visible of the interface.
    ///   - hasHeader: whether the descriptor carries a virtio header, without which nothing can be left undone.
    ///   - link: the interface; nil when it cannot be seen from here.
    static func make(
        _ wanted: Bool?, hasHeader: Bool, link: Link?, _ netlink: borrowing RouteNetlink
    ) throws(HostNetworkError) -> OffloadDecision {
        if let wanted { return OffloadDecision(isOn: wanted, reason: "as requested") }
        guard hasHeader else {
            return OffloadDecision(isOn: false, reason: "the descriptor was opened without IFF_VNET_HDR")
        }
        guard let link else {
            return OffloadDecision(
                isOn: true, reason: "the peer of the interface is not visible from this network namespace")
        }
        if link.hasXDP {
            return OffloadDecision(isOn: false, reason: "an XDP program receives the frames of \(link.name)")
        }
        if link.master != 0 {
            guard let master = try netlink.link(at: link.master) else {
                return OffloadDecision(isOn: true, reason: "it is a port of a kernel device")
            }
            return OffloadDecision(isOn: true, reason: "it is a port of \(master.name), \(master.kindInWords)")
        }
        if link.tun == nil {
            return OffloadDecision(isOn: true, reason: "\(link.name), \(link.kindInWords), is a kernel device")
        }
        if packetReaders(of: link.index) > 0 {
            return OffloadDecision(
                isOn: false,
                reason: "a process reads the frames of \(link.name) (AF_PACKET), as a userspace datapath does")
        }
        return OffloadDecision(isOn: true, reason: "\(link.name) connects to the host itself")
    }

    /// Sockets of any process in this network namespace that are bound to an interface and get all its frames
    /// (packet(7)).
    private static func packetReaders(of index: Int32) -> Int {
        // Without /proc nothing is known of them.
        guard let bytes = try? readFile("/proc/thread-self/net/packet", limit: 1 << 20) else { return 0 }
        return String(decoding: bytes, as: UTF8.self).split(separator: "\n").count { isReader($0, of: index) }
    }

    /// A line of /proc/net/packet: `sk RefCnt Type Proto Iface R Rmem User Inode`.
    static func isReader(_ line: some StringProtocol, of index: Int32) -> Bool {
        let raw = "3", allProtocols = "0003", running = "1"
        let fields = line.split(separator: " ")
        return fields.count >= 6 && fields[2] == raw && fields[3] == allProtocols && fields[4] == String(index)
            && fields[5] == running
    }
}
