// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// A network interface as the kernel describes it.
public struct Link: Equatable, Sendable {
    /// The kernel's number for it; it stays when the name changes, and is not given to another soon.
    public let index: Int32
    public let name: InterfaceName
    /// The driver's kind, `bridge`, `tun`, `veth`, …; empty for hardware.
    public let kind: String
    /// The largest frame without its Ethernet header, in bytes.
    public let mtu: Int
    public let isUp: Bool
    /// Indicates a carrier: for a TAP, that a process has it open and that its carrier is not switched off.
    public let hasCarrier: Bool
    /// The index of the bridge (or bond, …) whose port it is; 0 for none.
    public let master: Int32
    /// The Ethernet address, nil for an interface without one.
    public let address: MACAddress?
    /// Free text that an administrator, or swkvm, put there.
    public let alias: String
    /// Frames that came in by it and were dropped: for a macvtap, also those its reader was too slow for.
    public let receiveDrops: UInt64
    /// Frames that were to leave by it and were dropped: for a TAP, those its reader was too slow for.
    public let transmitDrops: UInt64
    /// An XDP program gets the frames that come in by it.
    public let hasXDP: Bool
    /// More about a TUN or TAP.
    public let tun: TUN?

    /// A TUN or TAP's own attributes.
    public struct TUN: Equatable, Sendable {
        /// Ethernet frames, not IP packets.
        public let isTAP: Bool
        /// Indicates that the interface remains when no process has it open.
        public let isPersistent: Bool
        /// Four bytes of packet information come before each frame (no IFF_NO_PI).
        public let hasPacketInformation: Bool
        public let isMultiQueue: Bool
        /// The number of attached descriptors of a multi-queue interface; otherwise 0, since the kernel does not report
        /// it.
        public let queues: UInt32
    }

    /// Frames can pass.
    public var isCarrying: Bool { isUp && hasCarrier }

    /// `a bridge`, `hardware`, `a TUN`: for a sentence.
    var kindInWords: String {
        if let tun, !tun.isTAP { return "a TUN" }
        return kind.isEmpty ? "hardware or loopback" : "of kind \(kind)"
    }
}

/// A socket to the kernel's network configuration (rtnetlink(7)).
///
/// It belongs to the network namespace of the thread that opened it, and stays there when another thread uses it.
/// Not for two threads at a time.
public struct RouteNetlink: ~Copyable, Sendable {
    private let socket: FileDescriptor

    /// - Throws: `refused` if no socket can be opened.
    public init() throws(HostNetworkError) {
        let number = Glibc.socket(AF_NETLINK, Int32(SOCK_RAW.rawValue | SOCK_CLOEXEC.rawValue), NETLINK_ROUTE)
        if number < 0 { throw .refused(action: "opening a netlink socket", .last("socket"), explanation: "") }
        socket = FileDescriptor(owning: number)
        // Error texts and unabridged error numbers; a kernel without them still gives the numbers.
        var on: Int32 = 1
        unsafe setsockopt(number, SOL_NETLINK, NETLINK_EXT_ACK, &on, 4)
        unsafe setsockopt(number, SOL_NETLINK, NETLINK_CAP_ACK, &on, 4)
    }

    var rawValue: Int32 { socket.rawValue }

    // MARK: Looking

    /// The interface of a name, or nil.
    public func link(named name: InterfaceName) throws(HostNetworkError) -> Link? {
        var message = linkMessage(RTM_GETLINK)
        message.append(attribute: IFLA_IFNAME, string: name.text)
        return try oneLink(message, "looking for \(name)")
    }

    /// The interface of an index, or nil.
    public func link(at index: Int32) throws(HostNetworkError) -> Link? {
        try oneLink(linkMessage(RTM_GETLINK, index: index), "looking for interface \(index)")
    }

    /// All interfaces of the namespace.
    public func links() throws(HostNetworkError) -> [Link] {
        // A dump during which something changed may lack an entry: the kernel reports that, and the request is
        // repeated.
        for _ in 0..<16 {
            if let replies = try exchange(
                linkMessage(RTM_GETLINK, flags: Int32(CLINUX_NLM_F_DUMP)), "listing the interfaces")
            {
                return replies.compactMap(Self.parseLink)
            }
        }
        throw .refused(action: "listing the interfaces", SystemCallError("RTM_GETLINK", errno: EINTR), explanation: "")
    }

    /// The ports of a bridge.
    public func ports(of bridge: Int32) throws(HostNetworkError) -> [Link] {
        try links().filter { $0.master == bridge }
    }

    // MARK: Changing

    /// Creates an interface of a kind (`bridge`, `veth`, …), down.
    /// - Parameters:
    ///   - address: its Ethernet address; nil lets the kernel choose.
    ///   - parent: the interface it sits on, for kinds such as `macvtap`; 0 for none.
    /// - Throws: `refused` with `EEXIST` when the name is taken, `notPermitted` without CAP_NET_ADMIN.
    public func createLink(
        _ name: InterfaceName, kind: String, address: MACAddress? = nil, parent: Int32 = 0
    ) throws(HostNetworkError) {
        var message = linkMessage(RTM_NEWLINK, flags: NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)
        message.append(attribute: IFLA_IFNAME, string: name.text)
        if let address { message.append(attribute: IFLA_ADDRESS, address.bytes) }
        if parent != 0 { message.append(attribute: IFLA_LINK, number: UInt32(bitPattern: parent)) }
        message.append(nested: IFLA_LINKINFO) { info in
            info.append(attribute: IFLA_INFO_KIND, string: kind)
        }
        try change(message, "creating the \(kind) \(name)", "ip link add \(name) type \(kind)")
    }

    /// Removes an interface; its ports or peers are the kernel's business.
    public func delete(_ link: Link) throws(HostNetworkError) {
        try change(
            linkMessage(RTM_DELLINK, flags: NLM_F_ACK, index: link.index), "removing \(link.name)",
            "ip link del \(link.name)")
    }

    /// Switches an interface on or off.
    public func set(_ link: Link, up: Bool) throws(HostNetworkError) {
        let state = up ? "up" : "down"
        try change(
            linkMessage(RTM_NEWLINK, flags: NLM_F_ACK, index: link.index, up: up),
            "setting \(link.name) \(state)", "ip link set \(link.name) \(state)")
    }

    /// Creates a macvtap on another interface, whose guests reach each other (MACVLAN_MODE_BRIDGE), down.
    /// - Parameter index: of the new interface, which also names its device file.
    /// - Throws: as ``createLink(_:kind:address:parent:)``.
    func createMACVTAP(
        _ name: InterfaceName, on parent: Link, index: Int32, address: MACAddress
    ) throws(HostNetworkError) {
        var message = linkMessage(RTM_NEWLINK, flags: NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, index: index)
        message.append(attribute: IFLA_IFNAME, string: name.text)
        message.append(attribute: IFLA_ADDRESS, address.bytes)
        message.append(attribute: IFLA_LINK, number: UInt32(bitPattern: parent.index))
        message.append(nested: IFLA_LINKINFO) { info in
            info.append(attribute: IFLA_INFO_KIND, string: "macvtap")
            info.append(nested: IFLA_INFO_DATA) { data in
                data.append(attribute: IFLA_MACVLAN_MODE, number: UInt32(MACVLAN_MODE_BRIDGE.rawValue))
            }
        }
        try change(
            message, "creating the macvtap \(name) on \(parent.name)",
            "ip link add \(name) link \(parent.name) type macvtap mode bridge")
    }

    /// Switches an interface on, for all multicast addresses: a guest's are not known here.
    func startWithAllMulticast(_ link: Link) throws(HostNetworkError) {
        try change(
            linkMessage(
                RTM_NEWLINK, flags: NLM_F_ACK, index: link.index, up: true, also: UInt32(IFF_ALLMULTI)),
            "setting \(link.name) up", "ip link set \(link.name) allmulticast on up")
    }

    /// Makes an interface a port of `bridge`, or of none.
    public func set(_ link: Link, master bridge: Link?) throws(HostNetworkError) {
        var message = linkMessage(RTM_NEWLINK, flags: NLM_F_ACK, index: link.index)
        message.append(attribute: IFLA_MASTER, number: UInt32(bitPattern: bridge?.index ?? 0))
        if let bridge {
            try change(
                message, "making \(link.name) a port of \(bridge.name)",
                "ip link set \(link.name) master \(bridge.name)")
        } else {
            try change(message, "taking \(link.name) off its bridge", "ip link set \(link.name) nomaster")
        }
    }

    /// Moves an interface into another network namespace, where it arrives switched off. For tests.
    package func move(_ link: Link, to namespace: borrowing NetworkNamespace) throws(HostNetworkError) {
        var message = linkMessage(RTM_NEWLINK, flags: NLM_F_ACK, index: link.index)
        message.append(attribute: IFLA_NET_NS_FD, number: UInt32(bitPattern: namespace.descriptor.rawValue))
        try change(message, "moving \(link.name) into another network namespace", "ip link set \(link.name) netns PID")
    }

    /// Sets the MTU in bytes, without the Ethernet header.
    public func set(_ link: Link, mtu: Int) throws(HostNetworkError) {
        var message = linkMessage(RTM_NEWLINK, flags: NLM_F_ACK, index: link.index)
        message.append(attribute: IFLA_MTU, number: UInt32(clamping: mtu))
        try change(message, "setting the MTU of \(link.name) to \(mtu)", "ip link set \(link.name) mtu \(mtu)")
    }

    /// Sets the Ethernet address.
    public func set(_ link: Link, address: MACAddress) throws(HostNetworkError) {
        var message = linkMessage(RTM_NEWLINK, flags: NLM_F_ACK, index: link.index)
        message.append(attribute: IFLA_ADDRESS, address.bytes)
        try change(
            message, "setting the address of \(link.name) to \(address)", "ip link set \(link.name) address \(address)")
    }

    /// Sets the free text.
    public func set(_ link: Link, alias: String) throws(HostNetworkError) {
        var message = linkMessage(RTM_NEWLINK, flags: NLM_F_ACK, index: link.index)
        message.append(attribute: IFLA_IFALIAS, Array(alias.utf8))
        try change(message, "marking \(link.name)", "ip link set \(link.name) alias '\(alias)'")
    }

    /// Gives an interface an IPv4 address.
    /// - Parameters:
    ///   - address: its four bytes, in the order they are written.
    ///   - prefixLength: bits of the network, 0–32.
    public func add(to link: Link, address: (UInt8, UInt8, UInt8, UInt8), prefixLength: UInt8) throws(HostNetworkError)
    {
        let fixed = ifaddrmsg(
            ifa_family: UInt8(AF_INET), ifa_prefixlen: prefixLength, ifa_flags: 0, ifa_scope: 0,
            ifa_index: UInt32(bitPattern: link.index))
        var message = NetlinkMessage(type: RTM_NEWADDR, flags: NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, fixedPart: fixed)
        let bytes = [address.0, address.1, address.2, address.3]
        message.append(attribute: IFA_LOCAL, bytes)
        message.append(attribute: IFA_ADDRESS, bytes)
        let text = bytes.map(String.init).joined(separator: ".") + "/\(prefixLength)"
        try change(message, "giving \(link.name) the address \(text)", "ip addr add \(text) dev \(link.name)")
    }

    // MARK: The protocol

    /// - Parameter also: flags that are set besides.
    private func linkMessage(
        _ type: Int, flags: Int32 = 0, index: Int32 = 0, up: Bool? = nil, also: UInt32 = 0
    ) -> NetlinkMessage {
        let fixed = ifinfomsg(
            ifi_family: UInt8(AF_UNSPEC), __ifi_pad: 0, ifi_type: 0, ifi_index: index,
            ifi_flags: (up == true ? CLINUX_IFF_UP : 0) | also, ifi_change: (up == nil ? 0 : CLINUX_IFF_UP) | also)
        return NetlinkMessage(type: type, flags: flags, fixedPart: fixed)
    }

    private func change(_ message: NetlinkMessage, _ action: String, _ command: String) throws(HostNetworkError) {
        do { _ = try exchange(message, action) } catch {
            guard error.errno == EPERM || error.errno == EACCES else { throw error }
            throw .notPermitted(action: action, command: command)
        }
    }

    private func oneLink(_ message: NetlinkMessage, _ action: String) throws(HostNetworkError) -> Link? {
        do { return try exchange(message, action)?.lazy.compactMap(Self.parseLink).first } catch {
            if error.errno == ENODEV { return nil }
            throw error
        }
    }

    /// Sends a request and collects the payloads of its replies, up to the acknowledgement or the end of the dump.
    /// - Returns: nil for a dump that the kernel calls inconsistent.
    func exchange(_ request: NetlinkMessage, _ action: String) throws(HostNetworkError) -> [NetlinkBytes]? {
        func failure(_ error: SystemCallError) -> HostNetworkError { .refused(action: action, error, explanation: "") }
        let sequence = UInt32.random(in: 1...UInt32.max)
        var request = request
        request.fillHeader(sequence: sequence)
        let sent = unsafe request.bytes.withUnsafeBytes { unsafe send(socket.rawValue, $0.baseAddress, $0.count, 0) }
        if sent < 0 { throw failure(.last("send")) }

        var replies: [NetlinkBytes] = []
        var isConsistent = true
        while true {
            let datagram: [UInt8]
            do { datagram = try receiveFromKernel(socket) } catch { throw failure(error) }
            var rest = NetlinkBytes(bytes: datagram[...])
            while let message = rest.nextMessage() {
                // What is left of an exchange that failed half-way is skipped.
                guard message.sequence == sequence else { continue }
                if message.flags & UInt16(NLM_F_DUMP_INTR) != 0 { isConsistent = false }
                switch Int32(message.type) {
                case NLMSG_ERROR, NLMSG_DONE:
                    let code = message.payload.load(Int32.self, at: 0) ?? 0
                    if code == 0 { return isConsistent ? replies : nil }
                    throw .refused(
                        action: action, SystemCallError("netlink", errno: 0 &- code),
                        explanation: Self.explanation(message.payload, message.flags))
                default:
                    replies.append(message.payload)
                    // Only a dump has NLM_F_MULTI; a single answer that asked for no acknowledgement ends here.
                    if message.flags & UInt16(NLM_F_MULTI) == 0 { return replies }
                }
            }
        }
    }

    /// The kernel's own words in an error message (NLMSGERR_ATTR_MSG), which follow its error number and the request's
    /// header.
    private static func explanation(_ payload: NetlinkBytes, _ flags: UInt16) -> String {
        guard flags & UInt16(NLM_F_ACK_TLVS) != 0, let length = payload.load(UInt32.self, at: 4) else { return "" }
        let requestSize = flags & UInt16(NLM_F_CAPPED) != 0 ? 16 : (Int(length) + 3) & ~3
        return payload.slice(from: 4 + requestSize)?.attribute(Int(NLMSGERR_ATTR_MSG.rawValue))?.string ?? ""
    }

    /// The interfaces that a datagram is about, whatever its bytes are.
    package static func links(inDatagram bytes: [UInt8]) -> [Link] {
        var rest = NetlinkBytes(bytes: bytes[...])
        var links: [Link] = []
        while let message = rest.nextMessage() {
            if message.type == RTM_NEWLINK, let link = parseLink(message.payload) { links.append(link) }
        }
        return links
    }

    /// An interface from the payload of RTM_NEWLINK; nil when it lacks what every interface has.
    static func parseLink(_ payload: NetlinkBytes) -> Link? {
        guard let index = payload.load(Int32.self, at: 4), let flags = payload.load(UInt32.self, at: 8),
            let attributes = payload.slice(from: 16), let name = attributes.attribute(IFLA_IFNAME)?.string
        else { return nil }
        func number(_ type: Int, in run: NetlinkBytes) -> UInt32 { run.attribute(type)?.load(at: 0) ?? 0 }
        let info = attributes.attribute(IFLA_LINKINFO)
        let kind = info?.attribute(IFLA_INFO_KIND)?.string ?? ""
        var tun: Link.TUN?
        if kind == "tun", let data = info?.attribute(IFLA_INFO_DATA) {
            func byte(_ type: Int) -> UInt8 { data.attribute(type)?.load(at: 0) ?? 0 }
            tun = Link.TUN(
                isTAP: byte(IFLA_TUN_TYPE) == UInt8(IFF_TAP),
                isPersistent: byte(IFLA_TUN_PERSIST) != 0,
                hasPacketInformation: byte(IFLA_TUN_PI) != 0,
                isMultiQueue: byte(IFLA_TUN_MULTI_QUEUE) != 0,
                queues: number(IFLA_TUN_NUM_QUEUES, in: data))
        }
        let hardware = attributes.attribute(IFLA_ADDRESS)
        let address = hardware?.count == 6 ? hardware?.bytes.reduce(UInt64(0)) { $0 << 8 | UInt64($1) } : nil
        return Link(
            index: index, name: InterfaceName(fromKernel: name), kind: kind,
            mtu: Int(number(IFLA_MTU, in: attributes)),
            isUp: flags & CLINUX_IFF_UP != 0,
            hasCarrier: flags & CLINUX_IFF_LOWER_UP != 0,
            master: Int32(bitPattern: number(IFLA_MASTER, in: attributes)),
            address: address.flatMap { try? MACAddress(rawValue: $0) },
            alias: attributes.attribute(IFLA_IFALIAS)?.string ?? "",
            // struct rtnl_link_stats64: rx_dropped and tx_dropped are its seventh and eighth counters.
            receiveDrops: attributes.attribute(IFLA_STATS64)?.load(at: 6 * 8) ?? 0,
            transmitDrops: attributes.attribute(IFLA_STATS64)?.load(at: 7 * 8) ?? 0,
            // XDP_ATTACHED_NONE is 0.
            hasXDP: attributes.attribute(IFLA_XDP)?.attribute(IFLA_XDP_ATTACHED)?.load(UInt8.self, at: 0) ?? 0 != 0,
            tun: tun)
    }
}
