// SPDX-License-Identifier: Apache-2.0

/// The requests of an engine: which are free, which have ended, and which wait for room. Requests that wait for
/// something of the image's are in the lists of an ``AttachedEngine``.
///
/// The first ``depth`` of them are the owner's. Each of the others reads the old contents of a cluster for a
/// ``CopyTable``.
@safe struct RequestTable: ~Copyable {
    private let slots: Slab<DiskRequest>
    /// Requests that the owner can have.
    let depth: Int
    /// Requests of the owner that were started and not yet returned as completed.
    private(set) var inFlight = 0
    private var free = IndexList<DiskRequest>()
    private var stalled = IndexList<DiskRequest>()
    private var completed = IndexList<DiskRequest>()

    init(_ slots: Slab<DiskRequest>, depth: Int) {
        self.slots = slots
        self.depth = depth
        for index in 0..<depth { free.append(Int32(index), slots) }
    }

    @inline(__always) subscript(index: Int32) -> DiskRequest {
        // The slab checks the index, and lives as long as this value.
        unsafeAddress { unsafe UnsafePointer(slots.address(of: Int(index))) }
        unsafeMutableAddress { unsafe slots.address(of: Int(index)) }
    }

    // MARK: - The owner's

    mutating func acquire() -> Int32? { free.popFirst(slots) }

    mutating func release(_ index: Int32) {
        precondition(index >= 0 && index < depth)
        free.prepend(index, slots)
    }

    /// A request of the owner's begins.
    mutating func start(_ index: Int32, _ request: DiskRequest) {
        precondition(index >= 0 && index < depth)
        inFlight += 1
        slots[index] = request
    }

    /// A request of the owner's has ended.
    mutating func complete(_ index: Int32) { completed.append(index, slots) }

    /// Returns a request that has completed.
    mutating func popCompleted() -> Int32? {
        guard let index = completed.popFirst(slots) else { return nil }
        inFlight -= 1
        return index
    }

    // MARK: - Those that wait for room

    var hasStalled: Bool { !stalled.isEmpty }

    /// Has a request wait until there is room for another operation.
    mutating func stall(_ index: Int32) {
        slots[index].isListed = true
        stalled.append(index, slots)
    }

    mutating func takeStalled() -> IndexList<DiskRequest> { stalled.take() }

    /// Those that still find no room, behind those that wait again.
    mutating func stall(contentsOf list: IndexList<DiskRequest>) { stalled.append(contentsOf: list, slots) }

    /// The first of a list of those that waited, which it leaves.
    mutating func unlist(_ list: inout IndexList<DiskRequest>) -> Int32? {
        guard let index = list.popFirst(slots) else { return nil }
        slots[index].isListed = false
        return index
    }
}
