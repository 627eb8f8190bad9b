// SPDX-License-Identifier: Apache-2.0

/// The network: an address, the link address of the peer (`peer=`, or else the gateway), echoes.
extension SelfTest {
    func network() {
        if devices.interfaces.isEmpty { skip("net", "no network device") }
        for (index, interface) in devices.interfaces.enumerated() { test(interface, isFirst: index == 0) }
    }

    private func test(_ interface: NetworkInterface, isFirst: Bool) {
        let name = interface.name
        check("net \(name): the link is up, MAC \(macText(interface.driver.mac))") { () throws(Failure) in
            try expect(interface.driver.linkIsUp, "it is down")
            try expect(interface.driver.mac[0] & 1 == 0, "the MAC address is a multicast address")
        }
        guard isFirst || interface.address != .any else { return }
        if interface.address == .any {
            check("net \(name): an address by DHCP") { () throws(Failure) in
                try expect(interface.configureByDHCP(), "no server answered")
            }
            guard interface.address != .any else { return }
        }
        guard
            let peer = boot.value("peer").flatMap({ IPv4Address($0) })
                ?? (interface.gateway == .any ? nil : interface.gateway)
        else {
            return skip("net \(name): echo", "no peer= and no gateway")
        }
        check("net \(name): \(interface.address.text) resolves \(peer.text) by ARP") { () throws(Failure) in
            interface.forgetNeighbours()
            try expect(interface.resolve(peer), "no reply")
        }
        check("net \(name): twenty echo replies") { () throws(Failure) in
            for sequence in UInt16(1)...20 {
                try expect(
                    interface.ping(peer, sequence: sequence, patience: 3 * seconds) != nil, "number \(sequence) did not"
                )
            }
        }
        check("net \(name): an echo reply as large as the MTU") { () throws(Failure) in
            let size = Int(min(interface.driver.mtu, 1500)) - 28
            try expect(
                interface.ping(peer, sequence: 100, size: size, patience: 3 * seconds) != nil, "\(size) bytes did not")
        }
        check("net \(name): sixty-four echoes of all sizes") { () throws(Failure) in
            for size in 0..<64 {
                try expect(
                    interface.ping(peer, sequence: UInt16(200 + size), size: size * 21, patience: 3 * seconds) != nil,
                    "\(size * 21) bytes did not")
            }
        }
        if interface.driver.pairs.count > 1 {
            check("net \(name): both pairs of queues sent frames, and frames came") { () throws(Failure) in
                var received: UInt64 = 0
                for pair in interface.driver.pairs {
                    try expect(pair.sent > 0, "one sent none")
                    received += pair.received
                }
                let all = interface.driver.received
                try expect(received == all, "\(received) of \(all) were counted")
            }
        }
        var message: [UInt8] = []
        for index in 0..<1000 { message.append(UInt8(truncatingIfNeeded: index &* 31)) }
        let echoed = interface.exchange(
            message, from: 40_007, to: peer, port: NetworkInterface.echoPort, patience: seconds / 2
        ) { $0 == message }
        if echoed {
            check("net \(name): a datagram is echoed") { () throws(Failure) in }
        } else {
            skip("net \(name): a datagram is echoed", "no UDP echo at \(peer.text)")
        }
    }
}

func macText(_ mac: [UInt8]) -> Text {
    var text = Text()
    for (index, byte) in mac.enumerated() {
        let separator: StaticString = index == 0 ? "" : ":"
        text.append("\(separator)\(hex: UInt64(byte), width: 2)")
    }
    return text
}
