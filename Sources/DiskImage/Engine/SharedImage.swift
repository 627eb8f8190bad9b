// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux
internal import Synchronization

/// An open disk image on which several engines work, each in its own thread: ``DiskEngine/init(_:depth:segments:usesRing:)-(SharedImage,_,_,_)``.
///
/// There is one copy of the metadata, behind one lock, so no engine ever sees a stale one. An engine has the lock while it asks how a range is stored
/// or changes that, and prepares operations; the I/O is done without it. What has to be done once for all (a commit), an engine does for the others; one whose
/// requests wait for what another does is called by its descriptor. The image is closed when its last engine and all other references have gone.
public final class SharedImage: @unchecked Sendable {
    /// The most engines at a time.
    public static let maximumEngines = 64

    /// Without the lock only what never changes while several engines are there: path, format, size, cluster size, whether it is read-only.
    let image: DiskImage
    /// The system calls for metadata that is read and written at once.
    let calls: FileCalls
    /// Indicates whether it belongs to one engine, which needs no lock then.
    let isExclusive: Bool

    private let mutex = Lock()

    // All that follows belongs to who has the lock: hence `Sendable`.

    private(set) var engines: [AttachedEngine] = []
    /// Clusters that are being written: others stay away from them.
    var claims = ClaimTable()
    var commit = Commit()
    /// The number of the next operation, whichever engine's.
    var sequence: UInt64 = 0
    /// Metadata that has been read, and engines with requests that waited for it and have not looked yet.
    private var pinnedLoads: [(load: MetadataLoad, engines: UInt64)] = []

    /// A commit makes what has ended durable, in steps with a synchronisation after each.
    struct Commit {
        enum Step { case none, data, refcounts, refcountTable, mapping }

        var step = Step.none
        /// The number of the engine that runs it.
        var engine = -1
        /// Which of the image's files is being synchronised.
        var file = 0
        /// Indicates whether another has to follow.
        var isWanted = false
    }

    /// Makes an image ready for several engines.
    public convenience init(_ image: DiskImage) { self.init(image, calls: .host) }

    /// An image for one engine, which takes no lock.
    public convenience init(exclusive image: DiskImage) { self.init(image, calls: .host, isExclusive: true) }

    /// - Parameter isExclusive: for a single engine.
    init(_ image: DiskImage, calls: FileCalls, isExclusive: Bool = false) {
        self.image = image
        self.calls = calls
        self.isExclusive = isExclusive
    }

    deinit {
        // What was not flushed may be lost, and is not for want of trying.
        image.close(calls)
    }

    /// The path that the user gave.
    public var path: String { image.path }
    /// Bytes of the disk.
    public var size: UInt64 { image.size }
    public var isReadOnly: Bool { image.isReadOnly }
    /// The counters of the remote disk that it is, or has at the end of its backing chain.
    public var remote: RemoteStatistics? { image.remote?.statistics }
    /// The cluster size, see ``DiskImage/clusterSize``.
    public var clusterSize: UInt64? { image.clusterSize }

    /// The first damage found while the image was used.
    public func damage() -> DiskImageError? {
        lock()
        defer { unlock() }
        return image.damage
    }

    // MARK: - For engines

    @inline(__always) func lock() {
        assertUnlocked()
        if !isExclusive { mutex.lock() }
        #if DEBUG
        holder.store(UInt(pthread_self()), ordering: .relaxed)
        #endif
    }

    @inline(__always) func unlock() {
        assertLocked()
        #if DEBUG
        holder.store(0, ordering: .relaxed)
        #endif
        if !isExclusive { mutex.unlock() }
    }

    #if DEBUG
    /// The thread that has the lock, or 0: for what follows.
    private let holder = Atomic<UInt>(0)
    #endif

    /// Says that the calling thread has the lock. Only builds for tests look.
    @inline(__always) func assertLocked() {
        #if DEBUG
        precondition(holder.load(ordering: .relaxed) == UInt(pthread_self()), "the image's lock is not this thread's")
        #endif
    }

    /// Says that the calling thread does not have the lock.
    @inline(__always) func assertUnlocked() {
        #if DEBUG
        precondition(holder.load(ordering: .relaxed) != UInt(pthread_self()), "this thread has the image's lock")
        #endif
    }

    /// - Throws: when there are as many engines as can be.
    func attach(_ engine: AttachedEngine) throws(DiskImageError) {
        lock()
        defer { unlock() }
        let taken = engines.reduce(0 as UInt64) { $0 | $1.bit }
        guard engines.count < (isExclusive ? 1 : image.maximumEngines) else {
            throw .impossible(path: path, reason: "it has \(engines.count) engines already")
        }
        engine.number = (~taken).trailingZeroBitCount
        engines.append(engine)
        // Each operation writes one run of clusters at most, and so does each copy before it has one.
        claims.reserve(engine.operationCount + DiskEngine.Copies.maximum)
    }

    /// Forgets an engine that has given up all that it had.
    func detach(_ engine: AttachedEngine) {
        engines.removeAll { $0 === engine }
        unpinLoads(examinedBy: engine)
        claims.removeAll(ofEngine: engine.number)
    }

    /// The number of the first operation of any engine that is under way.
    var firstSequence: UInt64 { engines.reduce(sequence) { min($0, $1.firstSequence) } }

    /// Metadata has been read and the requests of `reader` have looked at it: it may be replaced when those of the others have looked, too.
    func unpin(_ load: MetadataLoad, readBy reader: AttachedEngine) {
        assertLocked()
        var others: UInt64 = 0
        if !isExclusive {
            for engine in engines where engine !== reader && !engine.waiting.isEmpty { others |= engine.bit }
        }
        if others == 0 { image.unpin(load) } else { pinnedLoads.append((load, others)) }
    }

    /// Returns whether that made room for others.
    @discardableResult
    func unpinLoads(examinedBy engine: AttachedEngine) -> Bool {
        guard !pinnedLoads.isEmpty else { return false }
        for index in pinnedLoads.indices { pinnedLoads[index].engines &= ~engine.bit }
        let before = pinnedLoads.count
        for pinned in pinnedLoads where pinned.engines == 0 { image.unpin(pinned.load) }
        pinnedLoads.removeAll { $0.engines == 0 }
        return pinnedLoads.count < before
    }

    /// Has the engines with requests, or writes, that wait for others look again.
    func wake(besides caller: AttachedEngine) {
        assertLocked()
        guard !isExclusive else { return }
        for engine in engines where engine !== caller && engine.isWaiting { engine.wake() }
    }
}

/// What an engine shows to the others of its image. It belongs to who has the image's lock, but for what is said to be the engine's own.
final class AttachedEngine: @unchecked Sendable {
    /// An eventfd by which other engines wake this one; by reference, so that it can be absent.
    final class Wakeup: Sendable {
        let event: EventFD
        init(_ event: consuming EventFD) { self.event = event }
    }

    /// Its number at the image, below 64.
    var number = 0
    var bit: UInt64 { 1 << UInt64(number) }
    /// Signalled by others; nil for the only engine of an image.
    let wakeup: Wakeup?
    /// Indicates whether it was signalled for something that it has not examined yet.
    private let isWoken = Atomic<Bool>(false)

    /// The memory of requests: of one that is in none of the lists below, the engine's own.
    let requests: Slab<DiskEngine.Request>
    let operations: Slab<DiskEngine.Operation>
    var operationCount: Int { operations.count }

    /// Requests that need metadata that is being read, clusters that are being written, or room.
    var waiting = DiskEngine.IndexList()
    /// Writes that have ended while the mapping is locked.
    var deferredOperation: Int32 = -1
    /// Flushes that wait for the next commit.
    var flushes = DiskEngine.IndexList()
    /// Flushes that end with the one under way.
    var committing = DiskEngine.IndexList()
    /// Flushes whose commit has ended.
    var committed = DiskEngine.IndexList()

    init(requests count: Int, operations operationCount: Int, wakeup: Wakeup?) {
        self.wakeup = wakeup
        requests = Slab(count: count) { _ in DiskEngine.Request() }
        operations = Slab(count: operationCount) { _ in DiskEngine.Operation() }
        // All are free but the last, which is the commit's.
        for index in 0..<max(0, operationCount - 2) { operations[index].next = Int32(index + 1) }
    }

    /// Indicates whether what others do may let it go on. A flush goes on when its commit has ended.
    var isWaiting: Bool { !waiting.isEmpty || deferredOperation >= 0 || !committed.isEmpty }

    var firstSequence: UInt64 {
        var first = UInt64.max
        for index in 0..<operationCount where operations[index].isActive { first = min(first, operations[index].sequence) }
        return first
    }

    /// Has its thread look, once for any number of calls.
    func wake() {
        if !isWoken.exchange(true, ordering: .acquiringAndReleasing) { wakeup?.event.signal() }
    }

    /// Indicates whether it was called since it was last asked. The engine's own; it watches for wakeups before.
    func takeWakeup() -> Bool {
        isWoken.load(ordering: .relaxed) && isWoken.exchange(false, ordering: .acquiringAndReleasing)
    }
}
