// SPDX-License-Identifier: Apache-2.0

import HostNetwork

extension FuzzTarget {
    /// A datagram of the kernel's about interfaces, which are messages with attributes in them.
    static let netlink = FuzzTarget(name: "netlink", seeds: [datagram()]) { bytes in
        let links = RouteNetlink.links(inDatagram: bytes)
        for link in links { precondition(link.name.text.utf8.count <= bytes.count * 3, "a name of nowhere") }
        return !links.isEmpty
    }

    /// Two interfaces: a TAP that is a port of a bridge, and the end of a dump.
    private static func datagram() -> [UInt8] {
        func attribute(_ type: UInt64, _ payload: [UInt8]) -> [UInt8] {
            var bytes = [UInt8](repeating: 0, count: 4)
            put(&bytes, 0, UInt64(4 + payload.count), 2)
            put(&bytes, 2, type, 2)
            return bytes + payload + [UInt8](repeating: 0, count: (4 - payload.count % 4) % 4)
        }
        func message(_ type: UInt64, _ payload: [UInt8]) -> [UInt8] {
            var bytes = [UInt8](repeating: 0, count: 16)
            put(&bytes, 0, UInt64(16 + payload.count), 4)
            put(&bytes, 4, type, 2)
            put(&bytes, 6, 2, 2)
            put(&bytes, 8, 1, 4)
            return bytes + payload
        }
        func link(_ index: UInt64, _ attributes: [UInt8]) -> [UInt8] {
            var fixed = [UInt8](repeating: 0, count: 16)
            put(&fixed, 4, index, 4)
            put(&fixed, 8, 0x1_0043, 4)
            return message(16, fixed + attributes)
        }
        // IFLA_LINKINFO with its kind and data; IFLA_TUN_TYPE, _PI, _PERSIST, _MULTI_QUEUE, _NUM_QUEUES.
        let tun =
            attribute(3, [2]) + attribute(4, [0]) + attribute(6, [1]) + attribute(7, [1]) + attribute(8, [2, 0, 0, 0])
        let information = attribute(1, Array("tun\u{0}".utf8)) + attribute(2, tun)
        let first =
            attribute(3, Array("tap0\u{0}".utf8)) + attribute(4, [0xdc, 5, 0, 0]) + attribute(10, [2, 0, 0, 0])
            + attribute(1, [0x52, 0x54, 0, 0x12, 0x34, 0x56]) + attribute(18, information)
            + attribute(20, Array("alias\u{0}".utf8)) + attribute(23, [UInt8](repeating: 7, count: 192))
        let second = attribute(3, Array("br0\u{0}".utf8)) + attribute(18, attribute(1, Array("bridge\u{0}".utf8)))
        return link(5, first) + link(2, second) + message(3, [0, 0, 0, 0])
    }
}
