// SPDX-License-Identifier: Apache-2.0

internal import Linux
internal import Synchronization

/// What an engine shows to the others of its image: the requests that wait for something of the image's. It belongs to
/// who has the image's lock, but for what is said to be the engine's own.
final class AttachedEngine: @unchecked Sendable {
    /// An eventfd by which other engines wake this one; by reference, so that it can be absent.
    final class Wakeup: Sendable {
        let event: EventFD
        init(_ event: consuming EventFD) { self.event = event }
    }

    /// Its number at the image, below 64; the image gives it.
    var number = 0
    var bit: UInt64 { 1 << UInt64(number) }
    /// Signalled by others; nil for the only engine of an image.
    let wakeup: Wakeup?
    /// Indicates whether it was signalled for something that it has not examined yet.
    private let isWoken = Atomic<Bool>(false)

    /// The memory of requests: of one that is in none of the lists below, the engine's own.
    let requests: Slab<DiskRequest>
    let operations: Slab<IOOperation>

    /// Requests that need metadata that is being read, clusters that are being written, or room.
    private var waiting = IndexList<DiskRequest>()
    /// Writes that have ended while the mapping is locked.
    private var deferred = IndexList<IOOperation>()
    /// Flushes that wait for the next commit.
    private var flushes = IndexList<DiskRequest>()
    /// Flushes that end with the one under way.
    private var committing = IndexList<DiskRequest>()
    /// Flushes whose commit has ended.
    private var committed = IndexList<DiskRequest>()

    init(requests: Int, operations: Int, wakeup: Wakeup?) {
        self.wakeup = wakeup
        self.requests = Slab(count: requests) { _ in DiskRequest() }
        self.operations = Slab(count: operations) { _ in IOOperation() }
    }

    /// Indicates whether nothing is under way, and nothing waits.
    var isIdle: Bool {
        !isWaiting && flushes.isEmpty && committing.isEmpty && !operations.indices.contains { operations[$0].isActive }
    }

    /// The number of its first operation that is under way.
    var firstSequence: UInt64 {
        var first = UInt64.max
        for index in operations.indices where operations[index].isActive {
            first = min(first, operations[index].sequence)
        }
        return first
    }

    // MARK: - Requests and writes that wait

    var hasWaiting: Bool { !waiting.isEmpty }

    /// Has a request wait until something has ended, here or at another engine.
    func wait(_ request: Int32) {
        requests[request].isListed = true
        waiting.append(request, requests)
    }

    func takeWaiting() -> IndexList<DiskRequest> { waiting.take() }

    /// Has a write that has ended wait until the mapping is not locked any more.
    func deferLinking(_ operation: Int32) { deferred.prepend(operation, operations) }

    func takeDeferred() -> IndexList<IOOperation> { deferred.take() }

    // MARK: - Flushes

    var hasFlushes: Bool { !flushes.isEmpty }

    /// Has a flush wait for the next commit.
    func flush(_ request: Int32) {
        requests[request].pending = 1
        flushes.append(request, requests)
    }

    /// A flush that no commit covers yet, to be cancelled.
    func popFlush() -> Int32? {
        guard let request = flushes.popFirst(requests) else { return nil }
        requests[request].pending = 0
        return request
    }

    /// A flush whose commit has ended.
    func popCommitted() -> Int32? { committed.popFirst(requests) }

    // MARK: - Commits

    /// A commit begins: it covers the flushes that wait.
    func beginCommit() { committing = flushes.take() }

    /// A commit was aborted, and its flushes wait for the next one. Returns whether there are any.
    func abortCommit() -> Bool {
        // Flushes that came later come behind.
        committing.append(contentsOf: flushes, requests)
        flushes = committing.take()
        return hasFlushes
    }

    /// A commit has ended with an errno value, or 0: so do the flushes that it was for.
    func endCommit(_ error: Int32, _ failed: FailedAccess?) {
        while let request = committing.popFirst(requests) {
            requests[request].pending = 0
            requests[request].error = error
            requests[request].failed = failed
            committed.append(request, requests)
        }
        // Requests that waited for room continue, or fail: no room will become available.
        waiting.forEach(requests) { request in
            if requests[request].awaitsCommit, error != 0 {
                requests[request].error = error
                requests[request].failed = failed
            }
            requests[request].awaitsCommit = false
        }
    }

    // MARK: - Wakeups

    /// Indicates whether what others do may let it continue. A flush continues when its commit has ended.
    var isWaiting: Bool { hasWaiting || !deferred.isEmpty || !committed.isEmpty }

    /// Has its thread look, once for any number of calls.
    func wake() {
        if !isWoken.exchange(true, ordering: .acquiringAndReleasing) { wakeup?.event.signal() }
    }

    /// Indicates whether it was called since it was last asked. The engine's own; it watches for wakeups before.
    func takeWakeup() -> Bool {
        isWoken.load(ordering: .relaxed) && isWoken.exchange(false, ordering: .acquiringAndReleasing)
    }
}
