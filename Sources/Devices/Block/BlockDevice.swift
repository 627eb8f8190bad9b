// SPDX-License-Identifier: Apache-2.0

public import DiskImage
public import Linux
internal import Synchronization
public import Virtio

/// A virtio block device (virtio 1.2 §5.2) over a disk image, with one queue or several, each with an I/O thread.
public final class BlockDevice: VirtioDevice {
    public let name: String
    public let deviceID: UInt32 = 2
    public let features: FeatureSet
    public let maximumQueueSizes: [UInt16]
    public let configuration: ConfigurationSpace
    public let deviceEvents: DeviceEvents
    /// The device's counters, for the status line.
    public let statistics: BlockStatistics
    /// The answer to GET_ID: 1 … 20 bytes of ASCII.
    public let serial: String
    /// Bytes of the disk.
    public var capacity: UInt64 { disk.capacity.load(ordering: .relaxed) }
    public let isReadOnly: Bool
    /// Indicates whether the host has failed a request that waits for ``resume()``, and no queue takes another.
    public var isStopped: Bool { stop.isStopped }
    /// The counters of the remote disk that is behind it; nil of a local one.
    public let remote: RemoteStatistics?
    /// The counters of its files' caches, see ``SharedImage/cacheStatistics``.
    public let cacheStatistics: [(file: Int, statistics: FileStatistics)]

    /// nil without limits.
    private let limiter: RateLimiter?
    /// Times that a queue had to wait for the disk's limits.
    public var throttled: UInt64 { limiter?.waits.value ?? 0 }

    private let path: String
    private let disk: DiskCapacity
    private let cache: WriteCache
    private let stop: DiskStop
    /// The last change of the size.
    private let resizing = Guarded<DiskResize?>(nil)
    /// Indicates whether the driver has negotiated CONFIG_WCE, from FEATURES_OK to its reset; configuration writes come
    /// on any vCPU thread.
    private let canChangeWriteback = Atomic<Bool>(false)
    /// One for each queue.
    private let workers: [DeviceWorker]

    /// The most queues of a disk.
    public static let maximumQueues = SharedImage.maximumEngines

    /// - Parameters:
    ///   - name: of the device and its I/O thread: `blk0`. Threads of further queues are `blk0.1` and so on.
    ///   - image: what is on the disk. A read-only one refuses writes.
    ///   - serial: nil derives one from the image's path, so that a guest finds its disk again.
    ///   - queues: 1 … ``maximumQueues``. A driver that knows of one only (it does not take VIRTIO_BLK_F_MQ) gets one.
    ///   - queueSize: of each, a power of two, 2 … 1024.
    ///   - usesRing: false does without io_uring.
    ///   - events: Receives the device's events for the log.
    ///   - limit: of all queues together.
    ///   - onError: what happens when the host fails a request.
    ///   - onStop: called when ``isStopped`` becomes true, by an I/O thread: has the machine paused, must not wait.
    public convenience init(
        name: String, image: DiskImage, serial: String? = nil, queues: Int = 1, queueSize: UInt16 = 256,
        usesRing: Bool = true, limit: RateLimit = .none,
        events: DeviceEvents = .none, onError: DiskErrorPolicy = .report, onStop: @escaping @Sendable () -> Void = {}
    ) throws(DiskImageError) {
        let queues = min(max(queues, 1), Self.maximumQueues)
        // An image that one queue has for itself needs no lock.
        let shared = queues == 1 ? SharedImage(exclusive: image) : SharedImage(image)
        try self.init(
            name: name, shared: shared, serial: serial, queues: queues, queueSize: queueSize, usesRing: usesRing,
            limit: limit, events: events, onError: onError, onStop: onStop)
    }

    /// - Parameter shared: the image, for as many engines as there are queues.
    init(
        name: String, shared: SharedImage, serial: String? = nil, queues: Int, queueSize: UInt16, usesRing: Bool,
        limit: RateLimit = .none, events: DeviceEvents = .none, onError: DiskErrorPolicy = .report,
        onStop: @escaping @Sendable () -> Void = {}
    ) throws(DiskImageError) {
        let path = shared.path
        let queueSize = min(max(queueSize, 2), 1024)
        let printable = (serial ?? derivedSerial(path)).unicodeScalars.filter { (0x20..<0x7f).contains($0.value) }
        let serial = String(printable.prefix(20).map(Character.init))
        // Header and status have descriptors of their own in a chain without an indirect table.
        let contents = BlockConfiguration(
            capacity: shared.size, maximumSegments: UInt32(max(3, queueSize)) - 2, optimalSize: shared.clusterSize,
            queueCount: queues)
        let common: FeatureSet = [.blockSizeMax, .blockSegmentsMax, .blockBlockSize, .blockTopology, .blockFlush]
        let isReadOnly = shared.isReadOnly
        remote = shared.remote
        cacheStatistics = shared.cacheStatistics
        let statistics = BlockStatistics(queues: queues)
        self.statistics = statistics
        let size = DiskCapacity(shared.size)
        let cache = WriteCache()
        let stop = DiskStop(onStop: onStop)
        let limiter = RateLimiter(limit)
        self.limiter = limiter
        var workers: [DeviceWorker] = []
        for index in 0..<queues {
            let disk = try DiskEngine(
                shared, depth: Int(queueSize), segments: Int(queueSize), usesRing: usesRing, share: queues)
            do throws(SystemCallError) {
                let engine = BlockEngine(
                    disk, queue: index, queueSize: Int(queueSize), capacity: size,
                    largestTransfer: contents.largestTransfer, isReadOnly: isReadOnly,
                    serial: serial, cache: cache, statistics: statistics, events: events, onError: onError, stop: stop,
                    throttle: try Throttle(limiter))
                workers.append(
                    try DeviceWorker(name: index == 0 ? name : "\(name).\(index)", engine: engine, events: events))
            } catch {
                throw .system(path: path, error)
            }
        }
        self.workers = workers
        self.deviceEvents = events
        self.name = name
        self.serial = serial
        self.cache = cache
        self.stop = stop
        self.isReadOnly = isReadOnly
        self.path = path
        disk = size
        maximumQueueSizes = Array(repeating: queueSize, count: queues)
        configuration = ConfigurationSpace(contents.bytes)
        features = common.union(
            isReadOnly ? .blockReadOnly : [.blockDiscard, .blockWriteZeroes, .blockConfigurableWriteback]
        )
        .union(queues > 1 ? .blockMultiqueue : [])
    }

    public func negotiated(_ features: FeatureSet) {
        canChangeWriteback.store(features.contains(.blockConfigurableWriteback), ordering: .releasing)
        // §5.2.5.2, §5.2.6.2: a driver that does not flush finds a device that needs no flush, from here on and not
        // from DRIVER_OK.
        if !features.contains(.blockFlush) { setWriteback(false) }
    }

    public func start(first: @escaping @Sendable () -> Void) throws(SystemCallError) {
        for worker in workers { try worker.start(first: first) }
    }

    public func activate(_ activation: Activation) {
        // §5.2.5: without MQ there is the first queue only, whatever the driver has made ready.
        let count = activation.features.contains(.blockMultiqueue) ? workers.count : 1
        for (index, worker) in workers.prefix(count).enumerated() { worker.activate(activation.only(queue: index)) }
    }

    public func reset() {
        // A queue that is already idle continues to serve the others' commits until all are.
        for worker in workers { worker.reset() }
        // No request is left that would wait.
        stop.end()
        canChangeWriteback.store(false, ordering: .releasing)
        setWriteback(true)
    }

    public func stopQueue(_ index: Int) {
        if workers.indices.contains(index) { workers[index].stopQueue(index) }
    }

    public func startQueue(_ queue: QueueConfiguration) {
        // Without effect on a worker that is not active.
        if workers.indices.contains(queue.index) { workers[queue.index].startQueue(queue) }
    }

    public func pause(onQuiet: @escaping @Sendable () -> Void) {
        let left = CountDown(workers.count, then: onQuiet)
        for worker in workers { worker.pause { left.arrive() } }
    }

    public func resume() {
        // Before the first queue continues: the disk may stop again.
        let wasStopped = stop.end()
        for worker in workers {
            worker.resume()
            // Also where the disk has stopped in a pause that was cancelled before it came here.
            if wasStopped { worker.perform(DiskRetry()) }
        }
    }

    /// Reports the lost connections of a remote disk that were only counted. It waits for the disk's thread.
    public func reportLosses() {
        // It has one queue.
        if remote != nil { workers.first?.perform(DiskSummary()) }
    }

    /// Makes the disk longer while the guest runs, at the end of what is in flight in all queues. A configuration
    /// change informs the driver.
    /// - Parameters:
    ///   - size: bytes, a multiple of 512; nil takes the size that a raw image or a block device has now, after another
    ///     program has changed it.
    ///   - completion: called once with the disk's size, on a thread of the disk, or before this returns. It must not
    ///     wait.
    public func resize(to size: UInt64?, completion: @escaping @Sendable (Result<UInt64, DiskImageError>) -> Void) {
        func refuse(_ reason: String) { completion(.failure(.resize(path: path, reason: reason))) }
        if let size, size < capacity {
            return refuse("it has \(capacity) bytes; a disk cannot shrink while its guest runs")
        }
        let request = DiskResize(size: size, queues: workers.count, completion: completion) {
            [disk, configuration] size in
            disk.capacity.store(size, ordering: .relaxed)
            configuration.update { BlockConfiguration.setCapacity(size, in: &$0) }
        }
        let isFirst = resizing.withLock { resizing in
            guard resizing?.isOver != false else { return false }
            resizing = request
            return true
        }
        guard isFirst else { return refuse("its size is being changed already") }
        for worker in workers { worker.perform(request) }
    }

    public func writeConfiguration(_ value: UInt64, at offset: Int, size: Int) {
        guard offset == BlockConfiguration.writebackOffset, size == 1, value <= 1,
            canChangeWriteback.load(ordering: .acquiring)
        else { return }
        setWriteback(value == 1)
    }

    private func setWriteback(_ on: Bool) {
        cache.isWriteback.store(on, ordering: .releasing)
        configuration.update { $0[BlockConfiguration.writebackOffset] = on ? 1 : 0 }
    }
}

/// Bytes of a disk: changed by the engine that has made it longer.
final class DiskCapacity: Sendable {
    let capacity: Atomic<UInt64>
    init(_ capacity: UInt64) { self.capacity = Atomic(capacity) }
}

/// Indicates whether a write may be completed before it is durable. The driver's choice, read by the I/O thread at the
/// end of a write.
final class WriteCache: Sendable {
    let isWriteback = Atomic<Bool>(true)
}

/// The counters of a block device. Any thread may read them.
public final class BlockStatistics: Sendable {
    /// What one queue has done.
    public final class Queue: Sendable {
        public let readBytes = DeviceCounters.Counter()
        public let writtenBytes = DeviceCounters.Counter()
        public let reads = DeviceCounters.Counter()
        public let writes = DeviceCounters.Counter()
        public let flushes = DeviceCounters.Counter()
        /// DISCARD and WRITE_ZEROES.
        public let discards = DeviceCounters.Counter()
        /// Requests that ended as IOERR or UNSUPP.
        public let failures = DeviceCounters.Counter()

        /// All of these.
        public var requests: UInt64 {
            reads.value &+ writes.value &+ flushes.value &+ discards.value &+ failures.value
        }
    }

    /// One for each queue, which its thread alone adds to.
    public let queues: [Queue]

    /// The sums over the queues.
    public var readBytes: UInt64 { queues.reduce(0) { $0 &+ $1.readBytes.value } }
    public var writtenBytes: UInt64 { queues.reduce(0) { $0 &+ $1.writtenBytes.value } }
    public var reads: UInt64 { queues.reduce(0) { $0 &+ $1.reads.value } }
    public var writes: UInt64 { queues.reduce(0) { $0 &+ $1.writes.value } }
    public var flushes: UInt64 { queues.reduce(0) { $0 &+ $1.flushes.value } }
    public var discards: UInt64 { queues.reduce(0) { $0 &+ $1.discards.value } }
    public var failures: UInt64 { queues.reduce(0) { $0 &+ $1.failures.value } }

    /// Times that the disk has stopped after an error.
    public let stops = DeviceCounters.Counter()
    /// Errors that were not reported to the guest.
    public let ignored = DeviceCounters.Counter()

    init(queues: Int = 1) { self.queues = (0..<queues).map { _ in Queue() } }
}

/// The same for the same path, and hardly so for another (FNV-1a).
private func derivedSerial(_ path: String) -> String {
    let hash = path.utf8.reduce(0xcbf2_9ce4_8422_2325 as UInt64) { ($0 ^ UInt64($1)) &* 0x100_0000_01b3 }
    let digits = String(hash, radix: 16)
    return "SWKV" + String(repeating: "0", count: 16 - digits.count) + digits
}
