// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import GuestMemory

/// A request of the driver: the buffers of one descriptor chain, all checked and copied to private iovecs.
///
/// What the driver changes in its descriptors afterwards changes nothing here.
public struct DescriptorChain: BitwiseCopyable, Sendable {
    /// The number by which the chain is returned to the driver (``Virtqueue/push(_:written:)``), below the queue's
    /// size. No two chains in flight of a rule-abiding driver have the same. In a split virtqueue it is the first
    /// descriptor.
    public let head: UInt16
    /// The buffers that the device reads.
    public var readable: IOVectors
    /// The buffers that the device writes.
    public var writable: IOVectors
    /// iovecs that the chain took in its list; the next chain can go behind them.
    public let entries: Int
}

/// The flags of a descriptor (virtio 1.2 §2.7.5, §2.8.2).
private enum DescriptorFlag {
    static let next: UInt16 = 1
    static let write: UInt16 = 2
    static let indirect: UInt16 = 4
}

/// A descriptor, copied from guest RAM in two loads so that it is read once.
private struct Descriptor {
    let address: GuestAddress
    let length: UInt32
    let flags: UInt16
    /// The next descriptor of a split virtqueue's chain, or the buffer ID of a packed one's.
    let link: UInt16

    /// A descriptor of a split virtqueue: address, length, flags, next (§2.7.5).
    init(split table: GuestSlice, at index: UInt32) {
        let offset = Int(index) &* 16
        address = GuestAddress(table.load64(offset))
        let rest = table.load64(offset &+ 8)
        length = UInt32(truncatingIfNeeded: rest)
        flags = UInt16(truncatingIfNeeded: rest >> 32)
        link = UInt16(truncatingIfNeeded: rest >> 48)
    }

    /// A descriptor of a packed virtqueue: address, length, buffer ID, flags (§2.8.13).
    init(packed table: GuestSlice, at index: UInt32) {
        let offset = Int(index) &* 16
        address = GuestAddress(table.load64(offset))
        let rest = table.load64(offset &+ 8)
        length = UInt32(truncatingIfNeeded: rest)
        link = UInt16(truncatingIfNeeded: rest >> 32)
        flags = UInt16(truncatingIfNeeded: rest >> 48)
    }

    func has(_ flag: UInt16) -> Bool { flags & flag != 0 }
}

/// Checks the buffers of one chain in the driver's order, and appends them to a list.
///
/// Descriptors, those of an indirect table included, are at most as many as the queue's size; that also ends a loop. A
/// descriptor of length zero is legal and counted, has no buffer, and its address is not checked.
private struct ChainBuilder {
    let ram: GuestRAM
    let list: IOVectorList
    let first: Int
    let head: UInt16
    let limit: Int

    private var seen = 0
    private var entries = 0
    private var readableEntries = 0
    private var readableBytes: UInt64 = 0
    private var writableBytes: UInt64 = 0
    private var isWriting = false

    init(_ head: UInt16, size: UInt16, ram: GuestRAM, into list: IOVectorList, from first: Int) {
        self.ram = ram
        self.list = list
        self.first = first
        self.head = head
        limit = Int(size)
    }

    @inline(__always)
    mutating func add(_ descriptor: Descriptor) throws(VirtqueueError) {
        guard seen < limit else { throw .chainTooLong(head: head, limit: limit) }
        seen &+= 1

        if descriptor.has(DescriptorFlag.write) {
            isWriting = true
            writableBytes &+= UInt64(descriptor.length)
        } else {
            guard !isWriting else { throw .readableAfterWritable(head: head) }
            readableBytes &+= UInt64(descriptor.length)
        }
        // §2.7.5.2, §2.8.8: a driver adds no chain of more than 2^32 bytes.
        guard readableBytes &+ writableBytes <= 1 << 32 else { throw .chainTooLarge(head: head) }
        guard descriptor.length > 0 else { return }
        guard let buffer = unsafe ram.iovec(for: descriptor.address, count: UInt64(descriptor.length)) else {
            throw .bufferOutsideRAM(descriptor.address, count: descriptor.length)
        }
        guard entries < list.capacity &- first else {
            throw .chainTooLong(head: head, limit: list.capacity &- first)
        }
        // first + entries is within the list's capacity.
        unsafe list.base[first &+ entries] = buffer
        entries &+= 1
        if !isWriting { readableEntries &+= 1 }
    }

    /// The table that an indirect descriptor refers to, which must end the chain. It may stand anywhere in RAM and may
    /// be larger than its chain. The WRITE flag of such a descriptor means nothing (§2.7.5.3.2).
    func indirectTable(_ descriptor: Descriptor, isAllowed: Bool) throws(VirtqueueError) -> GuestSlice {
        guard isAllowed else { throw .indirectNotNegotiated(head: head) }
        guard !descriptor.has(DescriptorFlag.next) else { throw .indirectWithNext(head: head) }
        let length = descriptor.length
        guard length > 0, length % 16 == 0, length / 16 <= 32768 else { throw .indirectTableLength(length) }
        guard let table = ram.slice(at: descriptor.address, count: UInt64(length)) else {
            throw .indirectTableOutsideRAM(descriptor.address, count: length)
        }
        return table
    }

    /// The chain, to be returned as `head`.
    func chain(_ head: UInt16) -> DescriptorChain {
        let start = unsafe list.base + first
        return unsafe DescriptorChain(
            head: head,
            readable: IOVectors(base: start, count: readableEntries, byteCount: readableBytes),
            writable: IOVectors(
                base: start + readableEntries, count: entries &- readableEntries, byteCount: writableBytes),
            entries: entries)
    }
}

/// Reads chains of a split virtqueue (virtio 1.2 §2.7.5).
struct SplitChainWalk: BitwiseCopyable, Sendable {
    let ram: GuestRAM
    let table: GuestSlice
    let size: UInt16
    let allowsIndirect: Bool

    func chain(at head: UInt16, into list: IOVectorList, from first: Int) throws(VirtqueueError) -> DescriptorChain {
        var builder = ChainBuilder(head, size: size, ram: ram, into: list, from: first)
        var table = self.table
        var tableSize = UInt32(size)
        var isIndirect = false
        var index = UInt32(head)

        while true {
            let descriptor = Descriptor(split: table, at: index)
            if descriptor.has(DescriptorFlag.indirect) {
                guard !isIndirect else { throw .indirectNested(head: head) }
                table = try builder.indirectTable(descriptor, isAllowed: allowsIndirect)
                tableSize = descriptor.length / 16
                isIndirect = true
                index = 0
                continue
            }
            try builder.add(descriptor)
            guard descriptor.has(DescriptorFlag.next) else { return builder.chain(head) }
            guard UInt32(descriptor.link) < tableSize else {
                throw .nextOutOfRange(descriptor.link, tableSize: tableSize)
            }
            index = UInt32(descriptor.link)
        }
    }
}

/// Reads chains of a packed virtqueue (virtio 1.2 §2.8.5 to §2.8.8).
struct PackedChainWalk: BitwiseCopyable, Sendable {
    let ram: GuestRAM
    let ring: GuestSlice
    let size: UInt16
    let allowsIndirect: Bool

    /// What a chain was in the ring.
    struct Place: BitwiseCopyable {
        /// The buffer ID, with which the driver recognizes the chain.
        let id: UInt16
        /// Descriptors in the ring; those of an indirect table are not counted.
        let length: UInt16
    }

    /// - Parameters:
    ///   - start: the place of the first descriptor in the ring.
    ///   - head: ``DescriptorChain/head`` of the chain.
    func chain(
        at start: UInt16, as head: UInt16, into list: IOVectorList, from first: Int
    ) throws(VirtqueueError) -> (DescriptorChain, Place) {
        var builder = ChainBuilder(start, size: size, ram: ram, into: list, from: first)
        var index = start
        var length: UInt16 = 0

        while true {
            let descriptor = Descriptor(packed: ring, at: UInt32(index))
            length &+= 1
            if descriptor.has(DescriptorFlag.indirect) {
                // §2.8.19: the only descriptor of its chain.
                guard length == 1 else { throw .indirectWithNext(head: start) }
                let table = try builder.indirectTable(descriptor, isAllowed: allowsIndirect)
                // The table is the chain: its entries have no NEXT (§2.8.7).
                for entry in 0..<descriptor.length / 16 {
                    let entry = Descriptor(packed: table, at: entry)
                    guard !entry.has(DescriptorFlag.indirect) else { throw .indirectNested(head: start) }
                    try builder.add(entry)
                }
            } else {
                try builder.add(descriptor)
            }
            // The builder refuses more descriptors than the ring has.
            guard descriptor.has(DescriptorFlag.next) else {
                return (builder.chain(head), Place(id: descriptor.link, length: length))
            }
            index = index &+ 1 == size ? 0 : index &+ 1
        }
    }
}
