// SPDX-License-Identifier: Apache-2.0

import DiskImage
import Glibc
import GuestMemory
import HostNetwork
import Linux
import TestSupport
import Testing
@testable import Devices
@testable import Virtio

/// Whatever a guest's CPUs do at once to registers, rings, descriptors and headers: the device comes back with a reset
/// and serves a good driver, and the image is sound.
@Suite(.timed) struct HostileGuestTests {
    // MARK: A disk

    static let size = 1 << 20

    @Test(arguments: [true, false]) func aDiskWhoseRequestsAreRewrittenUnderItsEyes(usesRing: Bool) throws {
        let old = TemporaryDisk.pattern(Self.size)
        let base = try TemporaryDisk(old)
        let path = base.path + ".qcow2"
        defer { unsafe unlink(path) }
        var creation = ImageCreation(path: path, format: .qcow2, size: UInt64(Self.size))
        creation.options.clusterSize = 4096
        creation.backing = BackingReference(name: base.path, format: .raw)
        try creation.create()

        let queues = 3
        let device = try BlockDevice(
            name: "blk0", image: DiskImage(path: path, options: DiskImageOptions(locking: false)), queues: queues,
            queueSize: UInt16(BlockDriver.queueSize),
            usesRing: usesRing)
        let features = device.features.union(.transport)
        var driver: BlockDriver? = try BlockDriver(device, features: features, queues: queues)
        let guest = HostileGuest(
            driver!.transport, ram: driver!.ram, sizes: Array(repeating: UInt16(BlockDriver.queueSize), count: queues),
            features: features, header: Self.blockHeader)
        let statistics = device.statistics
        try guest.attack(rounds: 60, served: { [statistics.reads, statistics.writes] })

        // It was worth it: requests were served, and rules were broken.
        #expect(
            statistics.reads > 0 && statistics.writes > 0
                && driver!.transport.function.counters.errors.value > 0)
        // The driver of the tests does not ask for an interrupt by index.
        try driver!.start([.version1, .blockFlush, .blockMultiqueue])
        for queue in 0..<queues {
            driver!.queue = queue
            let piece = TemporaryDisk.pattern(8192, seed: queue)
            #expect(
                try driver!.request(BlockRequestType.write, sector: UInt64(queue * 100), out: piece).status == 0,
                "seed \(guest.seed)")
            #expect(try driver!.request(BlockRequestType.flush).status == 0)
            #expect(
                try driver!.request(BlockRequestType.read, sector: UInt64(queue * 100), in: 8192).data == piece,
                "seed \(guest.seed)")
        }
        driver = nil
        #expect(
            try DiskImage.check(path: path, options: DiskImageOptions(readOnly: true, locking: false)).isSound,
            "seed \(guest.seed)")
        // The path has no character that means something to a shell.
        // Its locks may outlast the device by a moment, in a process that another test is starting: -U takes none.
        #expect(unsafe system("qemu-img check -q -U -f qcow2 '\(path)'") == 0, "seed \(guest.seed)")
        #expect(try base.contents() == old, "what the image stands on has changed, seed \(guest.seed)")
    }

    /// A header, and a range for DISCARD and WRITE_ZEROES behind it.
    private static func blockHeader(_ queue: Int, _ random: inout SeededGenerator) -> [UInt8] {
        let types = [
            BlockRequestType.read, BlockRequestType.write, BlockRequestType.write, BlockRequestType.flush,
            BlockRequestType.getID, BlockRequestType.discard,
            BlockRequestType.writeZeroes,
        ]
        let type =
            random.chance(95)
            ? types[Int(random.below(UInt64(types.count)))] : UInt32(truncatingIfNeeded: random.next())
        let sector = random.chance(95) ? random.below(UInt64(size / 512)) : random.next() >> random.below(64)
        let header = BlockDriver.header(type, sector)
        guard [BlockRequestType.discard, BlockRequestType.writeZeroes].contains(type) else { return header }
        // Sector, count and flags.
        let range = [
            random.chance(95) ? random.below(UInt64(size / 512)) : random.next(),
            random.below(64) | random.below(2) << 32,
        ]
        return header + range.flatMap { word in (0..<8).map { UInt8(truncatingIfNeeded: word >> (8 * UInt64($0))) } }
    }

    // MARK: A network interface

    static let networkFeatures: FeatureSet = [
        .mtu, .mac, .mergeableBuffers, .linkStatus, .controlQueue, .controlReceiveMode, .controlMACAddress,
    ]

    @Test func aNetworkInterfaceWhoseBuffersAreRewrittenUnderItsEyes() throws {
        let (driver, wire) = try Wire.make()
        let features = driver.device.features.union(.transport)
        let guest = HostileGuest(
            driver.transport, ram: driver.memory.ram, sizes: [256, 256, 64], features: features,
            header: Self.networkHeader)
        let link = Traffic(wire.number, driver.device.port)
        let counters = driver.device.counters
        try guest.attack(rounds: 60, served: { [counters.sentFrames, counters.receivedFrames] }) { link.step(&$0) }

        #expect(
            counters.sentFrames > 0 && counters.receivedFrames > 0
                && driver.transport.function.counters.errors.value > 0)
        driver.device.port.setLink(up: true, because: "says a test")
        try driver.start(Self.networkFeatures)
        // What was under way when all was over.
        while wire.isReadable { _ = try wire.next() }
        for index in 0..<8 {
            try driver.sendAndWait(plainHeader + frame(100 + index))
            #expect(try wire.next() == plainHeader + frame(100 + index), "seed \(guest.seed)")
            try driver.offerBuffer(at: NetworkDriver.buffers, [2048])
            driver.kick(NetworkDriver.receive)
            try wire.send(plainHeader + frame(200 + index))
            let written = try driver.used(NetworkDriver.receive).written
            #expect(written == 212 + index, "seed \(guest.seed)")
            #expect(
                try driver.bytes(NetworkDriver.buffers + 12, 200 + index) == frame(200 + index), "seed \(guest.seed)")
        }
        // Class and command RX, PROMISC, on (virtio 1.2 §5.1.6.5).
        #expect(try driver.command([0, 0, 1]) == 0, "seed \(guest.seed)")
    }

    /// `struct virtio_net_hdr`, or the beginning of a command.
    private static func networkHeader(_ queue: Int, _ random: inout SeededGenerator) -> [UInt8] {
        if queue == NetworkDriver.receive { return [] }
        if queue == NetworkDriver.control {
            return [UInt8(random.below(6)), UInt8(random.below(7)), UInt8(random.below(3))]
        }
        return random.chance(50)
            ? plainHeader : (0..<12).map { _ in UInt8(truncatingIfNeeded: random.next() >> random.below(8)) }
    }

    /// The other end of the wire: it takes and sends frames, and pulls the cable.
    private final class Traffic: Sendable {
        private let wire: Int32
        private let port: NetworkPort

        init(_ wire: Int32, _ port: NetworkPort) { (self.wire, self.port) = (wire, port) }

        func step(_ random: inout SeededGenerator) {
            var bytes = [UInt8](repeating: UInt8(truncatingIfNeeded: random.next()), count: 128 << 10)
            // The kernel reads and writes within the array.
            for _ in 0..<4 {
                unsafe bytes.withUnsafeMutableBytes {
                    _ = unsafe recv(wire, $0.baseAddress, $0.count, Int32(MSG_DONTWAIT))
                }
            }
            let count = 12 + Int(random.below(random.chance(90) ? 1515 : 66_000))
            unsafe bytes.withUnsafeBytes {
                _ = unsafe send(wire, $0.baseAddress, count, Int32(MSG_DONTWAIT | MSG_NOSIGNAL))
            }
            if random.chance(1) { port.setLink(up: random.chance(80), because: "says a test") }
        }
    }
}
