// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// A block device over a file, as a volume or a disk on the network is one to us; it goes with the value.
private final class LoopDevice: Sendable {
    let path: String

    init(_ file: String, sector: Int) throws {
        // A device that another test has just released may be busy for a moment.
        var made = run(["losetup", "--find", "--show", "--sector-size", "\(sector)", file])
        for _ in 0..<50 where made.status != 0 {
            usleep(20_000)
            made = run(["losetup", "--find", "--show", "--sector-size", "\(sector)", file])
        }
        try #require(made.status == 0, "\(made.output)")
        path = made.output.split(separator: "\n").last.map(String.init) ?? ""
    }

    deinit { _ = run(["losetup", "--detach", path]) }
}

/// Why loop devices cannot be had, or nil.
private let missing: String? =
    geteuid() != 0 ? "losetup needs root" : unsafe access("/dev/loop-control", F_OK) != 0 ? "no /dev/loop-control" : nil

@Suite(.timed, .disabled(if: missing != nil, "\(missing ?? "")"), .serialized) struct BlockDeviceImageTests {
    let directory = TemporaryDirectory()

    private func device(_ size: Int, sector: Int = 512) throws -> LoopDevice {
        let path = directory.file("volume")
        let file = try FileDescriptor.open(path, O_RDWR | O_CREAT, mode: 0o600)
        #expect(ftruncate(file.rawValue, off_t(size)) == 0)
        return try LoopDevice(path, sector: sector)
    }

    @Test(arguments: [(512, CacheMode.writeback), (512, .none), (4096, .writeback), (4096, .none)])
    func raw(sector: Int, cache: CacheMode) throws {
        let device = try device(4 << 20, sector: sector)
        var model = [UInt8](repeating: 0, count: 4 << 20)
        do {
            var engine = try DiskEngine(
                DiskImage(path: device.path, options: DiskImageOptions(format: .raw, cache: cache)))
            let size = engine.image.size
            #expect(size == 4 << 20)
            // Aligned to the device's sectors, to our own only, and at the very end.
            for (offset, count) in [(8192, 65536), (512, 1024), (1_000_448, 3584), ((4 << 20) - 512, 512)] {
                let piece = randomBytes(count, seed: UInt64(offset))
                try engine.write(UInt64(offset), piece)
                model.replaceSubrange(offset..<offset + count, with: piece)
            }
            try engine.perform(.writeZeroes, at: 16384, length: 8192)
            try engine.perform(.writeZeroesUnmapping, at: 32768, length: 8192)
            for start in [16384, 32768] {
                model.replaceSubrange(start..<start + 8192, with: [UInt8](repeating: 0, count: 8192))
            }
            try engine.perform(.discard, at: 49152, length: 4096)
            let discarded = try engine.read(49152, 4096)
            #expect(discarded.allSatisfy { $0 == 0 } || discarded.elementsEqual(model[49152..<53248]))
            model.replaceSubrange(49152..<53248, with: discarded)
            #expect(throws: DiskImageError.self) { try engine.write(4 << 20, [UInt8](repeating: 1, count: 512)) }
            try engine.perform(.flush)
            #expect(try engine.readAll() == model)
            // A volume is one writer's.
            #expect(
                openError(device.path, DiskImageOptions(format: .raw)) == .locked(path: device.path, forWriting: true))
        }
        #expect(try directory.read("volume") == model)
    }

    @Test func itsNameSaysNoFormat() throws {
        let device = try device(1 << 20)
        #expect(openError(device.path) == .formatUnknown(path: device.path))
    }

    @Test(arguments: ToolCache.allCases) func conversionOntoADevice(cache: ToolCache) throws {
        // The device has old contents where the disk has zeroes and holes.
        let device = try device(6 << 20)
        var old = try DiskEngine(DiskImage(path: device.path, options: DiskImageOptions(format: .raw)))
        try old.write(0, [UInt8](repeating: 0xee, count: 6 << 20))
        try old.perform(.flush)
        _ = consume old
        let data = randomBytes(3 << 20, seed: 8)
        let source = try directory.write("source.raw", data + [UInt8](repeating: 0, count: 2 << 20))
        qemuImage("convert", "-O", "qcow2", source, directory.file("source.qcow2"))
        var conversion = ImageConversion(source: directory.file("source.qcow2"), target: device.path, format: .raw)
        conversion.cache = cache
        conversion.durably = true
        #expect(throws: DiskImageError.exists(path: device.path)) { try conversion.run() }
        conversion.replacing = true
        try conversion.run()
        let made = try directory.read("volume")
        #expect(made.prefix(3 << 20).elementsEqual(data))
        #expect(unsafe memcmp(Array(made[(3 << 20)..<(5 << 20)]), [UInt8](repeating: 0, count: 2 << 20), 2 << 20) == 0)
        // What is behind the disk is not the conversion's.
        #expect(made[5 << 20] == 0xee)
    }

    @Test func conversionOntoADeviceThatIsTooSmall() throws {
        let device = try device(1 << 20)
        let source = try directory.write("source.raw", [UInt8](repeating: 1, count: 2 << 20))
        var conversion = ImageConversion(source: source, target: device.path, format: .raw)
        conversion.replacing = true
        #expect(throws: DiskImageError.tooSmall(path: device.path, needed: 2 << 20, size: 1 << 20)) {
            try conversion.run()
        }
    }

    /// A file system that the host has mounted is not overwritten, whatever the user forces.
    @Test func aMountedDeviceIsNoTarget() throws {
        let device = try device(4 << 20), place = directory.file("mounted")
        #expect(run(["mkfs.ext4", "-q", device.path]).status == 0)
        #expect(run(["mkdir", place]).status == 0 && run(["mount", "-o", "ro", device.path, place]).status == 0)
        let before = run(["sha256sum", device.path]).output
        var conversion = ImageConversion(
            source: try directory.write("new.raw", randomBytes(1 << 20, seed: 3)), target: device.path, format: .raw)
        conversion.replacing = true
        #expect(throws: DiskImageError.deviceInUse(path: device.path)) { try conversion.run() }
        #expect(run(["sha256sum", device.path]).output == before)
        #expect(run(["umount", place]).status == 0)
        try conversion.run()
    }

    /// A volume whose size does not change holds a qcow2 image, which needs room at the end as it grows.
    @Test func qcow2OnADevice() throws {
        let device = try device(4 << 20)
        let image = directory.file("image.qcow2")
        qemuImage("create", "-f", "qcow2", image, "8M")
        #expect(run(["dd", "if=\(image)", "of=\(device.path)", "bs=64k", "conv=fsync"]).status == 0)
        let data = randomBytes(1 << 20, seed: 9)
        do {
            var engine = try DiskEngine(DiskImage(path: device.path, options: DiskImageOptions(format: .qcow2)))
            try engine.write(1 << 20, data)
            try engine.perform(.flush)
            // More than the volume has.
            var failed: Int32 = 0
            for number in 2..<8 {
                do { try engine.write(UInt64(number) << 20, data) } catch DiskImageError.request(_, let error) {
                    failed = error.errno
                }
            }
            #expect(failed == ENOSPC)
            #expect(try engine.read(1 << 20, 1 << 20) == data)
        }
        let check = run(["qemu-img", "check", "-f", "qcow2", device.path])
        #expect(check.status == 0 || check.status == 3, "\(check.output)")
        var engine = try DiskEngine(
            DiskImage(path: device.path, options: DiskImageOptions(format: .qcow2, readOnly: true)))
        #expect(try engine.read(1 << 20, 1 << 20) == data)
    }
}
