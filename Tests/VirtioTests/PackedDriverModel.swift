// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@testable import GuestMemory
@testable import Virtio

/// The driver's side of a packed virtqueue, its ring in guest RAM. It keeps the rules unless it is told otherwise.
struct PackedDriverQueue {
    let ram: GuestRAM
    var configuration: QueueConfiguration
    /// Place and wrap counter of the next descriptor to be made available, and of the next one to become used.
    private(set) var nextAvailable: UInt16 = 0
    private(set) var availableWrap = true
    private(set) var nextUsed: UInt16 = 0
    private(set) var usedWrap = true
    /// Descriptors of each chain in the ring, by its buffer ID.
    private var lengths: [UInt16: UInt16] = [:]

    private static let availableFlag: UInt16 = 0x80
    private static let usedFlag: UInt16 = 0x8000

    var size: UInt16 { UInt16(configuration.size) }

    init(_ guest: TestGuest, size: UInt16 = 8, base: UInt64 = 0x1000) throws {
        ram = guest.ram
        configuration = QueueConfiguration(index: 0, maximumSize: size)
        configuration.descriptorTable = GuestAddress(base)
        configuration.availableRing = GuestAddress(base + UInt64(size) * 16)
        configuration.usedRing = GuestAddress(base + UInt64(size) * 16 + 4)
        configuration.isReady = true
        try ram.fill(at: configuration.descriptorTable, count: UInt64(size) * 16 + 8)
    }

    func device(_ features: FeatureSet = [.version1, .packedRing]) throws -> Virtqueue {
        try Virtqueue(configuration, features: features, ram: ram)
    }

    // MARK: Descriptors

    /// Writes a descriptor without regard to the driver's place.
    func describe(
        _ index: UInt16, _ address: UInt64, _ length: UInt32, id: UInt16 = 0, flags: UInt16, table: UInt64? = nil
    ) throws {
        let entry = GuestAddress(table ?? configuration.descriptorTable.rawValue) &+ UInt64(index) * 16
        try ram.write(address, at: entry)
        try ram.write(length, at: entry &+ 8)
        try ram.write(id, at: entry &+ 12)
        try ram.write(flags, at: entry &+ 14)
    }

    /// The flags by which this descriptor is available, if the driver reaches it with this wrap counter.
    static func available(_ wrap: Bool) -> UInt16 { wrap ? availableFlag : usedFlag }

    /// Makes a chain available.
    mutating func offer(_ buffers: [Buffer], id: UInt16) throws {
        var descriptors: [(Buffer, flags: UInt16)] = buffers.map { ($0, $0.isWritable ? writeFlag : 0) }
        for index in descriptors.indices.dropLast() { descriptors[index].flags |= nextFlag }
        try offer(descriptors, id: id)
    }

    /// Makes a chain available that is an indirect table with these buffers.
    mutating func offerIndirect(_ buffers: [Buffer], table: UInt64, id: UInt16) throws {
        for (index, buffer) in buffers.enumerated() {
            try describe(
                UInt16(index), buffer.address, buffer.length, flags: buffer.isWritable ? writeFlag : 0, table: table)
        }
        try offer([(.read(table, UInt32(buffers.count) * 16), flags: indirectFlag)], id: id)
    }

    /// Makes descriptors available whose flags are complete but for AVAIL and USED; the first one's last.
    mutating func offer(_ descriptors: [(Buffer, flags: UInt16)], id: UInt16) throws {
        let start = nextAvailable, startWrap = availableWrap
        for (place, (buffer, flags)) in descriptors.enumerated() {
            // Only the last one has the ID; the others' means nothing.
            let isLast = place == descriptors.count - 1
            try describe(
                nextAvailable, buffer.address, buffer.length, id: isLast ? id : 0xdead,
                flags: flags | (place == 0 ? Self.available(!startWrap) : Self.available(availableWrap)))
            nextAvailable += 1
            if nextAvailable == size { (nextAvailable, availableWrap) = (0, !availableWrap) }
        }
        try ram.write(
            descriptors[0].flags | Self.available(startWrap),
            at: configuration.descriptorTable &+ (UInt64(start) * 16 + 14))
        lengths[id] = UInt16(descriptors.count)
    }

    // MARK: Used descriptors

    /// Takes the next used chain; nil if there is none.
    mutating func takeUsed() throws -> (id: UInt16, written: UInt32?)? {
        let entry = configuration.descriptorTable &+ UInt64(nextUsed) * 16
        let flags = try ram.readUInt16(at: entry &+ 14)
        let both = Self.availableFlag | Self.usedFlag
        guard flags & both == (usedWrap ? both : 0) else { return nil }
        let id = try ram.readUInt16(at: entry &+ 12)
        let known = lengths.removeValue(forKey: id)
        let length = try #require(known, "a chain that is not in flight: \(id)")
        nextUsed += length
        if nextUsed >= size { (nextUsed, usedWrap) = (nextUsed - size, !usedWrap) }
        return (id, flags & writeFlag == 0 ? nil : try ram.readUInt32(at: entry &+ 8))
    }

    /// The next used chain, which must be there.
    mutating func mustHaveUsed() throws -> (id: UInt16, written: UInt32?) {
        let used = try takeUsed()
        return try #require(used)
    }

    /// The place of the next used descriptor as an event suppression structure has it.
    var usedEvent: UInt16 { nextUsed | (usedWrap ? 0x8000 : 0) }
    var availableEvent: UInt16 { nextAvailable | (availableWrap ? 0x8000 : 0) }

    // MARK: Event suppression

    func setDriverEvents(place: UInt16 = 0, flags: UInt16) throws {
        try ram.write(place, at: configuration.availableRing)
        try ram.write(flags, at: configuration.availableRing &+ 2)
    }

    func deviceEvents() throws -> (place: UInt16, flags: UInt16) {
        (try ram.readUInt16(at: configuration.usedRing), try ram.readUInt16(at: configuration.usedRing &+ 2))
    }
}
