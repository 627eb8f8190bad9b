// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import HostNetwork
import Linux
import TestSupport
import Testing
import Virtio

@testable import Devices

/// A card with several pairs of queues, each with its own thread (virtio 1.2 §5.1.2, §5.1.6.5.5).
@Suite(.timed) struct NetworkMultiqueueTests {
    static let features: FeatureSet = [.controlQueue, .networkMultiqueue, .ringReset, .mergeableBuffers]
    static let pairs = 3
    static let control = 2 * pairs
    static let sizes = [UInt16](repeating: 256, count: control) + [64]

    private let driver: NetworkDriver
    private let wires: [Wire]

    init() throws { (driver, wires) = try Wire.make(pairs: Self.pairs) }

    private func start(omitting: Set<Int> = [], prepare: (NetworkDriver) throws -> Void = { _ in }) throws {
        try driver.start(Self.features, sizes: Self.sizes, omitting: omitting, prepare: prepare)
    }

    private static func setPairs(_ count: UInt16) -> [UInt8] { [4, 0, UInt8(count & 0xff), UInt8(count >> 8)] }

    private func use(_ count: UInt16) throws -> Bool {
        try driver.command(Self.setPairs(count), queue: Self.control) == 0
    }

    /// Buffers of its own in each receive queue.
    private func offerBuffers(_ pairs: Range<Int> = 0..<pairs, count: Int = 8) throws {
        for pair in pairs {
            for slot in 0..<count {
                try driver.offerBuffer(
                    at: NetworkDriver.buffers + UInt64(pair * 64 + slot) * 0x1000, [2048], queue: 2 * pair)
            }
            driver.kick(2 * pair)
        }
    }

    /// A frame from the host comes to the guest in the pair's queue.
    private func expectReceives(_ pair: Int, seed: Int = 0) throws {
        try wires[pair].send(plainHeader + frame(60 + pair, seed: seed))
        #expect(try driver.used(2 * pair).written == 72 + pair)
    }

    /// What the host has for a pair stays there: its thread has had a turn meanwhile.
    private func expectIsSilent(_ pair: Int) throws {
        try driver.sendAndWait(plainHeader + frame(60), queue: 2 * pair + 1)
        #expect(try wires[pair].next().count == 72)
        #expect(try !driver.hasUsed(2 * pair))
    }

    @Test func theDeviceSaysHowManyItHas() throws {
        #expect(driver.offered.contains(.networkMultiqueue) && driver.configuration(8, 2) == 3)
        let sizes = (0..<8 as Range<UInt32>).map { queue in
            driver.write(queue, 0x030)
            return driver.read(0x034)
        }
        #expect(sizes == [256, 256, 256, 256, 256, 256, 64, 0])
        #expect(!driver.negotiate(.networkMultiqueue) && driver.negotiate([.networkMultiqueue, .controlQueue]))
        let (one, _) = try Wire.make()
        #expect(!one.offered.contains(.networkMultiqueue) && one.configuration(8, 2) == 1)
    }

    /// §5.1.2: the control queue is where the second pair would be.
    @Test func withoutMultiqueueTheDriverHasOnePair() throws {
        try driver.start([.controlQueue, .controlReceiveMode], sizes: [256, 256, 256])
        try offerBuffers(0..<1)
        #expect(try driver.command([0, 0, 1]) == 0)
        #expect(try driver.command(Self.setPairs(2)) == 1)
        try expectReceives(0)
        try driver.sendAndWait(plainHeader + frame(60))
        #expect(try wires[0].next().count == 72)
        #expect(driver.device.queuePairs == (3, 1))
    }

    @Test func eachPairReceivesFromItsCommandOn() throws {
        try start()
        try offerBuffers()
        try expectReceives(0)
        try wires[1].send(plainHeader + frame(61))
        try expectIsSilent(1)
        #expect(try use(3))
        #expect(try driver.used(2).written == 73)
        for round in 0..<3 { for pair in 0..<Self.pairs { try expectReceives(pair, seed: round) } }
        #expect(try use(1))
        try wires[2].send(plainHeader + frame(62))
        try expectIsSilent(2)
        try expectReceives(0)
        #expect(try use(2))
        try expectReceives(1)
        #expect(driver.device.queuePairs == (3, 2))
        let counters = driver.device.counters
        #expect(counters.pairs.map({ $0.receivedFrames.value }) == [5, 5, 3] && counters.receivedFrames == 13)
        #expect(counters.pairs.map({ $0.sentFrames.value }) == [0, 1, 1] && counters.sentBytes == 120)
    }

    /// Answered with an error; the pairs are what they were.
    @Test func wrongNumbersOfPairsAreRefused() throws {
        try start()
        try offerBuffers()
        #expect(try use(2))
        for bad: UInt16 in [0, 4, 0x8000, 0x8001, 0xffff] { #expect(try !use(bad), "\(bad)") }
        for bad in [[4, 0], [4, 0, 1], [4, 0, 1, 0, 0], [4, 1, 1, 0], [4, 255, 1, 0]] as [[UInt8]] {
            #expect(try driver.command(bad, queue: Self.control) == 1, "\(bad)")
        }
        for pair in 0..<2 { try expectReceives(pair) }
        try expectIsSilent(2)
        #expect(driver.device.queuePairs == (3, 2) && !driver.status.contains(.needsReset))
    }

    /// A command that waits in the queue when the driver becomes ready is served when all pairs are.
    @Test func aCommandBeforeDRIVEROKIsServedAfterIt() throws {
        for _ in 0..<20 {
            try start { driver in
                _ = try driver.offerCommand(Self.setPairs(3), queue: Self.control)
                driver.kick(Self.control)
            }
            #expect(try driver.used(Self.control).written == 1)
            try offerBuffers()
            for pair in 0..<Self.pairs { try expectReceives(pair) }
        }
    }

    /// Frames would be given to nobody.
    @Test func pairsWithoutAQueueAreRefused() throws {
        try start(omitting: [4])
        try offerBuffers()
        #expect(try !use(3) && driver.device.queuePairs.inUse == 1)
        try expectIsSilent(1)
        #expect(try use(2))
        try expectReceives(1)
        driver.setUp(4)
        driver.kick(4)
        #expect(try use(3))
        try expectReceives(2)
    }

    @Test func aQueueIsResetByItself() throws {
        try start()
        try offerBuffers()
        #expect(try use(3))
        for queue in 0..<Self.control {
            try driver.restart(queue)
            let pair = queue / 2
            if queue % 2 == 0 { try offerBuffers(pair..<pair + 1) }
            for pair in 0..<Self.pairs { try expectReceives(pair) }
            try driver.sendAndWait(plainHeader + frame(60), queue: 2 * pair + 1)
            #expect(try wires[pair].next().count == 72)
        }
        try driver.restart(Self.control)
        #expect(try use(1) && use(2))
        try expectReceives(1)
    }

    @Test func aResetLeavesOnePair() throws {
        try start()
        #expect(try use(3))
        try start()
        #expect(driver.device.queuePairs.inUse == 1)
        try offerBuffers()
        try expectReceives(0)
        try wires[1].send(plainHeader + frame(60))
        try expectIsSilent(1)
    }

    /// Commands while frames come and go; what a pair held in a queue that was switched off is its driver's again after
    /// a reset.
    @Test func pairsAreSwitchedUnderTraffic() throws {
        for _ in 0..<3 {
            try start()
            try offerBuffers(count: 60)
            for round in 0..<40 {
                for pair in 0..<Self.pairs {
                    try wires[pair].send(plainHeader + frame(60 + pair))
                    try driver.send(
                        plainHeader + frame(60), at: NetworkDriver.buffers + 0x20_0000 + UInt64(pair) * 0x1000,
                        queue: 2 * pair + 1)
                }
                #expect(try use(UInt16(1 + round % 3)))
                for pair in 0..<Self.pairs { #expect(try wires[pair].next().count == 72) }
            }
            #expect(try use(3))
            for pair in 0..<Self.pairs { for _ in 0..<40 { #expect(try driver.used(2 * pair).written == 72 + pair) } }
        }
        #expect(!driver.status.contains(.needsReset))
    }

    @Test func aPauseHoldsAllPairs() throws {
        try start()
        try offerBuffers()
        #expect(try use(2))
        let quiet = try EventFD()
        driver.device.pause { quiet.signal() }
        quiet.wait()
        for pair in 0..<2 { try wires[pair].send(plainHeader + frame(60 + pair)) }
        _ = try driver.offerCommand(Self.setPairs(3), queue: Self.control)
        driver.kick(Self.control)
        for queue in [0, 2, Self.control] { #expect(try !driver.hasUsed(queue)) }
        driver.device.resume()
        for pair in 0..<2 { #expect(try driver.used(2 * pair).written == 72 + pair) }
        #expect(try driver.used(Self.control).written == 1)
        try expectReceives(2)
    }

    @Test func thePulledCableIsEveryPairs() throws {
        try start()
        try offerBuffers()
        #expect(try use(2))
        driver.device.port.setLink(up: false, because: "says a test")
        try wires[1].send(plainHeader + frame(60))
        try wait { driver.device.counters.receiveLinkDown.value == 1 }
        try driver.sendAndWait(plainHeader + frame(60), queue: 3)
        #expect(driver.device.counters.sendLinkDown.value == 1)
        driver.device.port.setLink(up: true, because: "says a test")
        try expectReceives(1)
    }

    /// One pair's broken rule is the device's.
    @Test func aBrokenRuleInOnePairNeedsAReset() throws {
        try start()
        try offerBuffers()
        #expect(try use(3))
        let queue = driver.queues[4]
        try driver.memory.ram.write(UInt16(0x7fff), at: GuestAddress(queue.available + 2))
        driver.kick(4)
        // The buffers that it has taken suffice for these, but not for one more.
        for _ in 0..<9 { try wires[2].send(plainHeader + frame(60)) }
        try wait { driver.status.contains(.needsReset) }
        try start()
        try offerBuffers()
        #expect(try use(3))
        for pair in 0..<Self.pairs { try expectReceives(pair) }
    }
}
