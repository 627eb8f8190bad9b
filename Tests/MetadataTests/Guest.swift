// SPDX-License-Identifier: Apache-2.0

@testable import Metadata
import Testing

/// A guest's end of a link: frames made by hand, and those that come back, whose checksums are checked.
final class Guest {
    static let hardware: UInt64 = 0x5254_0012_3456
    static let address: UInt32 = 0xa9fe_0001

    let store: MetadataStore
    private var endpoint: MetadataEndpoint
    var now: UInt64 = 1_000_000

    init(_ text: String = "{}", version: MetadataStore.Version = .v1) throws {
        store = MetadataStore(version: version)
        try store.put(MetadataValue(parsing: Array(text.utf8)))
        endpoint = MetadataEndpoint(store)
    }

    var connectionCount: Int { endpoint.connectionCount }
    var deadline: UInt64? { endpoint.deadline(now: now) }
    @discardableResult func send(_ frame: [UInt8]) -> Bool { endpoint.receive(frame[...], now: now) }
    func receive() -> [UInt8]? { endpoint.nextFrame(now: now) }
    /// Lets the next timer expire.
    func expire() {
        now = max(now, deadline ?? now)
        endpoint.expire(now: now)
    }

    static func frame(
        port: UInt16 = 40_000, to targetPort: UInt16 = 80, _ flags: UInt8, sequence: UInt32 = 0,
        acknowledgment: UInt32 = 0, window: UInt16 = 65_535, options: [UInt8] = [], _ payload: [UInt8] = [],
        target: UInt32 = MetadataEndpoint.defaultAddress
    ) -> [UInt8] {
        var frame: [UInt8] = []
        frame.append(address: MetadataEndpoint.hardware)
        frame.append(address: hardware)
        frame.append(half: 0x0800)
        frame.append(half: 0x4500)
        frame.append(half: UInt16(40 + options.count + payload.count))
        frame.append(word: 0x4000)
        frame.append(word: 0x4006_0000)
        frame.append(word: address)
        frame.append(word: target)
        frame.append(half: port)
        frame.append(half: targetPort)
        frame.append(word: sequence)
        frame.append(word: acknowledgment)
        frame += [UInt8(20 + options.count) << 2, flags]
        frame.append(half: window)
        frame.append(word: 0)
        return frame + options + payload
    }

    /// The next segment for the guest.
    func segment(sourceLocation: SourceLocation = #_sourceLocation) throws -> Segment {
        let frame = try #require(receive(), sourceLocation: sourceLocation)
        let segment = try #require(Segment(FrameBytes(bytes: frame[...])), sourceLocation: sourceLocation)
        #expect(ReplySegment.checksum(frame[14..<34]) == 0, sourceLocation: sourceLocation)
        let pseudo = frame[26..<34] + [0, 6, UInt8((frame.count - 34) >> 8), UInt8((frame.count - 34) & 0xff)]
        #expect(ReplySegment.checksum(Array(pseudo)[...] + frame[34...]) == 0, sourceLocation: sourceLocation)
        #expect(FrameBytes(bytes: frame[...]).address(0) == Self.hardware, sourceLocation: sourceLocation)
        #expect(segment.target == Self.address && segment.source == MetadataEndpoint.defaultAddress)
        return segment
    }

    /// A connection that is open.
    func open(port: UInt16 = 40_000, window: UInt16 = 65_535, segmentSize: UInt16 = 1460) throws -> Stream {
        send(
            Self.frame(
                port: port, Segment.syn, sequence: 1000, window: window,
                options: [2, 4, UInt8(segmentSize >> 8), UInt8(segmentSize & 0xff)]))
        let answer = try segment()
        #expect(answer.flags == Segment.syn | Segment.ack && answer.acknowledgment == 1001)
        #expect(answer.maximumSegment == 1460 && answer.window == 8192)
        let stream = Stream(self, port: port, expected: answer.sequence &+ 1, window: window)
        stream.acknowledge()
        #expect(receive() == nil)
        return stream
    }

    /// The response to one request, on a connection of its own.
    func ask(_ request: String, port: UInt16 = 40_000) throws -> String {
        let stream = try open(port: port)
        stream.write(request)
        let response = try stream.read()
        stream.close()
        return response
    }
}

/// The guest's side of a connection.
final class Stream {
    private let guest: Guest
    let port: UInt16
    var sequence: UInt32 = 1001
    var expected: UInt32
    var window: UInt16
    private(set) var isClosedByPeer = false

    init(_ guest: Guest, port: UInt16, expected: UInt32, window: UInt16) {
        (self.guest, self.port, self.expected, self.window) = (guest, port, expected, window)
    }

    func acknowledge(_ flags: UInt8 = 0, _ payload: [UInt8] = [], at offset: UInt32 = 0) {
        guest.send(
            Guest.frame(
                port: port, Segment.ack | flags, sequence: sequence &+ offset, acknowledgment: expected,
                window: window, payload))
    }

    func write(_ text: String) {
        acknowledge(Segment.push, Array(text.utf8))
        sequence &+= UInt32(text.utf8.count)
    }

    /// All that comes, each segment acknowledged.
    func read() throws -> String {
        var bytes: [UInt8] = []
        while let frame = guest.receive() {
            let segment = try #require(Segment(FrameBytes(bytes: frame[...])))
            #expect(!segment.has(Segment.rst) && segment.sequence == expected)
            bytes += segment.payload
            expected &+= segment.length
            if segment.has(Segment.fin) { isClosedByPeer = true }
            if segment.length > 0 { acknowledge() }
        }
        return String(decoding: bytes, as: UTF8.self)
    }

    func close() {
        acknowledge(Segment.fin)
        sequence &+= 1
        _ = try? read()
    }
}
