@testable import Devices
import DiskImage
import Glibc
import GuestMemory
import Linux
import Testing
@testable import Virtio

/// A driver of a block device: a queue in guest RAM and the registers of the transport.
final class BlockDriver {
    /// A buffer of a chain.
    struct Buffer {
        let address: UInt64
        let length: Int
        let isWritable: Bool
    }

    static let queueSize = 64
    static let table = GuestAddress(0x1_0000), available = GuestAddress(0x2_0000), used = GuestAddress(0x3_0000)
    /// Memory for headers and data begins here.
    static let data: UInt64 = 0x10_0000

    let memory: GuestMemory
    let ram: GuestRAM
    let device: BlockDevice
    let transport: MMIOTransport
    private var nextDescriptor = 0
    private var nextAvailable: UInt16 = 0
    private var seenUsed: UInt16 = 0
    /// What used entries said, by head.
    private(set) var written: [UInt32: UInt32] = [:]

    init(_ device: BlockDevice, features: FeatureSet = [.version1, .blockFlush, .indirectDescriptors]) throws {
        memory = try GuestMemory(size: 16 << 20)
        ram = memory.ram
        self.device = device
        transport = try MMIOTransport(device: device, memory: memory)
        try start(features)
    }

    deinit { write(0x070, 0) }

    func write(_ register: UInt64, _ value: UInt32) { transport.write(UInt64(value), at: register, size: 4) }
    func read(_ register: UInt64) -> UInt32 { UInt32(truncatingIfNeeded: transport.read(at: register, size: 4)) }
    func configuration(_ offset: UInt64, _ size: Int) -> UInt64 { transport.read(at: 0x100 + offset, size: size) }

    /// Resets the device and sets it up.
    func start(_ features: FeatureSet) throws {
        write(0x070, 0)
        nextDescriptor = 0
        nextAvailable = 0
        seenUsed = 0
        written = [:]
        for ring in [Self.table, Self.available, Self.used] { try ram.fill(at: ring, count: 0x1000) }
        for status: UInt32 in [1, 3] { write(0x070, status) }
        for half: UInt64 in [0, 1] {
            write(0x024, UInt32(half))
            write(0x020, UInt32(truncatingIfNeeded: features.rawValue >> (32 * half)))
        }
        write(0x070, 11)
        try #require(read(0x070) == 11)
        write(0x030, 0)
        write(0x038, UInt32(Self.queueSize))
        for (register, ring) in [(0x080 as UInt64, Self.table), (0x090, Self.available), (0x0a0, Self.used)] {
            write(register, UInt32(truncatingIfNeeded: ring.rawValue))
            write(register + 4, 0)
        }
        write(0x044, 1)
        write(0x070, 15)
        try #require(read(0x070) == 15)
    }

    /// Puts a chain on the available ring; its head.
    func offer(_ buffers: [Buffer]) throws -> UInt32 {
        let head = nextDescriptor
        for (index, buffer) in buffers.enumerated() {
            let entry = GuestAddress(Self.table.rawValue + UInt64(nextDescriptor % Self.queueSize) * 16)
            let hasNext = index + 1 < buffers.count
            try ram.write(buffer.address, at: entry)
            try ram.write(UInt32(buffer.length), at: entry &+ 8)
            try ram.write(UInt16((hasNext ? 1 : 0) | (buffer.isWritable ? 2 : 0)), at: entry &+ 12)
            nextDescriptor = (nextDescriptor + 1) % Self.queueSize
            try ram.write(UInt16(hasNext ? nextDescriptor : 0), at: entry &+ 14)
        }
        try ram.write(UInt16(head), at: Self.available &+ (4 + 2 * UInt64(nextAvailable % UInt16(Self.queueSize))))
        nextAvailable &+= 1
        try ram.write(nextAvailable, at: Self.available &+ 2)
        return UInt32(head)
    }

    func kick() { write(0x050, 0) }

    /// Waits until as many chains as given have come back, beyond those seen before.
    func wait(for count: Int) throws {
        let wanted = seenUsed &+ UInt16(count)
        while try ram.readUInt16(at: Self.used &+ 2) != wanted { transport.interrupt.line.wait() }
        while seenUsed != wanted {
            let entry = Self.used &+ (4 + 8 * UInt64(seenUsed % UInt16(Self.queueSize)))
            written[try ram.readUInt32(at: entry)] = try ram.readUInt32(at: entry &+ 4)
            seenUsed &+= 1
        }
    }

    // MARK: - Requests

    static func header(_ type: UInt32, _ sector: UInt64) -> [UInt8] {
        var bytes: [UInt8] = []
        for shift in 0..<4 { bytes.append(UInt8(truncatingIfNeeded: type >> UInt32(8 * shift))) }
        bytes += [0, 0, 0, 0]
        for shift in 0..<8 { bytes.append(UInt8(truncatingIfNeeded: sector >> UInt64(8 * shift))) }
        return bytes
    }

    /// One request from start to end, framed as `cuts` say: the lengths of the readable buffers and of the writable ones, which
    /// together hold header and data to the device, data from it and status. Returns the status, the used length and what was written.
    func request(
        _ type: UInt32, sector: UInt64 = 0, out: [UInt8] = [], in count: Int = 0, readable: [Int]? = nil, writable: [Int]? = nil,
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
        var template = Array("\(unsafe getenv("TMPDIR").map { unsafe String(cString: $0) } ?? P_tmpdir)/swkvm-block.\(String(repeating: "X", count: 6))".utf8CString)
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

    func device(readOnly: Bool = false, serial: String? = nil, usesRing: Bool = true) throws -> BlockDevice {
        try BlockDevice(
            name: "blk0", image: DiskImage(path: path, options: DiskImageOptions(readOnly: readOnly)), serial: serial,
            queueSize: UInt16(BlockDriver.queueSize), usesRing: usesRing)
    }

    /// Bytes that tell where they are.
    static func pattern(_ count: Int, seed: Int = 0) -> [UInt8] {
        (0..<count).map { UInt8(truncatingIfNeeded: ($0 &+ seed &* 7919) &* 2_654_435_761 >> 11) }
    }
}
