// SPDX-License-Identifier: Apache-2.0

@testable import Devices
@testable import DiskImage
import Glibc
import GuestMemory
import Linux
import TestSupport
import Testing
@testable import Virtio

/// Drivers that set the queues of a disk against each other.
@Suite(.timed) struct BlockHostileQueuesTests {
    static let features: FeatureSet = [
        .version1, .blockFlush, .blockMultiqueue, .ringReset, .blockDiscard, .blockWriteZeroes,
    ]
    static let size = 1 << 20
    /// What the disk has at first.
    static let old = TemporaryDisk.pattern(size)
    let disk: TemporaryDisk
    let path: String

    /// A qcow2 image of 4 KiB clusters over a raw disk: what is written is copied, allocated and linked.
    init() throws {
        disk = try TemporaryDisk(Self.old)
        path = disk.path + ".qcow2"
        var creation = ImageCreation(path: path, format: .qcow2, size: UInt64(Self.size))
        creation.options.clusterSize = 4096
        creation.backing = BackingReference(name: disk.path, format: .raw)
        try creation.create()
    }

    private func driver(queues: Int, usesRing: Bool) throws -> BlockDriver {
        let device = try BlockDevice(
            name: "blk0", image: DiskImage(path: path, options: DiskImageOptions(locking: false)), queues: queues,
            queueSize: UInt16(BlockDriver.queueSize), usesRing: usesRing)
        return try BlockDriver(device, features: Self.features, queues: queues)
    }

    /// A request that is offered and not waited for, and its status byte; `place` is a number of the memory it has.
    private func offer(_ driver: BlockDriver, _ type: UInt32, sector: UInt64, _ bytes: [UInt8], at place: Int) throws {
        let address = Self.address(place)
        try driver.ram.write(BlockDriver.header(type, sector) + bytes, at: GuestAddress(address))
        try driver.ram.write([0xee], at: GuestAddress(address + 0x2fff))
        _ = try driver.offer([
            BlockDriver.Buffer(address: address, length: 16 + bytes.count, isWritable: false),
            BlockDriver.Buffer(address: address + 0x2fff, length: 1, isWritable: true),
        ])
    }

    private static func address(_ place: Int) -> UInt64 { BlockDriver.data + 0x10_0000 + UInt64(place) * 0x3000 }

    private func status(_ driver: BlockDriver, at place: Int) throws -> UInt8 {
        try driver.ram.readBytes(at: GuestAddress(Self.address(place) + 0x2fff), count: 1)[0]
    }

    /// A range of sectors for DISCARD or WRITE_ZEROES (virtio 1.2 §5.2.6).
    private func range(_ sector: UInt64, _ count: UInt32, flags: UInt32 = 0) -> [UInt8] {
        (0..<8).map { UInt8(truncatingIfNeeded: sector >> UInt64(8 * $0)) }
            + [count, flags].flatMap { value in (0..<4).map { UInt8(truncatingIfNeeded: value >> UInt32(8 * $0)) } }
    }

    /// The image has no errors once nobody has it, and what the disk is beyond `changed` has stayed.
    private func examine(besides changed: Range<Int>, sourceLocation: SourceLocation = #_sourceLocation) throws {
        let options = DiskImageOptions(readOnly: true, locking: false)
        #expect(try DiskImage.check(path: path, options: options).isSound, sourceLocation: sourceLocation)
        var engine = try DiskEngine(DiskImage(path: path, options: options), depth: 1)
        var now = [UInt8](repeating: 0, count: Self.size)
        try now.withUnsafeMutableBytes { try engine.perform(.read, at: 0, memory: $0) }
        let isSame =
            now[..<changed.lowerBound] == Self.old[..<changed.lowerBound]
            && now[changed.upperBound...] == Self.old[changed.upperBound...]
        #expect(isSame, sourceLocation: sourceLocation)
    }

    /// The same sectors from all queues at once, written, zeroed and discarded, with flushes: nothing orders them, but
    /// each sector has what one of them wrote, or zeroes, and no other is touched.
    @Test(arguments: [true, false]) func theSameSectorsFromAllQueues(usesRing: Bool) throws {
        var driver: BlockDriver? = try driver(queues: 4, usesRing: usesRing)
        // In the middle of a cluster, to the middle of the next but one.
        let first: UInt64 = 100 * 8 + 3, count = 16
        for round in 0..<10 {
            for queue in 0..<4 {
                driver!.queue = queue
                let place = queue * 5
                for (index, type) in [
                    BlockRequestType.write, BlockRequestType.writeZeroes, BlockRequestType.write,
                    BlockRequestType.discard, BlockRequestType.flush,
                ].enumerated() {
                    let bytes: [UInt8] =
                        switch type {
                        case BlockRequestType.write:
                            [UInt8](repeating: UInt8(1 + round * 20 + place + index), count: count * 512)
                        case BlockRequestType.flush: []
                        default:
                            range(
                                first, UInt32(count),
                                flags: type == BlockRequestType.writeZeroes ? UInt32(round % 2) : 0)
                        }
                    try offer(
                        driver!, type, sector: type == BlockRequestType.write ? first : 0, bytes, at: place + index)
                }
            }
            for queue in 0..<4 {
                driver!.queue = queue
                driver!.kick()
            }
            for queue in 0..<4 {
                driver!.queue = queue
                try driver!.wait(for: 5)
                for index in 0..<5 { #expect(try status(driver!, at: queue * 5 + index) == 0) }
            }
            let now = try driver!.request(BlockRequestType.read, sector: first, in: count * 512).data
            for sector in 0..<count {
                let bytes = now[sector * 512..<(sector + 1) * 512], value = bytes.first!
                #expect(bytes.allSatisfy { $0 == value })
                #expect(value == 0 || (1 + round * 20..<1 + round * 20 + 20).contains(Int(value)))
            }
        }
        driver = nil
        try examine(besides: Int(first) * 512..<(Int(first) + count) * 512)
    }

    /// A queue is reset while another's requests, for the same clusters, wait for what it does: claims, metadata, the
    /// commit that it runs.
    @Test(arguments: [true, false]) func aQueueIsResetWhileOthersWaitForIt(usesRing: Bool) throws {
        var driver: BlockDriver? = try driver(queues: 2, usesRing: usesRing)
        for round in 0..<20 {
            // Neighbours in each of eight clusters.
            for queue in 0..<2 {
                driver!.queue = queue
                for index in 0..<8 {
                    let sector = UInt64((round * 8 + index) * 8 + queue * 4)
                    try offer(
                        driver!, BlockRequestType.write, sector: sector,
                        [UInt8](repeating: UInt8(1 + queue), count: 512), at: queue * 9 + index)
                }
                try offer(driver!, BlockRequestType.flush, sector: 0, [], at: queue * 9 + 8)
                driver!.kick()
            }
            let reset = round % 2
            driver!.write(0x030, UInt32(reset))
            driver!.write(0x0c0, 1)
            #expect(driver!.read(0x0c0) == 0)
            driver!.queue = 1 - reset
            try driver!.wait(for: 9)
            for index in 0..<9 { #expect(try status(driver!, at: (1 - reset) * 9 + index) == 0) }
            // What was in flight at the other may have been done, in full, or not.
            for index in 0..<8 {
                let cluster = try driver!.request(
                    BlockRequestType.read, sector: UInt64((round * 8 + index) * 8), in: 4096
                ).data
                let place = (round * 8 + index) * 4096
                for sector in 0..<8 {
                    let now = Array(cluster[sector * 512..<(sector + 1) * 512]),
                        before = Array(Self.old[place + sector * 512..<place + (sector + 1) * 512])
                    let written = [UInt8](repeating: sector == 0 ? 1 : 2, count: 512)
                    let mayBeOld = sector % 4 != 0 || sector / 4 == reset, mayBeNew = sector % 4 == 0
                    #expect(
                        (mayBeOld && now == before) || (mayBeNew && now == written), "round \(round), sector \(sector)")
                }
            }
            driver!.queue = reset
            try driver!.setUp()
            #expect(try driver!.request(BlockRequestType.flush).status == 0)
        }
        driver = nil
        try examine(besides: 0..<20 * 8 * 4096)
    }

    /// A rule is broken on one queue while the others have requests in flight: the device asks for a reset, and after
    /// that all is well.
    @Test(arguments: [true, false]) func oneQueueBreaksARuleWhileOthersAreBusy(usesRing: Bool) throws {
        var driver: BlockDriver? = try driver(queues: 3, usesRing: usesRing)
        for round in 0..<10 {
            let bad = round % 3
            for queue in 0..<3 where queue != bad {
                driver!.queue = queue
                for index in 0..<8 {
                    try offer(
                        driver!, BlockRequestType.write, sector: UInt64(index * 8 + queue),
                        [UInt8](repeating: 9, count: 512), at: queue * 9 + index)
                }
                try offer(driver!, BlockRequestType.flush, sector: 0, [], at: queue * 9 + 8)
                driver!.kick()
            }
            driver!.queue = bad
            // A head that is no descriptor.
            try driver!.ram.write(UInt16(0xffff), at: BlockDriver.available &+ (UInt64(bad) * 0x1000 + 4))
            try driver!.ram.write(UInt16(1), at: BlockDriver.available &+ (UInt64(bad) * 0x1000 + 2))
            driver!.kick()
            while !driver!.transport.function.interrupts.configuration.needsReset {
                driver!.transport.irqfd.event.wait()
            }
            #expect(driver!.read(0x070) & 64 != 0)
            try driver!.start(Self.features)
            for queue in 0..<3 {
                driver!.queue = queue
                #expect(try driver!.request(BlockRequestType.flush).status == 0)
                #expect(
                    try driver!.request(BlockRequestType.read, sector: 800, in: 512).data
                        == Array(Self.old[800 * 512..<801 * 512]))
            }
        }
        driver = nil
        try examine(besides: 0..<8 * 4096)
    }

    /// All queues have the same rings: what one takes the others take, too, and each answers into the same used ring.
    /// The device may find that to be against the rules or not; it lives, and the image has no errors.
    @Test(arguments: [true, false]) func queuesThatShareTheirRings(usesRing: Bool) throws {
        var driver: BlockDriver? = try driver(queues: 4, usesRing: usesRing)
        for _ in 0..<5 {
            // Set up by hand: the first queue's rings for each.
            for queue in 1..<4 {
                driver!.write(0x030, UInt32(queue))
                driver!.write(0x0c0, 1)
                for (register, ring) in [
                    (0x080 as UInt64, BlockDriver.table), (0x090, BlockDriver.available), (0x0a0, BlockDriver.used),
                ] {
                    driver!.write(register, UInt32(truncatingIfNeeded: ring.rawValue))
                    driver!.write(register + 4, 0)
                }
                driver!.write(0x044, 1)
            }
            driver!.queue = 0
            for index in 0..<16 {
                try offer(
                    driver!, BlockRequestType.write, sector: UInt64(index),
                    [UInt8](repeating: UInt8(index), count: 4096), at: index)
            }
            for queue in 0..<4 { driver!.write(0x050, UInt32(queue)) }
            // The reset waits for all that is under way.
            try driver!.start(Self.features)
            #expect(
                try driver!.request(BlockRequestType.read, sector: 800, in: 512).data
                    == Array(Self.old[800 * 512..<801 * 512]))
        }
        driver = nil
        try examine(besides: 0..<(16 + 8) * 512)
    }
}
