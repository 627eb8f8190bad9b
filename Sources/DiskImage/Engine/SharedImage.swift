// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux
internal import Synchronization

/// An open disk image on which several engines work, each in its own thread:
/// ``DiskEngine/init(_:depth:segments:usesRing:)-(SharedImage,_,_,_)``.
///
/// There is one copy of the metadata, behind one lock, so no engine ever sees a stale one. An engine has the lock while
/// it asks how a range is stored or changes that, and prepares operations; the I/O is done without it. What has to be
/// done once for all (a commit), an engine does for the others; one whose requests wait for what another does is called
/// by its descriptor. The image is closed when its last engine and all other references have gone.
public final class SharedImage: @unchecked Sendable {
    /// The most engines at a time.
    public static let maximumEngines = 64

    /// Without the lock only what never changes while several engines are there: path, format, size, cluster size,
    /// whether it is read-only.
    let image: DiskImage
    /// The system calls for metadata that is read and written synchronously.
    let calls: FileCalls
    /// Indicates whether it belongs to one engine, which needs no lock then.
    let isExclusive: Bool

    private let mutex = Lock()

    // All that follows belongs to the holder of the lock: hence `Sendable`.

    private(set) var engines: [AttachedEngine] = []
    /// Clusters that are being written: others stay away from them.
    var claims = ClaimTable()
    /// A commit makes what has ended durable, in steps with a synchronisation after each.
    private(set) var commit = CommitState()
    /// The number of the next operation, whichever engine's.
    private(set) var sequence: UInt64 = 0
    /// Metadata that has been read, and engines with requests that waited for it and have not looked yet.
    private var pinnedLoads: [(load: MetadataLoad, engines: UInt64)] = []

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
    /// The counters of the caches of each file that has metadata, by the file's number: those of the chain from the
    /// topmost on, then the extents of a VMDK image.
    public var cacheStatistics: [(file: Int, statistics: FileStatistics)] { image.cacheStatistics }
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
            precondition(
                holder.load(ordering: .relaxed) == UInt(pthread_self()), "the image's lock is not this thread's")
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
        claims.reserve(engine.operations.count + CopyTable.maximum)
    }

    /// Removes an engine that has released everything it had.
    func detach(_ engine: AttachedEngine) {
        engines.removeAll { $0 === engine }
        unpinLoads(examinedBy: engine)
        claims.removeAll(ofEngine: engine.number)
    }

    /// The number of an operation that begins.
    func nextSequence() -> UInt64 {
        defer { sequence &+= 1 }
        return sequence
    }

    /// The number of the first operation of any engine that is under way.
    var firstSequence: UInt64 { engines.reduce(sequence) { min($0, $1.firstSequence) } }

    /// Indicates whether no engine has anything under way. Until one of them starts a request, the caller has the image
    /// for itself: none has a reason to access it.
    func isQuiet() -> Bool {
        if isExclusive { return true }
        lock()
        defer { unlock() }
        guard commit.step == .none, !commit.isWanted, engines.allSatisfy({ $0.isIdle }) else { return false }
        for engine in engines {
            _ = engine.takeWakeup()
            unpinLoads(examinedBy: engine)
        }
        return true
    }

    /// Metadata has been read and the requests of `reader` have used it: it may be replaced when those of the others
    /// have used it, too.
    func unpin(_ load: MetadataLoad, readBy reader: AttachedEngine) {
        assertLocked()
        var others: UInt64 = 0
        if !isExclusive {
            for engine in engines where engine !== reader && engine.hasWaiting { others |= engine.bit }
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

/// How what has been written becomes durable, in the order of docs/qcow2.md. The engine that runs a commit does what
/// its steps say, and comes back with the outcome.
extension SharedImage {
    /// Begins a commit that covers what has ended by now, at every engine.
    /// - Returns: nil if one is under way, which another follows.
    func beginCommit(by engine: AttachedEngine) -> CommitState.Action? {
        assertLocked()
        guard commit.begin(by: engine) else { return nil }
        for engine in engines { engine.beginCommit() }
        do throws(MetadataError) {
            guard try image.beginCommit(calls) else { return try writeMapping() }
            // Data in a file of its own comes before what is written of it.
            return synchronize(image.hasDataFile ? .data : .allocation)
        } catch {
            return over(error)
        }
    }

    /// A synchronisation has ended, with an errno value or 0.
    func continueCommit(_ error: Int32) -> CommitState.Action {
        let step = commit.step
        do throws(MetadataError) {
            // The host reports a failure once: if it was reported to another synchronisation, this one did not see it.
            if error != 0 {
                image.failures.note(
                    FailedAccess(call: .synchronize, file: commit.file, isMetadata: step != .data, offset: 0), error)
            }
            let error = error != 0 ? error : image.failure
            guard error == 0 else {
                image.failWriting(error)
                throw .lost(error)
            }
            if commit.file + 1 < image.writtenFiles { return synchronize(step, file: commit.file + 1) }
            switch step {
            case .data:
                return synchronize(.allocation)
            case .allocation:
                return try image.writeAllocationTable(calls) ? synchronize(.allocationTable) : writeMapping()
            case .allocationTable:
                return try writeMapping()
            case .mapping:
                // Failing costs space and nothing else.
                image.release(before: firstSequence, calls)
                return over(nil)
            case .none:
                return over(nil)
            }
        } catch {
            return over(error)
        }
    }

    /// The counts are durable: now the mapping may refer to what they count.
    private func writeMapping() throws(MetadataError) -> CommitState.Action {
        try image.writeMapping(calls)
        commit.synchronize(.mapping)
        return .synchronizeMapping(CommitState.Synchronization(file: 0, isOfData: false))
    }

    private func synchronize(_ step: CommitState.Step, file: Int = 0) -> CommitState.Action {
        commit.synchronize(step, file: file)
        return .synchronize(CommitState.Synchronization(file: file, isOfData: step == .data))
    }

    private func over(_ error: MetadataError?) -> CommitState.Action {
        commit.hold()
        return .end(error)
    }

    /// Ends the flushes of a commit that is over, at all engines.
    func endCommit(_ error: MetadataError?) {
        let code = error?.code ?? 0
        let failed = code == 0 ? nil : image.refusedAccess(of: code)
        for engine in engines { engine.endCommit(code, failed) }
        commit.end()
    }

    /// Indicates whether a commit is to begin.
    var needsCommit: Bool { commit.step == .none && (commit.isWanted || engines.contains { $0.hasFlushes }) }

    /// Indicates whether no engine runs the commit that was requested, since the one that ran it has ended.
    var isCommitOrphaned: Bool { commit.step == .none && commit.isWanted }

    /// An engine has gone. As long as the commit that it ran has not ended it can be begun again: what it wrote is
    /// covered by its first synchronisation then.
    func abortCommit(of engine: AttachedEngine) {
        guard commit.isRun(by: engine) else { return }
        image.unlock()
        for other in engines {
            if other.abortCommit() { other.wake() }
        }
        // The first one runs it.
        commit.abort(isWanted: !engines.isEmpty)
    }
}
