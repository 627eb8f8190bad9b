// SPDX-License-Identifier: Apache-2.0

import CSystemCallFilter
@testable import Devices
import DiskImage
import Glibc
import GuestMemory
import Linux
import TestSupport
import Testing
@testable import Virtio

@Suite(.timed) struct BlockDeviceTests {
    static let size = 256 << 10
    let contents = TemporaryDisk.pattern(Self.size)
    let disk: TemporaryDisk

    init() throws { disk = try TemporaryDisk(contents) }

    @Test func theConfigurationSpaceDescribesTheDisk() throws {
        let device = try disk.device()
        let driver = try BlockDriver(device)
        #expect(driver.read(0x008) == 2)
        #expect(driver.configuration(0, 8) == UInt64(Self.size / 512))
        #expect(driver.configuration(8, 4) == 4 << 20)
        #expect(driver.configuration(12, 4) == UInt64(BlockDriver.queueSize - 2))
        #expect(driver.configuration(20, 4) == 512)
        #expect(driver.configuration(24, 1) == 3 && driver.configuration(26, 2) == 8)
        #expect(driver.configuration(32, 1) == 1)
        #expect(
            driver.configuration(36, 4) == 1 << 21 && driver.configuration(40, 4) == 64
                && driver.configuration(44, 4) == 8)
        #expect(
            driver.configuration(48, 4) == 1 << 18 && driver.configuration(52, 4) == 64
                && driver.configuration(56, 1) == 1)
        for bit in [1, 2, 6, 9, 10, 11, 13, 14] {
            #expect(device.features.contains(FeatureSet(bit: bit)), "feature \(bit)")
        }
        #expect(!device.features.contains(.blockReadOnly))
        #expect(
            try disk.device(readOnly: true, lockedBy: driver).features.isSuperset(of: [.blockReadOnly, .blockFlush]))
    }

    @Test(arguments: [true, false]) func readsAndWrites(usesRing: Bool) throws {
        let driver = try BlockDriver(disk.device(usesRing: usesRing))
        var (status, used, data) = try driver.request(BlockRequestType.read, sector: 3, in: 4096)
        #expect(status == 0 && used == 4097)
        #expect(data == Array(contents[1536..<1536 + 4096]))
        let piece = TemporaryDisk.pattern(8192, seed: 5)
        (status, used, _) = try driver.request(BlockRequestType.write, sector: 100, out: piece)
        #expect(status == 0 && used == 1)
        (status, used, _) = try driver.request(BlockRequestType.flush)
        #expect(status == 0 && used == 1)
        #expect(try disk.contents() == contents[..<51_200] + piece + contents[(51_200 + 8192)...])
        (status, _, data) = try driver.request(BlockRequestType.read, sector: 100, in: 8192)
        #expect(status == 0 && data == piece)
        // The last sector, and no byte behind it.
        (status, _, data) = try driver.request(BlockRequestType.read, sector: UInt64(Self.size / 512 - 1), in: 512)
        #expect(status == 0 && data == Array(contents.suffix(512)))
        let statistics = driver.device.statistics
        #expect(statistics.reads == 3 && statistics.readBytes == 4096 + 8192 + 512)
        #expect(statistics.writes == 1 && statistics.writtenBytes == 8192 && statistics.flushes == 1)
        #expect(statistics.failures == 0 && driver.transport.function.counters.requests.value == 5)
    }

    /// A sandbox may allow io_uring_setup and refuse io_uring_enter: requests would wait for ever, without a word. They
    /// are errors, which drivers understand, also again after a reset; the host hears of it once. Errors that usually
    /// pass (EAGAIN, EBUSY) are no reason to wait for ever either, also at the end of the device.
    @Test(arguments: [1, 2], [EPERM, EAGAIN, EBUSY]) func aRingThatTheHostRefusesLaterOnIsReported(
        queues: Int, error: Int32
    ) throws {
        let reports = Reports()
        let path = disk.path, contents = contents
        // The filter is for good: a thread of its own, and those that it starts, have it.
        let thread = try Thread.start(name: "refused", stackSize: 1 << 20) {
            guard fail_system_call(io_uring_enter_number(), error) == 0 else {
                return reports.add("the host has no filters of system calls")
            }
            do {
                let events = DeviceEvents { level, line in
                    if level != .debug { reports.add("\(level): \(line)") }
                }
                let device = try BlockDevice(
                    name: "blk0", image: DiskImage(path: path), queues: queues,
                    queueSize: UInt16(BlockDriver.queueSize), events: events)
                let features: FeatureSet =
                    queues > 1 ? [.version1, .blockFlush, .blockMultiqueue] : [.version1, .blockFlush]
                let driver = try BlockDriver(device, features: features, queues: queues)
                for _ in 0..<2 {
                    for queue in 0..<queues {
                        driver.queue = queue
                        // A small one that is alone needs no ring.
                        let lone = try driver.request(BlockRequestType.read, in: 512)
                        #expect(lone.status == 0 && lone.data == Array(contents[..<512]), "queue \(queue)")
                        let bytes = [UInt8](repeating: 1, count: 128 << 10)
                        let read = try driver.request(BlockRequestType.read, in: bytes.count)
                        let write = try driver.request(BlockRequestType.write, out: bytes)
                        let flush = try driver.request(BlockRequestType.flush)
                        #expect(read.status == 1 && write.status == 1 && flush.status == 1, "queue \(queue)")
                    }
                    #expect(!driver.transport.function.interrupts.configuration.needsReset)
                    driver.write(0x070, 0)
                    try driver.start(features)
                }
            } catch { reports.add("\(error)") }
        }
        thread.join()
        // Once for all queues; what becomes of the requests follows, once for each kind.
        #expect(
            reports.all.first
                == "error: disk \"\(path)\": \(SystemCallError("io_uring_enter", errno: error)); requests of the guest fail"
        )
        #expect(reports.all.count { $0.contains("io_uring_enter") } == 1 && reports.all.count == 4, "\(reports.all)")
        #expect(try disk.contents() == contents)
    }

    private final class Reports: Sendable {
        private let lines = Guarded<[String]>([])
        func add(_ line: String) { lines.withLock { $0.append(line) } }
        var all: [String] { lines.withLock { $0 } }
    }

    /// Header, data and status in buffers of any size, as long as the order is right (virtio 1.2 §2.6.4).
    @Test func everyFramingIsTheSame() throws {
        let driver = try BlockDriver(disk.device())
        let expected = Array(contents[512..<2048])
        for readable in [[16], [1, 15], [4, 4, 8], Array(repeating: 1, count: 16), [8, 0, 8]] {
            for writable in [
                [1537], [1536, 1], [512, 1024, 1], [1, 1535, 1], [700, 837], [1535, 2], [0, 1536, 1], [511, 513, 513],
            ] {
                let (status, used, data) = try driver.request(
                    BlockRequestType.read, sector: 1, in: 1536, readable: readable, writable: writable)
                #expect(status == 0 && used == 1537 && data == expected, "\(readable) \(writable)")
            }
        }
        for (index, readable) in [
            [16 + 1024], [10, 16 - 10 + 1024], [17, 1023], [16, 1, 511, 512], [3, 13 + 700, 324],
        ].enumerated() {
            let piece = TemporaryDisk.pattern(1024, seed: index + 1)
            let (status, used, _) = try driver.request(
                BlockRequestType.write, sector: 40, out: piece, readable: readable)
            #expect(status == 0 && used == 1, "\(readable)")
            #expect(try Array(disk.contents()[20480..<21504]) == piece, "\(readable)")
        }
    }

    @Test func wrongRequestsEndWithAnError() throws {
        let driver = try BlockDriver(disk.device())
        let last = UInt64(Self.size / 512)
        let sector = TemporaryDisk.pattern(512, seed: 3)
        // Lengths that are no sectors, and ranges beyond the end, also where their sum wraps.
        for (start, count) in [
            (0 as UInt64, 1), (0, 511), (0, 513), (last, 512), (last - 1, 1024), (.max, 512), (1 << 55, 512),
            (.max / 512 + 1, 512),
        ] {
            let (status, used, data) = try driver.request(BlockRequestType.read, sector: start, in: count)
            // None of the data is known to be written, and the status byte comes after its room.
            #expect(status == 1 && used == 0, "sector \(start), \(count) bytes")
            #expect(data.allSatisfy { $0 == 0xee })
            if start != 0 {
                #expect(
                    try driver.request(BlockRequestType.write, sector: start, out: [UInt8](repeating: 9, count: count))
                        .status == 1)
            }
        }
        #expect(try driver.request(BlockRequestType.write, sector: 0, out: Array(sector[..<100])).status == 1)
        // Types that nobody knows, also those of older drafts.
        for type: UInt32 in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 99, .max] {
            let (status, used, _) = try driver.request(type, in: 512)
            #expect(status == 2 && used == 0, "type \(type)")
        }
        // A header cut short.
        for length in [1, 8, 15] {
            let (status, used, _) = try driver.request(
                0, in: 512, readable: [length], header: Array(BlockDriver.header(0, 0)[..<length]))
            #expect(status == 1 && used == 0)
        }
        // No place for the status: the chain comes back nevertheless.
        let head = try driver.offer([BlockDriver.Buffer(address: BlockDriver.data, length: 16, isWritable: false)])
        driver.kick()
        try driver.wait(for: 1)
        #expect(driver.written[head] == 0)
        #expect(driver.device.statistics.failures > 0)
        #expect(try disk.contents() == contents)
        #expect(driver.read(0x070) == 15)
        #expect(try driver.request(BlockRequestType.read, in: 512).data == Array(contents[..<512]))
    }

    @Test func aReadOnlyDiskRefusesEveryChange() throws {
        let driver = try BlockDriver(disk.device(readOnly: true), features: [.version1, .blockFlush, .blockReadOnly])
        #expect(try driver.request(BlockRequestType.write, out: [UInt8](repeating: 1, count: 512)).status == 1)
        for type in [BlockRequestType.discard, BlockRequestType.writeZeroes] {
            #expect(try driver.request(type, out: Self.range(0, 8, 0)).status == 1)
        }
        #expect(try driver.request(BlockRequestType.flush).status == 0)
        #expect(try driver.request(BlockRequestType.read, in: 512).data == Array(contents[..<512]))
        #expect(try disk.contents() == contents)
    }

    @Test func theSerialIsGivenOrDerived() throws {
        var driver = try BlockDriver(disk.device(serial: "backup"))
        var (status, used, data) = try driver.request(BlockRequestType.getID, in: 20)
        #expect(status == 0 && used == 21)
        #expect(data == Array("backup".utf8) + [UInt8](repeating: 0, count: 14))
        (status, used, data) = try driver.request(BlockRequestType.getID, in: 4)
        #expect(status == 0 && used == 5 && data == Array("back".utf8))
        (status, used, data) = try driver.request(BlockRequestType.getID, in: 30)
        #expect(status == 0 && used == 20 && data[20...].allSatisfy { $0 == 0xee })
        (status, used, _) = try driver.request(BlockRequestType.getID)
        #expect(status == 0 && used == 1)
        driver = try BlockDriver(TemporaryDisk(contents).device())
        #expect(driver.device.serial.count == 20 && driver.device.serial.hasPrefix("SWKV"))
        #expect(
            try disk.device(serial: "a name of more than twenty bytes\u{7}", lockedBy: driver).serial
                == "a name of more than ")
    }

    /// The bytes of a DISCARD or WRITE_ZEROES range.
    static func range(_ sector: UInt64, _ count: UInt32, _ flags: UInt32) -> [UInt8] {
        (0..<8).map { UInt8(truncatingIfNeeded: sector >> UInt64(8 * $0)) }
            + [count, flags].flatMap { value in (0..<4).map { UInt8(truncatingIfNeeded: value >> UInt32(8 * $0)) } }
    }

    @Test(arguments: [true, false]) func discardAndWriteZeroes(usesRing: Bool) throws {
        let driver = try BlockDriver(
            disk.device(usesRing: usesRing), features: [.version1, .blockFlush, .blockDiscard, .blockWriteZeroes])
        var expected = contents
        func zero(_ sectors: Range<Int>) {
            expected.replaceSubrange(
                sectors.lowerBound * 512..<sectors.upperBound * 512,
                with: [UInt8](repeating: 0, count: sectors.count * 512))
        }
        #expect(try driver.request(BlockRequestType.discard, out: Self.range(8, 16, 0)).status == 0)
        zero(8..<24)
        #expect(try disk.contents() == expected)
        #expect(try driver.request(BlockRequestType.writeZeroes, out: Self.range(33, 3, 0)).status == 0)
        zero(33..<36)
        #expect(try driver.request(BlockRequestType.writeZeroes, out: Self.range(64, 8, 1)).status == 0)
        zero(64..<72)
        #expect(try disk.contents() == expected)
        // Several ranges, cut anywhere.
        let ranges = (0..<64).flatMap { Self.range(UInt64(100 + 4 * $0), 2, 0) }
        #expect(try driver.request(BlockRequestType.writeZeroes, out: ranges, readable: [20, 1000, 20]).status == 0)
        for index in 0..<64 { zero(100 + 4 * index..<102 + 4 * index) }
        #expect(try disk.contents() == expected)

        // Wrong ones: flags, lengths, ranges.
        let last = UInt64(Self.size / 512)
        for (type, out, status) in [
            (BlockRequestType.discard, Self.range(0, 8, 1), 2 as UInt8),
            (BlockRequestType.discard, Self.range(0, 8, 2), 2),
            (BlockRequestType.writeZeroes, Self.range(0, 8, 2), 2),
            (BlockRequestType.writeZeroes, Self.range(0, 8, .max), 2),
            (BlockRequestType.discard, Self.range(last, 1, 0), 1),
            (BlockRequestType.discard, Self.range(.max, .max, 0), 1),
            (BlockRequestType.writeZeroes, Self.range(0, .max, 0), 1),
            (BlockRequestType.writeZeroes, Self.range(last - 1, 2, 0), 1),
            (BlockRequestType.discard, [], 1), (BlockRequestType.discard, [UInt8](repeating: 0, count: 15), 1),
            (BlockRequestType.discard, [UInt8](repeating: 0, count: 17), 1),
            (BlockRequestType.discard, ranges + Self.range(0, 1, 0), 1),
        ] {
            #expect(try driver.request(type, out: out).status == status)
        }
        // The first range is done, the second is wrong.
        #expect(
            try driver.request(BlockRequestType.writeZeroes, out: Self.range(0, 1, 0) + Self.range(last, 1, 0)).status
                == 1)
        zero(0..<1)
        #expect(try disk.contents() == expected)
    }

    @Test(arguments: [[], .eventIndex, .packedRing] as [FeatureSet]) func manyRequestsInFlight(extra: FeatureSet) throws
    {
        let driver = try BlockDriver(disk.device(), features: FeatureSet([.version1, .blockFlush]).union(extra))
        for round in 0..<20 {
            // With EVENT_IDX: an interrupt when the last of the round is used. In a packed queue the place has no
            // meaning.
            let last = UInt16(truncatingIfNeeded: (round + 1) * 20 - 1)
            try driver.ram.write(last, at: BlockDriver.available &+ (4 + 2 * UInt64(BlockDriver.queueSize)))
            var heads: [UInt32] = []
            for index in 0..<20 {
                let header = GuestAddress(BlockDriver.data + UInt64(index) * 0x1000)
                let sector = (index * 23 + round) % (Self.size / 512 - 4)
                try driver.ram.write(BlockDriver.header(0, UInt64(sector)), at: header)
                heads.append(
                    try driver.offer([
                        BlockDriver.Buffer(address: header.rawValue, length: 16, isWritable: false),
                        BlockDriver.Buffer(address: header.rawValue + 512, length: 2048, isWritable: true),
                        BlockDriver.Buffer(address: header.rawValue + 32, length: 1, isWritable: true),
                    ]))
                if index % 7 == 0 { driver.kick() }
            }
            driver.kick()
            try driver.wait(for: 20)
            for index in 0..<20 {
                let base = GuestAddress(BlockDriver.data + UInt64(index) * 0x1000)
                let sector = (index * 23 + round) % (Self.size / 512 - 4)
                #expect(driver.written[heads[index]] == 2049)
                #expect(try driver.ram.readUInt8(at: base &+ 32) == 0)
                #expect(
                    try driver.ram.readBytes(at: base &+ 512, count: 2048)
                        == Array(contents[sector * 512..<sector * 512 + 2048]))
            }
        }
        // Many requests, few interrupts: one for a batch.
        #expect(
            driver.transport.function.counters.interrupts.value <= driver.transport.function.counters.requests.value)
    }

    @Test(arguments: [[], .packedRing] as [FeatureSet])
    func aResetWaitsForWhatIsInFlightAndTheDeviceWorksAgain(extra: FeatureSet) throws {
        let features = FeatureSet([.version1, .blockFlush]).union(extra)
        let driver = try BlockDriver(disk.device(), features: features)
        for round in 0..<30 {
            for index in 0..<16 {
                let base = BlockDriver.data + UInt64(index) * 0x8000
                try driver.ram.write(BlockDriver.header(0, UInt64(index)), at: GuestAddress(base))
                _ = try driver.offer([
                    BlockDriver.Buffer(address: base, length: 16, isWritable: false),
                    BlockDriver.Buffer(address: base + 0x1000, length: 16384, isWritable: true),
                    BlockDriver.Buffer(address: base + 0x800, length: 1, isWritable: true),
                ])
            }
            driver.kick()
            // In the midst of it all: afterwards nothing writes to memory that is the driver's again.
            driver.write(0x070, 0)
            #expect(driver.read(0x070) == 0)
            try driver.ram.fill(at: GuestAddress(BlockDriver.data), count: 0x8_0000, with: UInt8(round + 1))
            try driver.start(features)
            #expect(
                try driver.ram.readBytes(at: GuestAddress(BlockDriver.data), count: 0x8_0000).allSatisfy {
                    $0 == UInt8(round + 1)
                })
            #expect(try driver.request(BlockRequestType.read, sector: 7, in: 512).data == Array(contents[3584..<4096]))
        }
    }

    /// What the device reads from the disk is the next state of its own available ring: requests without end, and no
    /// CPU makes them.
    @Test func aResetEndsRequestsThatMakeTheNext() throws {
        let size = UInt16(BlockDriver.queueSize), rounds = 65536 / BlockDriver.queueSize
        // Entry 0 is a read of the next sector over the ring and over that read's own header; the others are chains
        // without a status.
        var image: [UInt8] = []
        for round in 0..<rounds {
            var words =
                [0, UInt16(truncatingIfNeeded: round) &* size &+ 1 &+ size, 0]
                + [UInt16](repeating: 3, count: Int(size) - 1)
            words += [UInt16](repeating: 0, count: 128 - words.count)
            let header = BlockDriver.header(BlockRequestType.read, UInt64((round + 1) % rounds))
            let sector = words.flatMap { [UInt8(truncatingIfNeeded: $0), UInt8(truncatingIfNeeded: $0 >> 8)] } + header
            image += sector + [UInt8](repeating: 0, count: 512 - sector.count)
        }
        let disk = try TemporaryDisk(image)
        let driver = try BlockDriver(disk.device(usesRing: false))
        let header = BlockDriver.available &+ 256
        try driver.ram.write(BlockDriver.header(BlockRequestType.read, 0), at: header)
        let lonely = BlockDriver.table &+ 3 * 16
        try driver.ram.write(BlockDriver.data, at: lonely)
        try driver.ram.write(UInt32(16), at: lonely &+ 8)
        _ = try driver.offer([
            BlockDriver.Buffer(address: header.rawValue, length: 16, isWritable: false),
            BlockDriver.Buffer(address: BlockDriver.available.rawValue, length: 512, isWritable: true),
            BlockDriver.Buffer(address: BlockDriver.data, length: 1, isWritable: true),
        ])
        driver.kick()
        while driver.device.statistics.reads < 3 * rounds { sched_yield() }
        driver.write(0x070, 0)
        #expect(driver.read(0x070) == 0)
        try driver.start([.version1])
        #expect(try driver.request(BlockRequestType.read, in: 512).data == Array(image[..<512]))
    }

    @Test func aBrokenRingNeedsAResetAndOnlyThat() throws {
        let driver = try BlockDriver(disk.device())
        // A buffer outside of RAM.
        _ = try driver.offer([BlockDriver.Buffer(address: 1 << 40, length: 16, isWritable: false)])
        driver.kick()
        while driver.read(0x070) & 64 == 0 { driver.transport.irqfd.event.wait() }
        try driver.start([.version1])
        #expect(try driver.request(BlockRequestType.read, in: 512).data == Array(contents[..<512]))
    }

    /// A driver that does not flush, or switches the write cache off, finds its writes durable when they end.
    @Test func withoutWriteCacheAWriteIsFlushed() throws {
        let driver = try BlockDriver(disk.device(), features: [.version1, .blockWriteZeroes])
        #expect(driver.configuration(32, 1) == 0)
        #expect(try driver.request(BlockRequestType.write, out: [UInt8](repeating: 1, count: 512)).status == 0)
        #expect(
            try driver.request(BlockRequestType.writeZeroes, out: Self.range(4, 4, 0) + Self.range(12, 4, 0)).status
                == 0)
        #expect(driver.device.statistics.flushes == 2)

        try driver.start([.version1, .blockFlush, .blockConfigurableWriteback])
        #expect(driver.configuration(32, 1) == 1)
        #expect(try driver.request(BlockRequestType.write, out: [UInt8](repeating: 2, count: 512)).status == 0)
        #expect(driver.device.statistics.flushes == 2)
        driver.transport.write(0, at: 0x120, size: 1)
        #expect(driver.configuration(32, 1) == 0)
        #expect(try driver.request(BlockRequestType.write, out: [UInt8](repeating: 3, count: 512)).status == 0)
        #expect(driver.device.statistics.flushes == 3)
        driver.transport.write(7, at: 0x120, size: 1)
        driver.transport.write(1, at: 0x124, size: 1)
        #expect(driver.configuration(32, 1) == 0)
        #expect(try driver.request(BlockRequestType.read, in: 512).data == [UInt8](repeating: 3, count: 512))
    }

    // MARK: - What was offered and not negotiated

    /// §5.2.6.2: without FLUSH and CONFIG_WCE a write is stable when it ends, whatever is written to the configuration
    /// space.
    @Test func theWritebackByteIsNotObeyedWithoutItsFeature() throws {
        let driver = try BlockDriver(disk.device(), features: [.version1])
        driver.transport.write(1, at: 0x120, size: 1)
        #expect(driver.configuration(32, 1) == 0)
        #expect(try driver.request(BlockRequestType.write, out: [UInt8](repeating: 1, count: 512)).status == 0)
        #expect(driver.device.statistics.flushes == 1)
        // Nor with FLUSH alone: what was not negotiated is not there.
        try driver.start([.version1, .blockFlush])
        driver.transport.write(0, at: 0x120, size: 1)
        #expect(driver.configuration(32, 1) == 1)
        #expect(try driver.request(BlockRequestType.write, out: [UInt8](repeating: 1, count: 512)).status == 0)
        #expect(driver.device.statistics.flushes == 1)
    }

    /// Before FEATURES_OK nothing has been negotiated, and a reset takes back what was.
    @Test func theWritebackByteIsNotObeyedBeforeItsFeature() throws {
        let driver = try BlockDriver(disk.device(), features: [.version1, .blockFlush, .blockConfigurableWriteback])
        driver.write(0x070, 0)
        driver.transport.write(0, at: 0x120, size: 1)
        #expect(driver.configuration(32, 1) == 1)
        for status: UInt32 in [1, 3] { driver.write(0x070, status) }
        driver.transport.write(0, at: 0x120, size: 1)
        #expect(driver.configuration(32, 1) == 1)
    }

    /// §5.2.5.2: with CONFIG_WCE and without FLUSH the byte is 0 from the negotiation on, not from DRIVER_OK; a driver
    /// may then set it.
    @Test func withoutFlushTheWritebackByteIsZeroBeforeDriverOK() throws {
        let driver = try BlockDriver(disk.device(), features: [.version1])
        for half in [0, 1] {
            try driver.negotiate([.version1, .blockConfigurableWriteback])
            #expect(driver.read(0x070) == 11 && driver.configuration(32, 1) == 0)
            if half == 1 { driver.transport.write(1, at: 0x120, size: 1) }
            driver.write(0x070, 15)
            #expect(driver.configuration(32, 1) == UInt64(half))
        }
        driver.write(0x070, 0)
        #expect(driver.configuration(32, 1) == 1)
    }

    @Test func requestsOfFeaturesThatWereNotNegotiatedAreUnknown() throws {
        let driver = try BlockDriver(disk.device(), features: [.version1, .blockFlush, .blockDiscard])
        #expect(try driver.request(BlockRequestType.writeZeroes, out: Self.range(0, 8, 0)).status == 2)
        #expect(try driver.request(BlockRequestType.discard, out: Self.range(8, 8, 0)).status == 0)
        try driver.start([.version1, .blockFlush, .blockWriteZeroes])
        #expect(try driver.request(BlockRequestType.discard, out: Self.range(0, 8, 0)).status == 2)
        #expect(try driver.request(BlockRequestType.read, in: 4096).data == Array(contents[..<4096]))
        #expect(try driver.request(BlockRequestType.writeZeroes, out: Self.range(0, 8, 0)).status == 0)
    }

    @Test func anErrorOfTheHostIsAnErrorOfTheRequest() throws {
        let driver = try BlockDriver(disk.device())
        let status = unsafe truncate(disk.path, off_t(Self.size / 2))
        #expect(status == 0)
        let (failed, used, _) = try driver.request(BlockRequestType.read, sector: UInt64(Self.size / 512 - 8), in: 4096)
        #expect(failed == 1 && used == 0)
        #expect(try driver.request(BlockRequestType.read, in: 4096).data == Array(contents[..<4096]))
    }
}

extension TemporaryDisk {
    /// A second device on the same disk while a driver has the first; it does without the lock.
    func device(readOnly: Bool = false, serial: String? = nil, lockedBy driver: BlockDriver) throws -> BlockDevice {
        try withExtendedLifetime(driver) {
            try BlockDevice(
                name: "blk1",
                image: DiskImage(path: path, options: DiskImageOptions(readOnly: readOnly, locking: false)),
                serial: serial)
        }
    }
}
