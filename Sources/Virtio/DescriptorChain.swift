// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import GuestMemory

/// A request of the driver: the buffers of one descriptor chain, all checked and copied to private iovecs.
///
/// What the driver changes in its descriptors afterwards changes nothing here.
public struct DescriptorChain: BitwiseCopyable, Sendable {
    /// The chain's first descriptor, by which it is returned to the driver (``Virtqueue/push(_:written:)``).
    public let head: UInt16
    /// The buffers that the device reads.
    public var readable: IOVectors
    /// The buffers that the device writes.
    public var writable: IOVectors
    /// iovecs that the chain took in its list; the next chain can go behind them.
    public let entries: Int
}

/// The flags of a descriptor (virtio 1.2 §2.7.5).
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
    let next: UInt16

    init(in table: GuestSlice, at index: UInt32) {
        let offset = Int(index) &* 16
        address = GuestAddress(table.load64(offset))
        let rest = table.load64(offset &+ 8)
        length = UInt32(truncatingIfNeeded: rest)
        flags = UInt16(truncatingIfNeeded: rest >> 32)
        next = UInt16(truncatingIfNeeded: rest >> 48)
    }

    func has(_ flag: UInt16) -> Bool { flags & flag != 0 }
}

/// Walks a chain from its head (virtio 1.2 §2.7.5) and appends its buffers to a list.
///
/// Descriptors, those of an indirect table included, are at most as many as the queue's size; that also ends a loop.
/// A descriptor of length zero is legal and counted, has no buffer, and its address is not looked at. An indirect
/// table may stand anywhere in RAM and may be larger than its chain.
struct ChainWalk: BitwiseCopyable, Sendable {
    let ram: GuestRAM
    let table: GuestSlice
    let size: UInt16
    let allowsIndirect: Bool

    func chain(at head: UInt16, into list: IOVectorList, from first: Int) throws(VirtqueueError) -> DescriptorChain {
        var table = self.table
        var tableSize = UInt32(size)
        var isIndirect = false
        var index = UInt32(head)
        var seen = 0
        var entries = 0
        var readableEntries = 0
        var readableBytes: UInt64 = 0
        var writableBytes: UInt64 = 0
        var isWriting = false

        while true {
            let descriptor = Descriptor(in: table, at: index)
            if descriptor.has(DescriptorFlag.indirect) {
                guard allowsIndirect else { throw .indirectNotNegotiated(head: head) }
                guard !isIndirect else { throw .indirectNested(head: head) }
                guard !descriptor.has(DescriptorFlag.next) else { throw .indirectWithNext(head: head) }
                // The WRITE flag of such a descriptor means nothing (§2.7.5.3.2).
                table = try indirectTable(descriptor)
                tableSize = descriptor.length / 16
                isIndirect = true
                index = 0
                continue
            }
            guard seen < Int(size) else { throw .chainTooLong(head: head, limit: Int(size)) }
            seen &+= 1

            if descriptor.has(DescriptorFlag.write) {
                isWriting = true
                writableBytes &+= UInt64(descriptor.length)
            } else {
                guard !isWriting else { throw .readableAfterWritable(head: head) }
                readableBytes &+= UInt64(descriptor.length)
            }
            // §2.7.5.2: a driver adds no chain of more than 2^32 bytes.
            guard readableBytes &+ writableBytes <= 1 << 32 else { throw .chainTooLarge(head: head) }
            if descriptor.length > 0 {
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
            guard descriptor.has(DescriptorFlag.next) else { break }
            guard UInt32(descriptor.next) < tableSize else {
                throw .nextOutOfRange(descriptor.next, tableSize: tableSize)
            }
            index = UInt32(descriptor.next)
        }
        let start = unsafe list.base + first
        return unsafe DescriptorChain(
            head: head,
            readable: IOVectors(base: start, count: readableEntries, byteCount: readableBytes),
            writable: IOVectors(
                base: start + readableEntries, count: entries &- readableEntries, byteCount: writableBytes),
            entries: entries)
    }

    private func indirectTable(_ descriptor: Descriptor) throws(VirtqueueError) -> GuestSlice {
        let length = descriptor.length
        guard length > 0, length % 16 == 0, length / 16 <= 32768 else { throw .indirectTableLength(length) }
        guard let table = ram.slice(at: descriptor.address, count: UInt64(length)) else {
            throw .indirectTableOutsideRAM(descriptor.address, count: length)
        }
        return table
    }
}
