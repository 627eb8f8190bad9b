// SPDX-License-Identifier: Apache-2.0

import CLinux
import TestSupport
import Testing

@testable import GuestMemory
@testable import Virtio

/// A guest of two small regions, in which the tests play the driver.
struct TestGuest {
    static let lowSize: UInt64 = 1 << 20
    static let highStart: UInt64 = 4 << 30
    static let highSize: UInt64 = 1 << 20

    let memory: GuestMemory
    var ram: GuestRAM { memory.ram }

    init() throws {
        memory = try GuestMemory(
            layout: [(GuestAddress(0), Self.lowSize), (GuestAddress(Self.highStart), Self.highSize)],
            backing: .anonymous,
            shared: false)
    }
}

/// One buffer of a request, as a driver describes it.
struct Buffer {
    var address: UInt64
    var length: UInt32
    var isWritable = false

    static func read(_ address: UInt64, _ length: UInt32) -> Buffer { Buffer(address: address, length: length) }
    static func write(_ address: UInt64, _ length: UInt32) -> Buffer {
        Buffer(address: address, length: length, isWritable: true)
    }
}

let nextFlag: UInt16 = 1
let writeFlag: UInt16 = 2
let indirectFlag: UInt16 = 4

/// The driver's side of a queue, its rings in guest RAM. It does what the test asks, right or wrong.
struct DriverQueue {
    let ram: GuestRAM
    var configuration: QueueConfiguration
    private(set) var availableIndex: UInt16 = 0
    var seenUsed: UInt16 = 0

    var size: UInt16 { UInt16(configuration.size) }

    /// A ready queue whose rings begin at `base`.
    init(_ guest: TestGuest, index: Int = 0, size: UInt16 = 8, base: UInt64 = 0x1000) {
        ram = guest.ram
        configuration = QueueConfiguration(index: index, maximumSize: size)
        configuration.descriptorTable = GuestAddress(base)
        configuration.availableRing = GuestAddress(base + UInt64(size) * 16)
        configuration.usedRing = GuestAddress((base + UInt64(size) * 18 + 6 + 3) & ~3)
        configuration.isReady = true
    }

    func device(_ features: FeatureSet = .version1) throws -> Virtqueue {
        try Virtqueue(configuration, features: features, ram: ram)
    }

    /// What is wrong with the queue's size or rings.
    var setupError: VirtqueueError? {
        do throws(VirtqueueError) {
            try configuration.validate([], in: ram)
            return nil
        } catch {
            return error
        }
    }

    // MARK: Descriptors

    func describe(
        _ index: UInt16, _ address: UInt64, _ length: UInt32, flags: UInt16 = 0, next: UInt16 = 0, table: UInt64? = nil
    ) throws {
        let entry = GuestAddress(table ?? configuration.descriptorTable.rawValue) &+ UInt64(index) * 16
        try ram.write(address, at: entry)
        try ram.write(length, at: entry &+ 8)
        try ram.write(flags, at: entry &+ 12)
        try ram.write(next, at: entry &+ 14)
    }

    /// Writes a chain into consecutive descriptors from `head` on.
    func chain(_ buffers: [Buffer], at head: UInt16 = 0, table: UInt64? = nil) throws {
        for (offset, buffer) in buffers.enumerated() {
            let index = head + UInt16(offset), isLast = offset == buffers.count - 1
            try describe(
                index, buffer.address, buffer.length,
                flags: (buffer.isWritable ? writeFlag : 0) | (isLast ? 0 : nextFlag),
                next: isLast ? 0 : index + 1, table: table)
        }
    }

    // MARK: Rings

    mutating func offer(_ heads: UInt16...) throws {
        for head in heads {
            try ram.write(head, at: configuration.availableRing &+ (4 + 2 * UInt64(availableIndex % size)))
            availableIndex &+= 1
        }
        try setAvailableIndex(availableIndex)
    }

    mutating func setAvailableIndex(_ index: UInt16) throws {
        availableIndex = index
        try ram.write(index, at: configuration.availableRing &+ 2)
    }

    func setAvailableFlags(_ flags: UInt16) throws { try ram.write(flags, at: configuration.availableRing) }
    func setUsedEvent(_ index: UInt16) throws {
        try ram.write(index, at: configuration.availableRing &+ (4 + 2 * UInt64(size)))
    }
    func usedFlags() throws -> UInt16 { try ram.readUInt16(at: configuration.usedRing) }
    func usedIndex() throws -> UInt16 { try ram.readUInt16(at: configuration.usedRing &+ 2) }
    func availableEvent() throws -> UInt16 { try ram.readUInt16(at: configuration.usedRing &+ (4 + 8 * UInt64(size))) }

    func used(_ index: UInt16) throws -> (head: UInt32, written: UInt32) {
        let entry = configuration.usedRing &+ (4 + 8 * UInt64(index % size))
        return (try ram.readUInt32(at: entry), try ram.readUInt32(at: entry &+ 4))
    }
}

extension Virtqueue {
    /// What one pop gives, in a list of its own that is alive while `body` looks at it.
    mutating func popped<Result>(
        capacity: Int? = nil, _ body: (inout DescriptorChain?) throws -> Result
    ) throws -> Result {
        let pool = IOVectorPool(slots: 1, capacity: capacity ?? Int(size))
        var chain = try pop(into: pool[0])
        return try body(&chain)
    }

    /// Takes a chain and returns it at once.
    mutating func complete(written: UInt32 = 0) throws {
        let head = try popped { try #require($0).head }
        push(head, written: written)
    }

    /// The error of one pop, or nil when it gave a chain or nothing. The list has more room than a chain may take.
    mutating func popError() -> VirtqueueError? {
        let pool = IOVectorPool(slots: 1, capacity: Int(size) + 8)
        do throws(VirtqueueError) {
            _ = try pop(into: pool[0])
            return nil
        } catch {
            return error
        }
    }
}

extension IOVectors {
    /// A copy of all the bytes.
    var bytes: [UInt8] {
        var bytes = [UInt8](repeating: 0, count: Int(byteCount))
        let count = unsafe bytes.withUnsafeMutableBytes { unsafe copy(to: $0) }
        return Array(bytes.prefix(count))
    }

    /// The lengths of the pieces.
    var lengths: [Int] { (0..<count).map { unsafe base[$0].iov_len } }
}
