// SPDX-License-Identifier: Apache-2.0

import CLinux
import Devices
import DiskImage
import Glibc
import GuestMemory

/// (c) Reads from an image of 1 GiB that is in the page cache, through the block device model and its io_uring.
enum DiskBench {
    /// The reads, the same for all programs.
    struct Load {
        let name: String
        let size: Int
        let depth: Int
        let isRandom: Bool
        let count: Int
        var bytes: Double { Double(size) * Double(count) }
    }

    static let imageSize = 1 << 30
    static let loads = [
        Load(name: "sequential 1 MiB, depth 4", size: 1 << 20, depth: 4, isRandom: false, count: 1024),
        Load(name: "random 4 KiB, depth 1", size: 4096, depth: 1, isRandom: true, count: 10_000),
        Load(name: "random 4 KiB, depth 64", size: 4096, depth: 64, isRandom: true, count: 40_000),
    ]

    static func run(_ setup: Setup) throws -> [Row] {
        let raw = "\(setup.work)/disk.raw"
        let qcow2 = "\(setup.work)/disk.qcow2"
        try makeImage(raw)
        _ = try Child.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2])
        defer { for path in [raw, qcow2] { unlink(path) } }
        var rows: [Row] = []
        for load in loads {
            let drivers = [try DiskDriver(raw), try DiskDriver(qcow2)]
            let seconds = try interleave(
                setup.runs,
                [
                    { try drivers[0].read(load) },
                    { try fio(load, raw) },
                    { try qemuImage(load, raw, "raw") },
                    { try drivers[1].read(load) },
                    { try qemuImage(load, qcow2, "qcow2") },
                ])
            // Throughput for large reads, requests for small ones.
            let unit = load.isRandom ? "1000/s" : "MiB/s"
            let samples = seconds.map {
                Sample($0.map { load.isRandom ? Double(load.count) / $0 / 1e3 : load.bytes / $0 / 1_048_576 })
            }
            rows += [
                Row(name: "raw: \(load.name)", unit: unit, ours: samples[0], peer: ("fio, io_uring", samples[1])),
                Row(
                    name: "raw: \(load.name)", unit: unit, ours: samples[0],
                    peer: ("qemu-img bench, io_uring", samples[2])),
                Row(
                    name: "qcow2: \(load.name)", unit: unit, ours: samples[3],
                    peer: ("qemu-img bench, io_uring", samples[4])),
            ]
        }
        return rows
    }

    /// Creates a file without holes or zeroes, which is then in the page cache.
    private static func makeImage(_ path: String) throws {
        let file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
        guard file >= 0 else { throw BenchError("cannot create \(path)") }
        defer { close(file) }
        var words = [UInt64](repeating: 0, count: 1 << 17)
        var random = Random()
        for index in words.indices { words[index] = random.next() }
        for number in 0..<(imageSize >> 20) {
            words[0] = UInt64(number)
            guard words.withUnsafeBytes({ write(file, $0.baseAddress, $0.count) }) == 1 << 20 else {
                throw BenchError("cannot fill \(path)")
            }
        }
    }

    /// fio's own figure, which excludes its start.
    private static func fio(_ load: Load, _ path: String) throws -> Double {
        let output = try Child.run([
            "fio", "--name=bench", "--filename=\(path)", "--readonly", "--ioengine=io_uring",
            "--rw=\(load.isRandom ? "randread" : "read")",
            "--bs=\(load.size)", "--iodepth=\(load.depth)", "--size=\(imageSize)",
            "--io_size=\(load.size * load.count)", "--norandommap",
            "--invalidate=0", "--thread", "--output-format=json",
        ]).output
        return Double(load.count) / (try number(after: "\"iops\" :", in: output))
    }

    /// qemu-img's own figure. Its "random" is a long step through the image, repeatedly.
    private static func qemuImage(_ load: Load, _ path: String, _ format: String) throws -> Double {
        let step = load.isRandom ? 4096 * 65_537 : load.size
        let output = try Child.run([
            "qemu-img", "bench", "-f", format, "-t", "writeback", "-i", "io_uring", "-c", String(load.count), "-d",
            String(load.depth),
            "-s", String(load.size), "-S", String(step), path,
        ]).output
        return try number(after: "Run completed in", in: output)
    }
}

/// The same sequence each time (xorshift64).
struct Random {
    private var state: UInt64 = 0x1234_5678_9abc_def1

    mutating func next() -> UInt64 {
        state ^= state << 13
        state ^= state >> 7
        state ^= state << 17
        return state
    }
}

/// The driver of a virtio block device (virtio 1.2 §5.2): `depth` requests of three descriptors each in flight.
private final class DiskDriver {
    private let device: BlockDevice
    private let driver: VirtioDriver
    private var random = Random()

    init(_ path: String) throws {
        device = try BlockDevice(
            name: "blk0", image: try DiskImage(path: path, options: DiskImageOptions(readOnly: true)))
        driver = try VirtioDriver(device, memory: try GuestMemory(size: 64 << 20), features: 0)
    }

    /// Performs all reads of a load. Returns seconds.
    func read(_ load: DiskBench.Load) throws -> Double {
        let headers = driver.buffers
        let data = driver.buffers + 0x1_0000
        for slot in 0..<UInt16(load.depth) {
            let header = headers + 32 * UInt64(slot), first = 3 * slot
            clinux_store64(driver.host(header), 0)  // VIRTIO_BLK_T_IN
            driver.queues[0].describe(first, header, 16, isWritable: false, next: first + 1)
            driver.queues[0].describe(
                first + 1, data + UInt64(load.size) * UInt64(slot), UInt32(load.size), isWritable: true, next: first + 2
            )
            driver.queues[0].describe(first + 2, header + 16, 1, isWritable: true)
        }
        var free = (0..<UInt16(load.depth)).map { 3 * $0 }
        let places = DiskBench.imageSize / load.size
        var started = 0
        var done = 0
        return try time {
            while done < load.count {
                while started < load.count, let head = free.popLast() {
                    let place = load.isRandom ? Int(random.next() % UInt64(places)) : started % places
                    let header = driver.host(headers + 32 * UInt64(head / 3))
                    clinux_store64(header + 8, UInt64(place * load.size / 512))
                    clinux_store8(header + 16, 0xff)
                    driver.queues[0].offer(head)
                    started += 1
                }
                driver.publish(0)
                try driver.wait(0)
                while let (head, written) = driver.queues[0].take() {
                    guard clinux_load8(driver.host(headers + 32 * UInt64(head / 3) + 16)) == 0,
                        written == UInt32(load.size) + 1
                    else {
                        throw BenchError("a read failed")
                    }
                    free.append(head)
                    done += 1
                }
            }
        }
    }
}
