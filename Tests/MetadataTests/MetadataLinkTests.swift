// SPDX-License-Identifier: Apache-2.0

@testable import Metadata
import TestSupport
import Testing

/// ARP and TCP, by frames.
@Suite(.timed) struct MetadataLinkTests {
    private let request = "GET /a HTTP/1.1\r\n\r\n"

    private func arp(_ target: UInt32 = MetadataEndpoint.defaultAddress, operation: UInt16 = 1) -> [UInt8] {
        var frame: [UInt8] = []
        frame.append(address: 0xffff_ffff_ffff)
        frame.append(address: Guest.hardware)
        for half in [0x0806, 1, 0x0800, 0x0604, operation] { frame.append(half: half) }
        frame.append(address: Guest.hardware)
        frame.append(word: Guest.address)
        frame.append(address: 0)
        frame.append(word: target)
        return frame
    }

    @Test func addressesAreResolved() throws {
        let guest = try Guest()
        #expect(guest.send(arp()))
        let reply = FrameBytes(bytes: try #require(guest.receive())[...])
        #expect(reply.address(0) == Guest.hardware && reply.address(6) == MetadataEndpoint.hardware)
        #expect(reply.half(20) == 2 && reply.address(22) == MetadataEndpoint.hardware && reply.word(28) == 0xa9fe_a9fe)
        #expect(reply.address(32) == Guest.hardware && reply.word(38) == Guest.address && reply.count == 42)
        for frame in [arp(0xa9fe_a9fd), arp(operation: 2), Array(arp().dropLast()), [], [1]] {
            #expect(!guest.send(frame) && guest.receive() == nil)
        }
        // Of more than can be answered the rest is dropped.
        for _ in 0..<1000 { guest.send(arp()) }
        var count = 0
        while guest.receive() != nil { count += 1 }
        #expect(count == 32)
    }

    @Test func whatIsNoSegmentIsIgnored() throws {
        let guest = try Guest()
        let good = Guest.frame(Segment.syn)
        for (place, value) in [
            (12, 0x86), (14, 0x65), (14, 0x44), (14, 0x4f), (20, 0x20), (21, 1), (23, 17), (17, 90), (17, 19),
            (46, 0x40), (46, 0xf0),
        ] as [(Int, UInt8)] {
            var frame = good
            frame[place] = value
            guest.send(frame)
            #expect(guest.connectionCount == 0 && guest.receive() == nil, "\(place)")
        }
        for count in 0..<good.count { #expect(!guest.send(Array(good.prefix(count)))) }
        #expect(!guest.send(Guest.frame(Segment.syn, target: 1)))
        #expect(guest.send(good + [0, 0, 0, 0, 0, 0]) && guest.connectionCount == 1)
    }

    @Test func aSegmentWithoutAConnectionIsReset() throws {
        let guest = try Guest()
        guest.send(Guest.frame(Segment.ack, sequence: 5, acknowledgment: 77))
        var reset = try guest.segment()
        #expect(reset.flags == Segment.rst && reset.sequence == 77)
        guest.send(Guest.frame(to: 443, Segment.syn, sequence: 5))
        reset = try guest.segment()
        #expect(reset.flags == Segment.rst | Segment.ack && reset.sequence == 0 && reset.acknowledgment == 6)
        #expect(reset.sourcePort == 443 && reset.targetPort == 40_000)
        guest.send(Guest.frame(Segment.fin | Segment.push, sequence: 5, [1, 2]))
        #expect(try guest.segment().acknowledgment == 8)
        guest.send(Guest.frame(Segment.rst, sequence: 5))
        guest.send(Guest.frame(Segment.rst | Segment.ack, sequence: 5))
        #expect(guest.receive() == nil && guest.connectionCount == 0)
    }

    @Test func aHandshakeIsChecked() throws {
        let guest = try Guest()
        guest.send(Guest.frame(Segment.syn, sequence: 9))
        let first = try guest.segment()
        // The answer was lost: the same again, at once and after a while.
        guest.send(Guest.frame(Segment.syn, sequence: 9))
        #expect(try guest.segment() == first)
        #expect(guest.receive() == nil)
        guest.expire()
        #expect(try guest.segment() == first)
        // Neither another SYN nor the acknowledgment of something else opens it.
        guest.send(Guest.frame(Segment.ack, sequence: 10, acknowledgment: first.sequence))
        #expect(try guest.segment().has(Segment.rst))
        #expect(guest.connectionCount == 0)
        guest.send(Guest.frame(Segment.syn, sequence: 9))
        let second = try guest.segment()
        guest.send(Guest.frame(Segment.rst, sequence: 10 + 9000))
        #expect(guest.connectionCount == 1)
        guest.send(Guest.frame(Segment.ack, sequence: 10, acknowledgment: second.sequence &+ 1))
        guest.send(Guest.frame(Segment.syn, sequence: 500))
        #expect(try guest.segment().flags == Segment.ack)
        guest.send(Guest.frame(Segment.rst, sequence: 10))
        #expect(guest.connectionCount == 0 && guest.receive() == nil)
    }

    /// In order only: what comes before a gap is filled is sent again; what comes twice counts once.
    @Test func dataIsTakenInOrder() throws {
        let guest = try Guest("{\"a\":\"b\"}"), stream = try guest.open()
        let bytes = Array(request.utf8)
        stream.acknowledge(0, Array(bytes[8...]), at: 8)
        var answer = try guest.segment()
        #expect(answer.acknowledgment == 1001 && answer.payload.isEmpty)
        stream.acknowledge(0, Array(bytes[..<10]))
        stream.acknowledge(0, Array(bytes[..<4]))
        stream.acknowledge(0, Array(bytes[2..<12]), at: 2)
        answer = try guest.segment()
        #expect(answer.acknowledgment == 1001 + 12)
        // Far outside.
        stream.acknowledge(0, [1], at: 0x7fff_0000)
        stream.acknowledge(0, [1], at: 0x8000_0000)
        #expect(try guest.segment().acknowledgment == 1001 + 12)
        stream.acknowledge(0, Array(bytes[10...]), at: 10)
        stream.sequence &+= UInt32(bytes.count)
        #expect(try stream.read().hasSuffix("\r\n\r\nb"))
    }

    @Test func segmentsAreAsLongAsTheGuestTakes() throws {
        let long = String(repeating: "0123456789", count: 4000)
        let guest = try Guest("{\"a\":\"\(long)\"}"), stream = try guest.open(window: 1000, segmentSize: 300)
        let start = stream.expected
        var data: [UInt8] = [], largest = 0
        /// Takes what comes in order, and acknowledges it.
        func take() throws {
            let before = data.count
            while let frame = guest.receive() {
                let segment = try #require(Segment(FrameBytes(bytes: frame[...])))
                let offset = Int(segment.sequence &- start)
                try #require(offset <= data.count)
                data.replaceSubrange(min(offset, data.count)..., with: segment.payload)
                largest = max(largest, segment.payload.count)
            }
            #expect(data.count - before <= 1000)
            stream.expected = start &+ UInt32(data.count)
            stream.acknowledge()
        }
        stream.write(request)
        var rounds = 0
        while !data.suffix(long.utf8.count).elementsEqual(long.utf8), rounds < 200 {
            rounds += 1
            try take()
            guard rounds == 20 else { continue }
            // No room: a byte is tried from time to time, and dropped; then it goes on where it was.
            stream.window = 0
            stream.acknowledge()
            #expect(guest.receive() == nil)
            var probes = 0
            for _ in 0..<6 {
                guest.expire()
                while let frame = guest.receive() { probes += frame.count - 54 }
            }
            #expect(probes >= 2 && probes <= 6)
            stream.window = 1000
            stream.acknowledge()
            guest.expire()
        }
        #expect(largest == 300 && rounds < 200)
    }

    @Test func whatIsLostIsSentAgain() throws {
        let long = String(repeating: "x", count: 3000)
        let guest = try Guest("{\"a\":\"\(long)\"}"), stream = try guest.open()
        stream.write(request)
        var first: [Segment] = []
        while let frame = guest.receive() { first.append(try #require(Segment(FrameBytes(bytes: frame[...])))) }
        #expect(first.count == 3 && first[0].payload.count == 1460)
        let start = guest.now
        guest.expire()
        #expect(guest.now - start == 500)
        var second: [Segment] = []
        while let frame = guest.receive() { second.append(try #require(Segment(FrameBytes(bytes: frame[...])))) }
        #expect(first == second)
        // A part of it has come.
        stream.expected &+= 1460
        stream.acknowledge()
        #expect(guest.receive() == nil)
        guest.expire()
        #expect(try guest.segment().sequence == first[1].sequence)
        // Nobody hears it any more.
        var resets = 0, steps = 0
        while guest.connectionCount > 0, steps < 100 {
            guest.expire()
            while guest.receive() != nil {}
            steps += 1
        }
        while let frame = guest.receive() {
            if try #require(Segment(FrameBytes(bytes: frame[...]))).has(Segment.rst) { resets += 1 }
        }
        #expect(guest.connectionCount == 0 && steps <= 9 && resets <= 1)
    }

    /// An acknowledgment of what was never sent is answered, and has no effect.
    @Test func acknowledgmentsAreChecked() throws {
        let guest = try Guest("{\"a\":\"b\"}"), stream = try guest.open()
        let expected = stream.expected
        stream.expected &+= 5
        stream.write(request)
        #expect(try guest.segment().payload.isEmpty)
        stream.expected = expected
        stream.sequence &-= UInt32(request.utf8.count)
        stream.write(request)
        #expect(try stream.read().hasSuffix("b"))
        stream.expected &-= 50
        stream.acknowledge()
        #expect(guest.receive() == nil && guest.connectionCount == 1)
    }

    @Test func eitherSideCloses() throws {
        let guest = try Guest("{\"a\":\"b\"}")
        // The guest with its request.
        var stream = try guest.open()
        stream.acknowledge(Segment.fin | Segment.push, Array(request.utf8))
        stream.sequence &+= UInt32(request.utf8.count) + 1
        #expect(try stream.read().hasSuffix("b"))
        #expect(stream.isClosedByPeer && guest.connectionCount == 0)
        // Without one, and the last acknowledgment is lost.
        stream = try guest.open()
        stream.acknowledge(Segment.fin)
        let fin = try guest.segment()
        #expect(fin.flags == Segment.fin | Segment.ack && fin.acknowledgment == 1002)
        guest.expire()
        #expect(try guest.segment() == fin)
        stream.sequence &+= 1
        stream.expected &+= 1
        stream.acknowledge()
        #expect(guest.connectionCount == 0 && guest.receive() == nil)
        // HTTP/1.0: the other side first.
        stream = try guest.open()
        stream.write("GET /a HTTP/1.0\r\n\r\n")
        #expect(try stream.read().hasSuffix("b"))
        #expect(stream.isClosedByPeer && guest.connectionCount == 1)
        stream.close()
        #expect(guest.connectionCount == 0)
    }

    @Test func connectionsAreBounded() throws {
        let guest = try Guest("{\"a\":\"b\"}")
        for port in 1...30 as ClosedRange<UInt16> { _ = try guest.open(port: port) }
        guest.send(Guest.frame(port: 31, Segment.syn, sequence: 1))
        #expect(try guest.segment().has(Segment.rst))
        guest.now += 20_000
        _ = try guest.open(port: 32)
        #expect(guest.connectionCount == 30)
        for port in 33...60 as ClosedRange<UInt16> { #expect(try guest.ask(request, port: port).hasSuffix("b")) }
    }

    @Test func requestsAreBounded() throws {
        let guest = try Guest(), stream = try guest.open()
        for _ in 0..<8 { stream.acknowledge(0, [UInt8](repeating: 0x41, count: 1024)); stream.sequence &+= 1024 }
        var segment = try guest.segment()
        while !segment.has(Segment.rst) { segment = try guest.segment() }
        #expect(guest.connectionCount == 0)
    }
}
