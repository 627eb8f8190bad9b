// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

extension RouteNetlink {
    /// The ranges of IPv4 addresses that this network namespace uses: those of its interfaces, and of all routes of all
    /// tables but default routes.
    func usedRanges() throws(HostNetworkError) -> [UsedRange] {
        let addresses = NetlinkMessage(
            type: RTM_GETADDR, flags: Int32(CLINUX_NLM_F_DUMP),
            fixedPart: ifaddrmsg(
                ifa_family: UInt8(AF_INET), ifa_prefixlen: 0, ifa_flags: 0, ifa_scope: 0, ifa_index: 0))
        let routes = NetlinkMessage(
            type: RTM_GETROUTE, flags: Int32(CLINUX_NLM_F_DUMP),
            fixedPart: rtmsg(
                rtm_family: UInt8(AF_INET), rtm_dst_len: 0, rtm_src_len: 0, rtm_tos: 0, rtm_table: 0, rtm_protocol: 0,
                rtm_scope: 0, rtm_type: 0, rtm_flags: 0))
        return try dump(addresses, "listing the addresses").compactMap(Self.range(ofAddress:))
            + dump(routes, "listing the routes").compactMap(Self.range(ofRoute:))
    }

    /// From the payload of RTM_NEWADDR; nil when it lacks what an address has.
    static func range(ofAddress payload: NetlinkBytes) -> UsedRange? {
        guard payload.load(UInt8.self, at: 0) == UInt8(AF_INET), let length = payload.load(UInt8.self, at: 1),
            let index = payload.load(Int32.self, at: 4), let attributes = payload.slice(from: 8),
            // The other end's where there are two.
            let address = attributes.attribute(IFA_ADDRESS) ?? attributes.attribute(IFA_LOCAL)
        else { return nil }
        return range(address, length, index)
    }

    /// From the payload of RTM_NEWROUTE; nil for a route to everywhere.
    static func range(ofRoute payload: NetlinkBytes) -> UsedRange? {
        guard payload.load(UInt8.self, at: 0) == UInt8(AF_INET), let length = payload.load(UInt8.self, at: 1),
            let attributes = payload.slice(from: 12), let address = attributes.attribute(Int(RTA_DST.rawValue))
        else { return nil }
        return range(address, length, attributes.attribute(Int(RTA_OIF.rawValue))?.load(Int32.self, at: 0) ?? 0)
    }

    private static func range(_ address: NetlinkBytes, _ length: UInt8, _ index: Int32) -> UsedRange? {
        guard address.count == 4 else { return nil }
        let value = address.bytes.reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
        return UsedRange(subnet: Subnet(of: IPv4Address(rawValue: value), length: Int(length)), interface: index)
    }

    /// A dump that nothing has changed meanwhile.
    private func dump(_ request: NetlinkMessage, _ action: String) throws(HostNetworkError) -> [NetlinkBytes] {
        for _ in 0..<16 {
            if let replies = try exchange(request, action) { return replies }
        }
        throw .refused(action: action, SystemCallError("netlink", errno: EINTR), explanation: "")
    }
}
