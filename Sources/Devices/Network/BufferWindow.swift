// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Linux
internal import Virtio

/// The receive buffers that a device holds: chains taken from the queue and not used yet, in the queue's order, with
/// all their iovecs behind each other in one list, ready for `readv`.
struct BufferWindow: ~Copyable {
    private struct Chain: BitwiseCopyable {
        var head: UInt16 = 0
        var entries = 0
        var bytes: UInt64 = 0
    }

    /// The kernel takes 1,024 iovecs (UIO_MAXIOV) in a call; one is for the spill behind the buffers.
    private static let capacity = 1024

    private let pool = IOVectorPool(slots: 1, capacity: Self.capacity)
    /// Chains `firstChain ..< endChain` are in the window; each has at least one entry, so there are never more than
    /// entries.
    private var chains: [Chain] = Array(repeating: Chain(), count: Self.capacity)
    private var firstChain = 0
    private var endChain = 0
    private var firstEntry = 0
    private var endEntry = 0
    /// Bytes in all buffers.
    private(set) var byteCount: UInt64 = 0

    var isEmpty: Bool { firstChain == endChain }
    var chainCount: Int { endChain - firstChain }
    /// All buffers as one run.
    var buffers: IOVectors { pool[0].run(from: firstEntry, count: endEntry - firstEntry) }

    /// Indicates whether another chain, of up to `entries` buffers, has room.
    mutating func makeRoom(for entries: Int) -> Bool {
        if endEntry + entries < Self.capacity { return true }
        guard firstEntry > 0 else { return false }
        pool[0].moveToFront(from: firstEntry, count: endEntry - firstEntry)
        for index in firstChain..<endChain { chains[index - firstChain] = chains[index] }
        (firstChain, endChain) = (0, endChain - firstChain)
        (firstEntry, endEntry) = (0, endEntry - firstEntry)
        return endEntry + entries < Self.capacity
    }

    /// What became of the attempt to get one more chain.
    enum Growth {
        case grown
        /// The chain was returned unused: it is readable, or shorter than a packet's header.
        case refused
        /// The driver has made no more available.
        case none
    }

    /// Takes the queue's next chain. There is room for it (``makeRoom(for:)``).
    mutating func grow(from queue: inout Virtqueue) throws(VirtqueueError) -> Growth {
        guard let chain = try queue.pop(into: pool[0], from: endEntry) else { return .none }
        guard chain.readable.isEmpty, chain.writable.byteCount >= PacketHeader.size else {
            queue.push(chain.head, written: 0)
            return .refused
        }
        chains[endChain] = Chain(head: chain.head, entries: chain.entries, bytes: chain.writable.byteCount)
        endChain += 1
        endEntry += chain.entries
        byteCount &+= chain.writable.byteCount
        return .grown
    }

    /// Reads once from a TAP into the buffers and, where they end, into `spill`.
    /// - Returns: what `readv` does.
    func read(from descriptor: Int32, spill: UnsafeMutableRawBufferPointer) -> Int {
        // endEntry < capacity (makeRoom), and the spill lives as long as the window's owner.
        unsafe pool[0].set(endEntry, to: spill)
        return unsafe readv(descriptor, buffers.base, Int32(endEntry - firstEntry + 1))
    }

    /// How many of the first chains hold `count` bytes, at most all.
    private func chainsNeeded(for count: UInt64) -> Int {
        var rest = count
        var index = firstChain
        while index < endChain {
            let bytes = chains[index].bytes
            index += 1
            if rest <= bytes { break }
            rest -= bytes
        }
        return index - firstChain
    }

    /// Returns the first chains to the driver with a packet of `count` bytes, header included, that lies in them.
    /// - Parameter clearsFlags: the driver did not negotiate what the header's flags could say.
    mutating func deliver(_ count: Int, to queue: inout Virtqueue, clearsFlags: Bool) {
        let needed = chainsNeeded(for: UInt64(count))
        if clearsFlags { buffers.store(UInt8(0)) }
        buffers.store(UInt16(truncatingIfNeeded: needed), at: PacketHeader.bufferCountOffset)
        var rest = UInt64(count)
        for _ in 0..<needed {
            let chain = chains[firstChain]
            let written = min(rest, chain.bytes)
            queue.push(chain.head, written: UInt32(truncatingIfNeeded: written))
            rest -= written
            byteCount &-= chain.bytes
            firstEntry += chain.entries
            firstChain += 1
        }
        if isEmpty { removeAll() }
    }

    /// Forgets all chains: the queue has stopped.
    mutating func removeAll() {
        (firstChain, endChain, firstEntry, endEntry, byteCount) = (0, 0, 0, 0, 0)
    }
}
