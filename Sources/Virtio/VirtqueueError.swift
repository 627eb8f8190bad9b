// SPDX-License-Identifier: Apache-2.0

public import GuestMemory

/// A violation of the virtqueue rules by a driver. The queue is unusable afterwards: the device needs a reset.
public enum VirtqueueError: Error, Equatable, Sendable, CustomStringConvertible {
    /// A size that is not a power of two (in a split virtqueue), is 0 or exceeds the device's maximum.
    case invalidSize(UInt32, maximum: UInt16)
    /// A ring whose address lacks the alignment it needs, in bytes.
    case ringMisaligned(RingPart, GuestAddress, alignment: UInt64)
    /// A ring that is not wholly in one region of RAM.
    case ringOutsideRAM(RingPart, GuestAddress, count: UInt64)
    /// More new entries in the available ring than it has room for.
    case availableIndexJumped(from: UInt16, to: UInt16, size: UInt16)
    /// More descriptors taken than the queue has: some were made available twice.
    case tooManyInFlight(size: UInt16)
    /// A chain's head is beyond the descriptor table.
    case headOutOfRange(UInt16, size: UInt16)
    /// A chain continues beyond its table.
    case nextOutOfRange(UInt16, tableSize: UInt32)
    /// More descriptors than the queue's size (or the caller's list) allows: a loop, or a driver that asks too much.
    case chainTooLong(head: UInt16, limit: Int)
    /// More bytes than 2^32 in a chain.
    case chainTooLarge(head: UInt16)
    /// A buffer that is not wholly in one region of RAM.
    case bufferOutsideRAM(GuestAddress, count: UInt32)
    /// A readable buffer after a writable one.
    case readableAfterWritable(head: UInt16)
    /// An indirect table although VIRTIO_F_INDIRECT_DESC was not negotiated.
    case indirectNotNegotiated(head: UInt16)
    /// An indirect table within an indirect table.
    case indirectNested(head: UInt16)
    /// A descriptor with both INDIRECT and NEXT.
    case indirectWithNext(head: UInt16)
    /// The length of an indirect table: zero, not a multiple of 16, or more than 32,768 entries.
    case indirectTableLength(UInt32)
    /// An indirect table that is not wholly in one region of RAM.
    case indirectTableOutsideRAM(GuestAddress, count: UInt32)

    /// The three parts of a virtqueue: first of a split, then of a packed one.
    public enum RingPart: String, Sendable {
        case descriptorTable = "descriptor table"
        case availableRing = "available ring"
        case usedRing = "used ring"
        case descriptorRing = "descriptor ring"
        case driverEvents = "driver event suppression structure"
        case deviceEvents = "device event suppression structure"
    }

    public var description: String {
        switch self {
        case .invalidSize(let size, let maximum):
            "queue size \(size) is not a power of two from 1 to \(maximum) (of a packed queue, any number)"
        case .ringMisaligned(let part, let address, let alignment):
            "the \(part.rawValue) at \(address) is not aligned to \(alignment) bytes"
        case .ringOutsideRAM(let part, let address, let count):
            "the \(part.rawValue), \(count) bytes at \(address), is not in one region of RAM"
        case .availableIndexJumped(let from, let to, let size):
            "the available index went from \(from) to \(to) in a queue of \(size)"
        case .tooManyInFlight(let size):
            "more than \(size) chains are in flight in a queue of that size"
        case .headOutOfRange(let head, let size):
            "head \(head) is beyond the \(size) descriptors of the queue"
        case .nextOutOfRange(let next, let tableSize):
            "a chain continues at descriptor \(next) of a table of \(tableSize)"
        case .chainTooLong(let head, let limit):
            "the chain at \(head) has more than \(limit) descriptors"
        case .chainTooLarge(let head):
            "the chain at \(head) has more than 2^32 bytes"
        case .bufferOutsideRAM(let address, let count):
            "a buffer, \(count) bytes at \(address), is not in one region of RAM"
        case .readableAfterWritable(let head):
            "the chain at \(head) has a readable buffer after a writable one"
        case .indirectNotNegotiated(let head):
            "the chain at \(head) has an indirect table, but VIRTIO_F_INDIRECT_DESC was not negotiated"
        case .indirectNested(let head):
            "the chain at \(head) has an indirect table within another"
        case .indirectWithNext(let head):
            "the chain at \(head) continues after an indirect table"
        case .indirectTableLength(let length):
            "an indirect table of \(length) bytes: not 1 to 32768 descriptors of 16 bytes"
        case .indirectTableOutsideRAM(let address, let count):
            "an indirect table, \(count) bytes at \(address), is not in one region of RAM"
        }
    }
}
