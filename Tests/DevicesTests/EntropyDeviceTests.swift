@testable import Devices
import GuestMemory
import Linux
import Testing
@testable import Virtio

/// A driver of an entropy device: a queue in guest RAM and the registers of the transport.
private final class EntropyDriver {
    static let queueSize = 16
    static let table = GuestAddress(0x1_0000), available = GuestAddress(0x2_0000), used = GuestAddress(0x3_0000)
    static let data: UInt64 = 0x10_0000

    let memory: GuestMemory
    let ram: GuestRAM
    let transport: MMIOTransport
    private var offered: UInt16 = 0
    private var nextDescriptor = 0

    init(_ limit: EntropyLimit? = nil) throws {
        memory = try GuestMemory(size: 16 << 20)
        ram = memory.ram
        transport = try MMIOTransport(device: EntropyDevice(name: "rng0", limit: limit), memory: memory)
        try start()
    }

    deinit { write(0x070, 0) }

    func write(_ register: UInt64, _ value: UInt32) { transport.write(UInt64(value), at: register, size: 4) }
    func read(_ register: UInt64) -> UInt32 { UInt32(truncatingIfNeeded: transport.read(at: register, size: 4)) }

    /// Resets the device and sets it up.
    func start() throws {
        write(0x070, 0)
        (offered, nextDescriptor) = (0, 0)
        for ring in [Self.table, Self.available, Self.used] { try ram.fill(at: ring, count: 0x1000) }
        for status: UInt32 in [1, 3] { write(0x070, status) }
        write(0x024, 1)
        write(0x020, 1)  // VIRTIO_F_VERSION_1
        write(0x070, 11)
        try #require(read(0x070) == 11)
        write(0x038, UInt32(Self.queueSize))
        for (register, ring) in [(0x080 as UInt64, Self.table), (0x090, Self.available), (0x0a0, Self.used)] {
            write(register, UInt32(truncatingIfNeeded: ring.rawValue))
            write(register + 4, 0)
        }
        write(0x044, 1)
        write(0x070, 15)
    }

    /// Puts a chain on the available ring.
    func offer(_ buffers: [(address: UInt64, length: UInt32, isWritable: Bool)]) throws {
        let head = nextDescriptor
        for (index, buffer) in buffers.enumerated() {
            let entry = GuestAddress(Self.table.rawValue + UInt64(nextDescriptor) * 16)
            let hasNext = index + 1 < buffers.count
            nextDescriptor = (nextDescriptor + 1) % Self.queueSize
            try ram.write(buffer.address, at: entry)
            try ram.write(buffer.length, at: entry &+ 8)
            try ram.write(UInt16((hasNext ? 1 : 0) | (buffer.isWritable ? 2 : 0)), at: entry &+ 12)
            try ram.write(UInt16(nextDescriptor), at: entry &+ 14)
        }
        try ram.write(UInt16(head), at: Self.available &+ (4 + 2 * UInt64(offered % UInt16(Self.queueSize))))
        offered &+= 1
        try ram.write(offered, at: Self.available &+ 2)
    }

    func kick() { write(0x050, 0) }

    var usedIndex: UInt16 { get throws { try ram.readUInt16(at: Self.used &+ 2) } }

    /// Waits until all that was offered has come back; the used lengths, in that order.
    func finish() throws -> [UInt32] {
        while try usedIndex != offered { transport.interrupt.line.wait() }
        return try (0..<offered).map { try ram.readUInt32(at: Self.used &+ (8 + 8 * UInt64($0 % UInt16(Self.queueSize)))) }
    }

    /// One request of one buffer, filled with a mark before; what was written and the bytes there.
    func request(_ length: Int) throws -> (used: UInt32, bytes: [UInt8]) {
        try ram.fill(at: GuestAddress(Self.data), count: UInt64(length), with: 0xee)
        try offer([(Self.data, UInt32(length), true)])
        kick()
        let used = try #require(try finish().last)
        return (used, try ram.readBytes(at: GuestAddress(Self.data), count: length))
    }
}

@Suite struct EntropyDeviceTests {
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
        #expect(driver.transport.counters.requests.value == 2 && driver.transport.counters.errors.value == 0)
    }

    @Test func aChainOfManyBuffersIsFilledToItsEnd() throws {
        let driver = try EntropyDriver()
        try driver.ram.fill(at: GuestAddress(EntropyDriver.data), count: 0x5000)
        try driver.offer((0..<5).map { (EntropyDriver.data + UInt64($0) * 0x1000, 64, true) })
        driver.kick()
        #expect(try driver.finish() == [320])
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
        #expect(try driver.finish() == [0, 32, 0])
        #expect(try driver.ram.readBytes(at: GuestAddress(EntropyDriver.data), count: 64) == before)
        #expect(driver.transport.counters.errors.value == 2)
        #expect(try driver.request(16).used == 16)
    }

    @Test func aBufferOutsideRAMStopsTheDeviceUntilItsReset() throws {
        let driver = try EntropyDriver()
        try driver.offer([(15 << 20, 2 << 20, true)])
        driver.kick()
        while driver.read(0x070) & 64 == 0 { driver.transport.interrupt.line.wait() }
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
        #expect(try driver.finish() == [60, 40, 60, 40])
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
