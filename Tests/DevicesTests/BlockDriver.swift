// SPDX-License-Identifier: Apache-2.0

@testable import Devices
import DiskImage
import Glibc
import GuestMemory
import Linux
import Testing
@testable import Virtio

/// A driver of a block device.
final class BlockDriver: QueueDriver {
    let device: BlockDevice

    init(
        _ device: BlockDevice, features: FeatureSet = [.version1, .blockFlush, .indirectDescriptors], queues: Int = 1
    ) throws {
        self.device = device
        try super.init(driving: device, features: features, queues: queues)
    }

    // MARK: - Requests

    static func header(_ type: UInt32, _ sector: UInt64) -> [UInt8] {
        var bytes: [UInt8] = []
        for shift in 0..<4 { bytes.append(UInt8(truncatingIfNeeded: type >> UInt32(8 * shift))) }
        bytes += [0, 0, 0, 0]
        for shift in 0..<8 { bytes.append(UInt8(truncatingIfNeeded: sector >> UInt64(8 * shift))) }
        return bytes
    }

    /// One request from start to end, framed as `cuts` say: the lengths of the readable buffers and of the writable
    /// ones, which together hold header and data to the device, data from it and status. Returns the status, the used
    /// length and what was written.
    func request(
        _ type: UInt32, sector: UInt64 = 0, out: [UInt8] = [], in count: Int = 0, readable: [Int]? = nil,
        writable: [Int]? = nil,
        header: [UInt8]? = nil
    ) throws -> (status: UInt8, used: UInt32, data: [UInt8]) {
        let bytes = (header ?? Self.header(type, sector)) + out
        var buffers: [Buffer] = []
        var address = Self.data
        try ram.write(bytes, at: GuestAddress(address))
        for length in readable ?? [16, out.count].filter({ $0 > 0 }) {
            buffers.append(Buffer(address: address, length: length, isWritable: false))
            address += UInt64(length)
        }
        let start = Self.data + 0x40_0000
        try ram.fill(at: GuestAddress(start), count: UInt64(count + 1), with: 0xee)
        address = start
        for length in writable ?? [count, 1].filter({ $0 > 0 }) {
            buffers.append(Buffer(address: address, length: length, isWritable: true))
            address += UInt64(length)
        }
        let head = try offer(buffers)
        kick()
        try wait(for: 1)
        let answer = try ram.readBytes(at: GuestAddress(start), count: count + 1)
        return (answer[count], written[head] ?? .max, Array(answer[..<count]))
    }
}

/// A directory that goes with the value, with one raw disk in it.
final class TemporaryDisk {
    let path: String
    private let directory: String

    init(_ bytes: [UInt8]) throws {
        var template = Array(
            "\(unsafe getenv("TMPDIR").map { unsafe String(cString: $0) } ?? P_tmpdir)/swkvm-block.\(String(repeating: "X", count: 6))"
                .utf8CString)
        directory = unsafe template.withUnsafeMutableBufferPointer { unsafe String(cString: mkdtemp($0.baseAddress!)) }
        path = directory + "/disk.raw"
        let file = try FileDescriptor.open(path, O_WRONLY | O_CREAT, mode: 0o600)
        try file.writeAll(bytes)
    }

    deinit {
        unsafe unlink(path)
        unsafe rmdir(directory)
    }

    func contents() throws -> [UInt8] { try readFile(path, limit: 1 << 30) }

    func device(
        readOnly: Bool = false, serial: String? = nil, queues: Int = 1, usesRing: Bool = true
    ) throws -> BlockDevice {
        try BlockDevice(
            name: "blk0", image: DiskImage(path: path, options: DiskImageOptions(readOnly: readOnly)), serial: serial,
            queues: queues,
            queueSize: UInt16(BlockDriver.queueSize), usesRing: usesRing)
    }

    /// Bytes that tell where they are.
    static func pattern(_ count: Int, seed: Int = 0) -> [UInt8] {
        (0..<count).map { UInt8(truncatingIfNeeded: ($0 &+ seed &* 7919) &* 2_654_435_761 >> 11) }
    }
}
