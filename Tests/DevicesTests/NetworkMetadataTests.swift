// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import Metadata
import TestSupport
import Testing
import Virtio

@testable import Devices

/// A card with metadata: what a driver sends to its address comes back, and nothing of it is on the wire.
@Suite(.timed) struct NetworkMetadataTests {
    private let driver: NetworkDriver
    private let wire: Wire

    init() throws {
        let store = MetadataStore()
        try store.put(MetadataValue(parsing: Array("{\"a\":\"the value\"}".utf8)))
        (driver, wire) = try Wire.make(metadata: MetadataService(store))
    }

    private func words(_ numbers: [Int]) -> [UInt8] {
        numbers.flatMap { [UInt8($0 >> 8 & 0xff), UInt8($0 & 0xff)] }
    }
    private let guest: [UInt8] = [0x52, 0x54, 0, 0, 0, 2], guestAddress: [UInt8] = [169, 254, 0, 1]
    private let service: [UInt8] = [169, 254, 169, 254]

    private var request: [UInt8] {
        [UInt8](repeating: 0xff, count: 6) + guest + words([0x0806, 1, 0x0800, 0x0604, 1]) + guest + guestAddress
            + [0, 0, 0, 0, 0, 0] + service
    }

    private func segment(
        _ flags: UInt8, _ sequence: UInt8, _ acknowledgment: [UInt8], _ payload: [UInt8] = []
    ) -> [UInt8] {
        [6, 1, 0x23, 0x45, 0x67, 1] + guest + words([0x0800, 0x4500, 40 + payload.count, 0, 0x4000, 0x4006, 0])
            + guestAddress + service + words([40_000, 80, 0, Int(sequence)]) + acknowledgment + [0x50, flags]
            + words([0xffff, 0, 0]) + payload
    }

    private func offer() throws {
        for index in 0..<64 as Range<UInt64> {
            try driver.offerBuffer(at: NetworkDriver.buffers + index * 0x1000, [2048])
        }
        driver.kick(NetworkDriver.receive)
    }

    /// The next frame that the driver gets.
    private func received() throws -> [UInt8] {
        let (head, written) = try driver.used(NetworkDriver.receive)
        let bytes = try driver.bytes(NetworkDriver.buffers + UInt64(head) * 0x1000, written)
        #expect(bytes.prefix(10).allSatisfy { $0 == 0 } && bytes.count >= 12 + 42)
        return Array(bytes.dropFirst(12))
    }

    @Test(arguments: [[], .mergeableBuffers] as [FeatureSet]) func aRequestIsAnswered(_ features: FeatureSet) throws {
        try driver.start(features)
        try offer()
        try driver.sendAndWait(plainHeader + request)
        let reply = try received()
        #expect(Array(reply[6..<12]) == [6, 1, 0x23, 0x45, 0x67, 1] && Array(reply[28..<32]) == service)
        // In pieces of any length.
        try driver.sendAndWait(plainHeader + segment(2, 9, [0, 0, 0, 0]), cut: [5, 14, 13, 1])
        let answer = try received()
        #expect(answer[47] == 0x12)
        // It was not acknowledged: once more.
        #expect(try received() == answer)
        let next =
            (UInt32(answer[38]) << 24 | UInt32(answer[39]) << 16 | UInt32(answer[40]) << 8 | UInt32(answer[41])) &+ 1
        let text = Array("GET /a HTTP/1.0\r\n\r\n".utf8)
        try driver.sendAndWait(
            plainHeader + segment(0x18, 10, (0..<4).map { UInt8(truncatingIfNeeded: next >> (24 - 8 * $0)) }, text))
        let response = String(decoding: try received().dropFirst(54), as: UTF8.self)
        #expect(response.hasPrefix("HTTP/1.0 200 OK\r\n") && response.hasSuffix("\r\n\r\nthe value"))
        // None of that was on the wire, where other frames are, and frames of the wire still come.
        #expect(!wire.waitForFrame(milliseconds: 0))
        let other = request.dropLast() + [253]
        try driver.sendAndWait(plainHeader + other)
        #expect(try Array(wire.next().dropFirst(12)) == Array(other))
        try wire.send(plainHeader + frame(600))
        var frames = try received()
        while frames[12] == 8 { frames = try received() }
        #expect(frames == frame(600))
        #expect(driver.device.counters.sendDrops == 0 && driver.lines.all.isEmpty)
    }

    /// A driver without buffers gets its answer when it has some; another driver knows nothing of it.
    @Test func answersWaitForBuffers() throws {
        try driver.start()
        try driver.sendAndWait(plainHeader + request)
        try driver.sendAndWait(plainHeader + request)
        try offer()
        #expect(try received().count == 42 && received().count == 42)
        try driver.start()
        try driver.sendAndWait(plainHeader + request)
        try driver.start()
        try offer()
        try wire.send(plainHeader + frame(100))
        #expect(try received() == frame(100))
    }
}
