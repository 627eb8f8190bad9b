// SPDX-License-Identifier: Apache-2.0

@testable import Devices
import GuestMemory
import Linux
import TestSupport
import Testing
@testable import Virtio

/// A driver of an entropy device.
private final class EntropyDriver: QueueDriver {
    private var heads: [UInt32] = []

    init(_ limit: EntropyLimit? = nil) throws {
        try super.init(driving: EntropyDevice(name: "rng0", limit: limit), features: .version1)
    }

    func start() throws {
        heads = []
        try start(.version1)
    }

    /// Puts a chain on the available ring.
    func offer(_ buffers: [(address: UInt64, length: Int, isWritable: Bool)]) throws {
        heads.append(
            try offer(buffers.map { Buffer(address: $0.address, length: $0.length, isWritable: $0.isWritable) }))
    }

    /// Waits until all that was offered has come back; the used lengths, in that order.
    func waitForAll() throws -> [UInt32] {
        try wait(for: heads.count)
        defer { heads = [] }
        return heads.map { written[$0] ?? .max }
    }

    var usedIndex: UInt16 { get throws { try ram.readUInt16(at: Self.used &+ 2) } }

    /// One request of one buffer, filled with a mark before; what was written and the bytes there.
    func request(_ length: Int) throws -> (used: UInt32, bytes: [UInt8]) {
        try ram.fill(at: GuestAddress(Self.data), count: UInt64(length), with: 0xee)
        try offer([(Self.data, length, true)])
        kick()
        let used = try #require(try waitForAll().last)
        return (used, try ram.readBytes(at: GuestAddress(Self.data), count: length))
    }
}

@Suite(.timed) struct EntropyDeviceTests {
    @Test func isAnEntropyDeviceWithOneQueue() throws {
        let driver = try EntropyDriver()
        #expect(driver.read(0x008) == 4)
        #expect(driver.read(0x034) == 64)
        driver.write(0x030, 1)
        #expect(driver.read(0x034) == 0)
        // There is no configuration space.
        #expect(driver.read(0x100) == .max)
    }

    @Test func fillsWhatIsOffered() throws {
        let driver = try EntropyDriver()
        let first = try driver.request(4096), second = try driver.request(4096)
        #expect(first.used == 4096 && second.used == 4096)
        #expect(first.bytes != second.bytes)
        // Of 4096 random bytes each value is there, but with a chance of 3 in 100,000; with all of one kind never.
        #expect(Set(first.bytes).count > 200)
        #expect(
            driver.transport.function.counters.requests.value == 2
                && driver.transport.function.counters.errors.value == 0)
    }

    @Test func aChainOfManyBuffersIsFilledToItsEnd() throws {
        let driver = try EntropyDriver()
        try driver.ram.fill(at: GuestAddress(EntropyDriver.data), count: 0x5000)
        try driver.offer((0..<5).map { (EntropyDriver.data + UInt64($0) * 0x1000, 64, true) })
        driver.kick()
        #expect(try driver.waitForAll() == [320])
        for index in 0..<5 as Range<UInt64> {
            let bytes = try driver.ram.readBytes(at: GuestAddress(EntropyDriver.data + index * 0x1000), count: 128)
            #expect(Set(bytes[..<64]).count > 8 && bytes[64...].allSatisfy { $0 == 0 })
        }
    }

    @Test func aLargeRequestGetsAPart() throws {
        let driver = try EntropyDriver()
        let (used, bytes) = try driver.request(1 << 20)
        #expect(used == 64 << 10)
        #expect(bytes[Int(used)...].allSatisfy { $0 == 0xee })
    }

    @Test func whatIsReadableIsLeftAlone() throws {
        let driver = try EntropyDriver()
        let before = try driver.ram.readBytes(at: GuestAddress(EntropyDriver.data), count: 64)
        // §5.4.6.1 forbids the first two; they come back, with nothing or with what is writable of them filled.
        try driver.offer([(EntropyDriver.data, 64, false)])
        try driver.offer([(EntropyDriver.data, 64, false), (EntropyDriver.data + 0x1000, 32, true)])
        try driver.offer([(EntropyDriver.data, 0, true)])
        driver.kick()
        #expect(try driver.waitForAll() == [0, 32, 0])
        #expect(try driver.ram.readBytes(at: GuestAddress(EntropyDriver.data), count: 64) == before)
        #expect(driver.transport.function.counters.errors.value == 2)
        #expect(try driver.request(16).used == 16)
    }

    @Test func aBufferOutsideRAMStopsTheDeviceUntilItsReset() throws {
        let driver = try EntropyDriver()
        try driver.offer([(15 << 20, 2 << 20, true)])
        driver.kick()
        while driver.read(0x070) & 64 == 0 { driver.transport.irqfd.event.wait() }
        #expect(try driver.usedIndex == 0)
        try driver.start()
        #expect(try driver.request(16).used == 16)
    }

    @Test func aLimitMakesItWaitForTheNextPeriod() throws {
        let driver = try EntropyDriver(EntropyLimit(bytes: 100, period: 20))
        for _ in 0..<4 { try driver.offer([(EntropyDriver.data, 60, true)]) }
        let clock = ContinuousClock()
        let began = clock.now
        driver.kick()
        // 60 and 40 of the first period, the same of the next.
        #expect(try driver.waitForAll() == [60, 40, 60, 40])
        #expect(clock.now - began >= .milliseconds(20))
    }

    @Test func aResetDoesNotRenewTheLimit() throws {
        // A period that no test outlasts.
        let driver = try EntropyDriver(EntropyLimit(bytes: 100, period: 60_000))
        #expect(try driver.request(90).used == 90)
        try driver.start()
        #expect(try driver.request(90).used == 10)
        try driver.start()
        try driver.offer([(EntropyDriver.data, 1, true)])
        driver.kick()
        // The reset is answered by the same thread, after the kick.
        driver.write(0x070, 0)
        #expect(try driver.usedIndex == 0)
    }
}
