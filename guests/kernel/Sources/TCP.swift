// SPDX-License-Identifier: Apache-2.0

/// An outgoing TCP connection (RFC 9293), to test a network: one segment at a time, which is sent again until it is
/// acknowledged. Segments out of order are dropped: they come again.
final class TCPConnection {
    private enum Flag {
        static let fin: UInt8 = 1
        static let syn: UInt8 = 2
        static let reset: UInt8 = 4
        static let push: UInt8 = 8
        static let acknowledgement: UInt8 = 16
    }

    private static let headerSize = 20
    private static let segmentSize = 1000
    private static let attempts = 20

    private let interface: NetworkInterface
    let target: IPv4Address
    let port: UInt16
    let ownPort: UInt16
    /// The number of the next byte to be sent, and the number of the next byte that the other side expects.
    private var next: UInt32
    private var acknowledged: UInt32
    /// The number of the next byte to be received.
    private var expected: UInt32 = 0
    private var isOpen = false
    private(set) var wasReset = false
    /// The received bytes.
    private(set) var received: [UInt8] = []

    init(_ interface: NetworkInterface, to target: IPv4Address, port: UInt16) {
        self.interface = interface
        self.target = target
        self.port = port
        ownPort = 49152 | UInt16(truncatingIfNeeded: clock.now >> 10) & 0x3fff
        next = UInt32(truncatingIfNeeded: clock.now)
        acknowledged = next
    }

    /// Connects. False if nobody answers, or the other side refuses.
    func connect() -> Bool { deliver(Flag.syn, []) && isOpen }

    /// Sends bytes and waits until they are acknowledged. False if they are not.
    func send(_ bytes: [UInt8]) -> Bool {
        var done = 0
        while done < bytes.count {
            let count = min(Self.segmentSize, bytes.count - done)
            guard deliver(Flag.acknowledgement | Flag.push, [UInt8](bytes[done..<(done + count)])) else { return false }
            done += count
        }
        return true
    }

    func close() { _ = deliver(Flag.acknowledgement | Flag.fin, []) }

    /// Sends one segment, again and again until it is acknowledged.
    private func deliver(_ flags: UInt8, _ data: [UInt8]) -> Bool {
        let first = next
        // SYN and FIN count as one byte each.
        next = first &+ UInt32(data.count) &+ (flags & (Flag.syn | Flag.fin) != 0 ? 1 : 0)
        for _ in 0..<Self.attempts where !wasReset {
            transmit(flags, data, at: first)
            if interrupts.wait(until: clock.now + 500 * milliseconds, { acknowledged == next || wasReset }) { break }
        }
        return acknowledged == next && !wasReset
    }

    private func transmit(_ flags: UInt8, _ data: [UInt8], at sequence: UInt32) {
        var segment: [UInt8] = []
        segment.reserveCapacity(Self.headerSize + data.count)
        segment.append16(ownPort)
        segment.append16(port)
        segment.append32(sequence)
        segment.append32(flags & Flag.acknowledgement != 0 ? expected : 0)
        segment.append(UInt8(Self.headerSize / 4) << 4)
        segment.append(flags)
        segment.append16(0x7fff)
        segment.append32(0)  // checksum, urgent pointer
        segment += data
        interface.send(segment: segment, to: target)
    }

    /// Handles a segment from the other side, whose checksum was verified.
    func receive(_ segment: [UInt8]) {
        let header = Int(segment[12] >> 4) * 4, flags = segment[13]
        guard header >= Self.headerSize, header <= segment.count else { return }
        let sequence = segment.big32(4), acknowledgement = segment.big32(8)
        if flags & Flag.reset != 0 {
            wasReset = true
            return
        }
        guard flags & Flag.acknowledgement != 0 else { return }
        if !isOpen {
            guard flags & Flag.syn != 0, acknowledgement == next else { return }
            isOpen = true
            expected = sequence &+ 1
        }
        if acknowledgement == next { acknowledged = next }
        let data = [UInt8](segment[header...])
        if sequence == expected {
            received += data
            expected = expected &+ UInt32(data.count) &+ (flags & Flag.fin != 0 ? 1 : 0)
        }
        if !data.isEmpty || flags & (Flag.syn | Flag.fin) != 0 { transmit(Flag.acknowledgement, [], at: next) }
    }
}

extension NetworkInterface {
    /// Sends bytes to an echo server.
    /// - Returns: how many came back unchanged.
    func exchange(bytes: [UInt8], with target: IPv4Address, port: UInt16) throws(Failure) -> Int {
        guard resolve(target) else { throw Failure("\(target.text): no reply to ARP") }
        let connection = TCPConnection(self, to: target, port: port)
        tcp = connection
        defer { tcp = nil }
        guard connection.connect() else {
            throw Failure(
                "\(target.text): \(connection.wasReset ? "the connection was refused" : "no reply from TCP port" as StaticString) \(port)"
            )
        }
        guard connection.send(bytes) else { throw Failure("\(target.text): the data was not acknowledged") }
        _ = interrupts.wait(
            until: clock.now + 10 * seconds, { connection.received.count >= bytes.count || connection.wasReset })
        connection.close()
        var same = 0
        while same < min(bytes.count, connection.received.count), bytes[same] == connection.received[same] { same += 1 }
        return same
    }
}
