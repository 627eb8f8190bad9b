// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// A bridge of the host: an Ethernet switch whose ports are interfaces.
public enum Bridge {
    /// The alias of a bridge that swkvm created, and that is removed with its last port.
    ///
    /// The mark is on the bridge itself, so whichever machine leaves last removes it, also when the one that created it
    /// was killed. To keep such a bridge, clear the alias: `ip link set NAME alias ""`.
    public static let mark = "swkvm: removed with its last port"

    /// The bridge of a name, which must be up.
    /// - Throws: `bridgeMissing`, `notABridge`, `bridgeDown`.
    public static func find(_ name: InterfaceName, _ netlink: borrowing RouteNetlink) throws(HostNetworkError) -> Link {
        guard let link = try netlink.link(named: name) else { throw .bridgeMissing(name) }
        guard link.kind == "bridge" else { throw .notABridge(name, kind: link.kindInWords) }
        guard link.isUp else { throw .bridgeDown(name) }
        return link
    }

    /// Creates a bridge, marked and up.
    ///
    /// Its address is fixed from the start: a bridge without one takes the lowest of its ports' and changes it as they
    /// come and go, which leaves stale entries in the ARP tables of other hosts.
    public static func create(_ name: InterfaceName, _ netlink: borrowing RouteNetlink) throws(HostNetworkError) -> Link
    {
        try netlink.createLink(name, kind: "bridge", address: .random())
        guard let link = try netlink.link(named: name) else { throw .bridgeMissing(name) }
        do {
            try netlink.set(link, alias: mark)
            try netlink.set(link, up: true)
        } catch {
            try? netlink.delete(link)
            throw error
        }
        return try find(name, netlink)
    }

    /// Removes a bridge that carries the mark and has no port besides `except`; leaves any other alone.
    static func removeIfUnused(
        _ name: InterfaceName, except port: Int32, _ netlink: borrowing RouteNetlink
    ) throws(HostNetworkError) {
        guard let bridge = try netlink.link(named: name), bridge.kind == "bridge", bridge.alias == mark else { return }
        guard try netlink.ports(of: bridge.index).allSatisfy({ $0.index == port }) else { return }
        try netlink.delete(bridge)
    }
}
