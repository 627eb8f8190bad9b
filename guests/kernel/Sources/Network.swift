// SPDX-License-Identifier: Apache-2.0

/// An interface: a device, its address, and the protocols of a small host. ARP, IPv4 without fragments, ICMP echo both
/// ways, UDP with an echo server on port 7, DHCP (DHCP.swift), TCP as a client (TCP.swift).
final class NetworkInterface {
    private enum EtherType {
        static let ipv4: UInt16 = 0x0800
        static let arp: UInt16 = 0x0806
    }

    private enum IPProtocol {
        static let icmp: UInt8 = 1
        static let tcp: UInt8 = 6
        static let udp: UInt8 = 17
    }

    private struct Neighbour {
        var address: IPv4Address
        var mac: [UInt8]
    }

    static let echoPort: UInt16 = 7
    private static let broadcastMAC: [UInt8] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff]
    private static let neighboursKept = 64

    let driver: NetworkDevice
    var address = IPv4Address.any
    var prefix: UInt32 = 0
    var gateway = IPv4Address.any
    private var neighbours: [Neighbour] = []
    private var identification: UInt16 = 0

    /// The current ICMP echo, and whether it was answered.
    private var awaitedEcho: (identifier: UInt16, sequence: UInt16)?
    private var echoArrived: Nanoseconds = 0

    /// The port of an awaited UDP answer.
    private var awaitedPort: UInt16 = 0
    private var awaitedDatagrams: [[UInt8]] = []

    /// The one TCP connection.
    var tcp: TCPConnection?

    init(_ driver: NetworkDevice) {
        self.driver = driver
        driver.deliver = { [self] in receive($0) }  // both live as long as the kernel
    }

    var name: Text { driver.name }
    private var mask: UInt32 { prefix == 0 ? 0 : ~0 << (32 - min(prefix, 32)) }

    /// Sets `ADDRESS/PREFIX[,GATEWAY]`. False if the text has another form.
    func configure(_ text: Text) -> Bool {
        let parts = text.split(UInt8(ascii: ","))
        guard let first = parts.first, let (before, after) = first.cut(UInt8(ascii: "/")),
            let address = IPv4Address(before),
            let prefix = after.number, prefix <= 32
        else { return false }
        self.address = address
        self.prefix = UInt32(prefix)
        if parts.count > 1 {
            guard let gateway = IPv4Address(parts[1]) else { return false }
            self.gateway = gateway
        }
        return true
    }

    // MARK: Receiving

    private func receive(_ frame: [UInt8]) {
        guard frame.count >= 14 else { return }
        switch frame.big16(12) {
        case EtherType.arp: receiveARP(frame)
        case EtherType.ipv4: receiveIPv4(frame)
        default: break
        }
    }

    private func receiveARP(_ frame: [UInt8]) {
        guard frame.count >= 42, frame.big16(14) == 1, frame.big16(16) == EtherType.ipv4 else { return }
        let sender = IPv4Address(value: frame.big32(28))
        let senderMAC = [UInt8](frame[22..<28])
        if sender != .any { learn(sender, senderMAC) }
        let request: UInt16 = 1
        guard frame.big16(20) == request, address != .any, frame.big32(38) == address.value else { return }
        sendARP(operation: 2, to: senderMAC, targetMAC: senderMAC, target: sender)
    }

    private func learn(_ address: IPv4Address, _ mac: [UInt8]) {
        for index in 0..<neighbours.count where neighbours[index].address == address {
            neighbours[index].mac = mac
            return
        }
        if neighbours.count >= Self.neighboursKept { neighbours.removeFirst() }
        neighbours.append(Neighbour(address: address, mac: mac))
    }

    private func receiveIPv4(_ frame: [UInt8]) {
        guard frame.count >= 34, frame[14] >> 4 == 4 else { return }
        let headerLength = Int(frame[14] & 0x0f) * 4
        let totalLength = Int(frame.big16(16))
        guard headerLength >= 20, totalLength >= headerLength, frame.count >= 14 + totalLength else { return }
        // No fragments.
        guard [UInt8](frame[14..<(14 + headerLength)]).checksum() == 0, frame.big16(20) & 0x3fff == 0 else { return }
        let source = IPv4Address(value: frame.big32(26))
        let destination = IPv4Address(value: frame.big32(30))
        guard destination == address || destination == .broadcast || address == .any else { return }
        let payload = [UInt8](frame[(14 + headerLength)..<(14 + totalLength)])
        switch frame[23] {
        case IPProtocol.icmp where destination == address && address != .any:
            learn(source, [UInt8](frame[6..<12]))
            receiveICMP(payload, from: source)
        case IPProtocol.tcp where destination == address && address != .any: receiveTCP(payload, from: source)
        case IPProtocol.udp: receiveUDP(payload, from: source, mac: [UInt8](frame[6..<12]), destination)
        default: break
        }
    }

    private func receiveICMP(_ payload: [UInt8], from source: IPv4Address) {
        guard payload.count >= 8, payload.checksum() == 0 else { return }
        let echoReply: UInt8 = 0
        let echoRequest: UInt8 = 8
        if payload[0] == echoRequest {
            var answer = payload
            answer[0] = echoReply
            answer.set16(0, at: 2)
            answer.set16(answer.checksum(), at: 2)
            send(IPProtocol.icmp, answer, to: source)
        } else if payload[0] == echoReply, let awaited = awaitedEcho, payload.big16(4) == awaited.identifier,
            payload.big16(6) == awaited.sequence
        {
            echoArrived = clock.now
        }
    }

    private func receiveUDP(_ payload: [UInt8], from source: IPv4Address, mac: [UInt8], _ destination: IPv4Address) {
        let length = Int(payload.big16(4))
        guard length >= 8, length <= payload.count else { return }
        let sourcePort = payload.big16(0)
        let port = payload.big16(2)
        let data = [UInt8](payload[8..<length])
        if port == Self.echoPort && destination == address && address != .any && sourcePort != Self.echoPort {
            learn(source, mac)
            send(datagram: data, from: Self.echoPort, to: source, port: sourcePort)
        } else if port == awaitedPort && port != 0 && awaitedDatagrams.count < 16 {
            awaitedDatagrams.append(data)
        }
    }

    private func receiveTCP(_ payload: [UInt8], from source: IPv4Address) {
        guard let tcp, payload.count >= 20, source == tcp.target, payload.big16(0) == tcp.port,
            payload.big16(2) == tcp.ownPort,
            payload.checksum(plus: pseudoHeader(IPProtocol.tcp, payload.count, source)) == 0
        else { return }
        tcp.receive(payload)
    }

    // MARK: Sending

    private func sendARP(operation: UInt16, to mac: [UInt8], targetMAC: [UInt8], target: IPv4Address) {
        var frame = header(to: mac, EtherType.arp)
        frame.append16(1)  // Ethernet
        frame.append16(EtherType.ipv4)
        frame += [6, 4]
        frame.append16(operation)
        frame += driver.mac
        frame.append32(address.value)
        frame += targetMAC
        frame.append32(target.value)
        driver.send(frame)
    }

    private func header(to mac: [UInt8], _ type: UInt16) -> [UInt8] {
        var frame: [UInt8] = []
        frame.reserveCapacity(1514)
        frame += mac
        frame += driver.mac
        frame.append16(type)
        return frame
    }

    /// Sends an IPv4 packet if the next hop's link address is known; otherwise asks for it and drops the packet.
    /// - Parameter checksumAt: the offset in the payload where the device puts the checksum, which contains the
    ///   pseudo-header's sum.
    private func send(_ proto: UInt8, _ payload: [UInt8], to destination: IPv4Address, checksumAt: Int? = nil) {
        let hop = destination.value & mask == address.value & mask || gateway == .any ? destination : gateway
        let mac: [UInt8]
        if destination == .broadcast {
            mac = Self.broadcastMAC
        } else if let neighbour = neighbours.first(where: { $0.address == hop }) {
            mac = neighbour.mac
        } else {
            askFor(hop)
            return
        }
        guard payload.count + 20 <= Int(driver.mtu) else { return }
        var frame = header(to: mac, EtherType.ipv4)
        frame += [0x45, 0]
        frame.append16(UInt16(20 + payload.count))
        identification &+= 1
        frame.append16(identification)
        frame.append16(0x4000)  // do not fragment
        frame += [64, proto, 0, 0]
        frame.append32(address.value)
        frame.append32(destination.value)
        frame.set16(frame.checksum(from: 14), at: 24)
        let start = frame.count
        frame += payload
        driver.send(frame, checksum: checksumAt.map { (start, $0) })
    }

    /// The sum of the pseudo-header of UDP and TCP with another host.
    private func pseudoHeader(_ proto: UInt8, _ count: Int, _ other: IPv4Address) -> UInt32 {
        var sum = UInt32(proto) + UInt32(count)
        for half in [address.value >> 16, address.value & 0xffff, other.value >> 16, other.value & 0xffff] {
            sum += half
        }
        return sum
    }

    /// Sends a TCP segment whose checksum is 0: the device fills it in if that was negotiated.
    func send(segment: [UInt8], to destination: IPv4Address) {
        let place = 16
        var segment = segment
        let pseudo = pseudoHeader(IPProtocol.tcp, segment.count, destination)
        if driver.features.contains(.checksum) {
            let none: [UInt8] = []
            segment.set16(~none.checksum(plus: pseudo), at: place)
            send(IPProtocol.tcp, segment, to: destination, checksumAt: place)
        } else {
            segment.set16(segment.checksum(plus: pseudo), at: place)
            send(IPProtocol.tcp, segment, to: destination)
        }
    }

    private func askFor(_ hop: IPv4Address) {
        sendARP(operation: 1, to: Self.broadcastMAC, targetMAC: [0, 0, 0, 0, 0, 0], target: hop)
    }

    func send(datagram: [UInt8], from port: UInt16, to destination: IPv4Address, port destinationPort: UInt16) {
        var payload: [UInt8] = []
        payload.reserveCapacity(datagram.count + 8)
        payload.append16(port)
        payload.append16(destinationPort)
        payload.append16(UInt16(truncatingIfNeeded: datagram.count + 8))
        payload.append16(0)
        payload += datagram
        let sum = payload.checksum(plus: pseudoHeader(IPProtocol.udp, payload.count, destination))
        payload.set16(sum == 0 ? 0xffff : sum, at: 6)
        send(IPProtocol.udp, payload, to: destination)
    }

    // MARK: Requests

    /// Resolves the link address of `target`, or of the gateway to it.
    func resolve(_ target: IPv4Address) -> Bool {
        let hop = target.value & mask == address.value & mask || gateway == .any ? target : gateway
        for _ in 0..<5 {
            if neighbours.contains(where: { $0.address == hop }) { return true }
            askFor(hop)
            if interrupts.wait(until: clock.now + 500 * milliseconds, { neighbours.contains { $0.address == hop } }) {
                return true
            }
        }
        return false
    }

    /// Clears the table of link addresses.
    func forgetNeighbours() { neighbours.removeAll() }

    /// Sends an ICMP echo of `size` bytes. Returns the time until its answer; nil if none came within `patience`.
    func ping(_ target: IPv4Address, sequence: UInt16, size: Int = 56, patience: Nanoseconds = seconds) -> Nanoseconds?
    {
        guard resolve(target) else { return nil }
        let identifier = UInt16(truncatingIfNeeded: driver.device.registers.value >> 12) ^ 0x5357
        var payload: [UInt8] = [8, 0, 0, 0]
        payload.append16(identifier)
        payload.append16(sequence)
        for index in 0..<size { payload.append(UInt8(truncatingIfNeeded: index)) }
        payload.set16(payload.checksum(), at: 2)
        awaitedEcho = (identifier, sequence)
        echoArrived = 0
        let start = clock.now
        send(IPProtocol.icmp, payload, to: target)
        defer { awaitedEcho = nil }
        return interrupts.wait(until: start + patience) { echoArrived != 0 } ? echoArrived - start : nil
    }

    /// Sends a datagram and waits for answers to its port until `accept` returns true for one.
    func exchange(
        _ datagram: [UInt8], from port: UInt16, to target: IPv4Address, port targetPort: UInt16, patience: Nanoseconds,
        accept: ([UInt8]) -> Bool
    ) -> Bool {
        awaitedPort = port
        awaitedDatagrams.removeAll()
        defer { awaitedPort = 0 }
        send(datagram: datagram, from: port, to: target, port: targetPort)
        return interrupts.wait(until: clock.now + patience) {
            while !awaitedDatagrams.isEmpty {
                if accept(awaitedDatagrams.removeFirst()) { return true }
            }
            return false
        }
    }
}
