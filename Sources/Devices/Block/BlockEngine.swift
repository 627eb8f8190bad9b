// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import DiskImage
internal import Linux
internal import Synchronization
internal import Virtio

/// The I/O thread's side of one queue of a block device: takes requests from the queue, hands them to the disk,
/// finishes them.
///
/// A request's number in the disk's engine is its slot here too: for its buffers, and for what is to be remembered
/// until it ends. There are as many as the queue has entries, so a chain that can be popped always has one.
struct BlockEngine: DeviceEngine, ~Copyable, @unchecked Sendable {
    // Moves to its thread as a whole and stays there, the queue with it: hence `Sendable`.
    private var disk: DiskEngine
    private let buffers: IOVectorPool
    private var pending: [PendingBlockRequest?]
    private let size: DiskCapacity
    /// Bytes of the disk.
    private var capacity: UInt64 { size.capacity.load(ordering: .relaxed) }
    private let isReadOnly: Bool
    /// Bytes of data in a request: size_max × seg_max.
    private let largestTransfer: UInt64
    private let serial: String
    private let cache: WriteCache
    private let statistics: BlockStatistics
    /// What this queue has done.
    private let counts: BlockStatistics.Queue
    private let events: DeviceEvents
    private let onError: DiskErrorPolicy

    /// The number of the queue.
    private let index: Int
    var queueAtWork: Int { index }
    private var queue: Virtqueue?
    private var interrupt: QueueInterrupt?
    private var configurationInterrupt: ConfigurationInterrupt?
    private var counters: DeviceCounters?
    /// What the driver has negotiated: requests of other features are unknown.
    private var features: FeatureSet = []
    /// The queue's, to come back to it after others had their turn.
    private var doorbell: Doorbell?
    /// Indicates whether the disk's descriptor is watched: from the first activation on. Other queues' engines may need
    /// this one's while it is idle.
    private var isWatched = false
    /// The same for the wakeup of other queues' engines, to which a ring listens unless the host refuses it.
    private var isWakeupWatched = false
    private var isPaused = false
    /// nil without limits of the disk.
    private var throttle: Throttle?
    private var isThrottleWatched = false
    /// Another size for the disk, which waits for the end of what is in flight in all queues.
    private var resizing: DiskResize?
    /// Indicates whether nothing of this queue's is in its way any more.
    private var isReadyToResize = false
    /// Indicates whether nothing is taken from the queue for now.
    private var isHolding: Bool { isPaused || resizing != nil || stop.isStopped }
    private let stop: DiskStop
    /// Requests that the host has failed, in their order, which are started again when the machine is resumed.
    private var failedRequests: [DiskCompletion] = []
    /// Other queues' engines may still use this one's; they are quiescent when all of them have reported it.
    var isQuiet: Bool { disk.inFlight == 0 }

    private static let diskToken = DeviceWorkerToken.firstOfEngine
    /// What has waited for the disk's limits may continue.
    private static let throttleToken = DeviceWorkerToken.firstOfEngine + 1
    /// Requests in one run; then other work has its turn.
    private static let budget = 1024
    /// How often other threads have their turn before completions are shown to the driver.
    private static let gatherTurns = 4

    init(
        _ disk: consuming DiskEngine, queue index: Int, queueSize: Int, capacity: DiskCapacity, largestTransfer: UInt64,
        isReadOnly: Bool, serial: String,
        cache: WriteCache, statistics: BlockStatistics, events: DeviceEvents,
        onError: DiskErrorPolicy, stop: DiskStop, throttle: consuming Throttle? = nil
    ) {
        self.throttle = throttle
        self.onError = onError
        self.stop = stop
        failedRequests.reserveCapacity(queueSize)
        self.events = events
        self.disk = disk
        self.index = index
        size = capacity
        self.largestTransfer = largestTransfer
        self.isReadOnly = isReadOnly
        buffers = IOVectorPool(slots: queueSize, capacity: queueSize)
        pending = Array(repeating: nil, count: queueSize)
        self.serial = serial
        self.cache = cache
        self.statistics = statistics
        counts = statistics.queues[index]
    }

    // MARK: - The worker's calls

    mutating func activate(_ activation: Activation, epoll: borrowing Epoll) throws(VirtqueueError) {
        interrupt = activation.interrupts.queues[index]
        configurationInterrupt = activation.interrupts.configuration
        counters = activation.counters
        features = activation.features
        doorbell = activation.doorbells[index]
        resizing?.hold(doorbell, configurationInterrupt)
        queue = try activation.makeQueue(index)
        guard !isWatched else { return }
        // Fails only for lack of kernel memory, and then the device cannot work.
        do throws(SystemCallError) {
            try epoll.add(disk.descriptor, .input, token: Self.diskToken)
            isWatched = true
            if let timer = throttle?.descriptor, !isThrottleWatched {
                try epoll.add(timer, .input, token: Self.throttleToken)
                isThrottleWatched = true
            }
        } catch {
            events.report(.needsReset, .error, "\(error); the device does nothing until the driver resets it")
            activation.interrupts.configuration.markNeedsReset()
            queue = nil
        }
    }

    mutating func notified(queue index: Int, epoll: borrowing Epoll) throws(VirtqueueError) {
        disk.beginTurn()
        if resizing?.isOver == true { resizing = nil }
        try takeRequests()
        resizeIfQuiet()
        watchWakeup(epoll)
    }

    mutating func ready(token: UInt64, events: Epoll.Events, epoll: borrowing Epoll) throws(VirtqueueError) {
        disk.beginTurn()
        if token == Self.throttleToken {
            throttle?.expire()
            try takeRequests()
            resizeIfQuiet()
            return watchWakeup(epoll)
        }
        handleCompletions()
        gather()
        publish()
        comeBack()
        resizeIfQuiet()
        watchWakeup(epoll)
    }

    private mutating func watchWakeup(_ epoll: borrowing Epoll) {
        guard !isWakeupWatched, let wakeup = disk.unwatchedWakeup else { return }
        isWakeupWatched = (try? epoll.add(wakeup, .input, token: Self.diskToken)) != nil
    }

    mutating func reset(epoll: borrowing Epoll) {
        cancelInFlight()
        queue = nil
        interrupt = nil
        configurationInterrupt = nil
        counters = nil
        doorbell = nil
        isPaused = false
    }

    mutating func pause(epoll: borrowing Epoll) { isPaused = true }

    mutating func resume(epoll: borrowing Epoll) { isPaused = false }

    mutating func perform(_ request: any DeviceRequest, epoll: borrowing Epoll) {
        switch request {
        case let request as DiskResize:
            // There is one at a time.
            resizing = request
            isReadyToResize = false
            request.hold(doorbell, configurationInterrupt)
            resizeIfQuiet()
        // Processing the queue begins with it.
        case is DiskRetry: doorbell?.event.signal()
        case is DiskSummary: disk.reportLosses()
        default: break
        }
    }

    private mutating func resizeIfQuiet() {
        guard let request = resizing, !isReadyToResize, disk.isIdle else { return }
        isReadyToResize = true
        guard request.arrive() else { return }
        resizing = nil
        do throws(DiskImageError) {
            if let size = request.size { try disk.resize(to: size) } else { try disk.measure() }
            request.end(.success(disk.size))
        } catch { request.end(.failure(error)) }
    }

    mutating func stopQueue(_ index: Int, epoll: borrowing Epoll) {
        cancelInFlight()
        queue = nil
    }

    mutating func startQueue(
        _ configuration: QueueConfiguration, of activation: Activation, epoll: borrowing Epoll
    ) throws(VirtqueueError) {
        queue = try Virtqueue(configuration, features: activation.features, ram: activation.ram)
    }

    // MARK: - Requests

    /// Takes all that is there, hands it to the kernel in one call, and shows the driver in one step what is done
    /// already (reads from the host's page cache complete immediately).
    ///
    /// Bounded in requests and in bytes: a driver may add requests as fast as they are done, and need no CPU for that
    /// if what it reads from its disk is the next state of the ring. A reset has to come through.
    private mutating func takeRequests() throws(VirtqueueError) {
        // Also when another queue's rings have broken the rules: until the reset the device is quiet.
        guard let size = queue?.size, configurationInterrupt?.needsReset != true else { return }
        retryFailed()
        var budget = Self.budget
        var isLimited = false
        repeat {
            queue?.disableNotifications()
            while !isHolding, budget > 0, !disk.isTurnOver, try queue?.hasAvailable() == true {
                if throttle != nil, throttle?.mayStart() == false {
                    isLimited = true
                    break
                }
                // There are as many slots as the largest queue has descriptors: some head is in flight twice.
                guard let slot = disk.acquire() else { throw .tooManyInFlight(size: size) }
                guard let chain = try pop(slot) else { break }
                begin(chain, slot)
                budget -= 1
            }
            submit()
            handleCompletions()
            publish()
            if budget == 0 || disk.isTurnOver { return doorbell?.event.signal() ?? () }
            // The queue is processed afterwards.
            if isHolding || isLimited { return }
        } while queue?.enableNotifications() == true
    }

    /// Has this thread come back to what was put off to the next turn.
    private func comeBack() {
        if disk.isTurnOver { doorbell?.event.signal() }
    }

    private mutating func pop(_ slot: Int) throws(VirtqueueError) -> DescriptorChain? {
        do throws(VirtqueueError) {
            if let chain = try queue?.pop(into: buffers[slot]) { return chain }
        } catch {
            disk.release(slot)
            throw error
        }
        disk.release(slot)
        return nil
    }

    /// Starts a request, or completes it immediately if there is nothing to wait for.
    private mutating func begin(_ chain: DescriptorChain, _ slot: Int) {
        var readable = chain.readable
        var writable = chain.writable
        guard let status = writable.removeLastByte() else {
            // There is no status byte to write; the chain is returned anyway.
            counts.failures.add()
            counters?.errors.add()
            disk.release(slot)
            queue?.push(chain.head, written: 0)
            return
        }
        guard let header = BlockRequestHeader(readable) else {
            return reject(chain.head, status, .ioError, slot, room: writable.byteCount)
        }
        readable.removeFirst(BlockRequestHeader.size)
        if throttle != nil { charge(header.type, readable, writable) }
        pending[slot] = PendingBlockRequest(
            head: chain.head, status: status, readable: readable, type: header.type, writable: writable)

        switch header.type {
        case BlockRequestType.read: transfer(slot, .read, header.sector, writable)
        case BlockRequestType.write: transfer(slot, .write, header.sector, readable)
        case BlockRequestType.flush: disk.start(slot, .flush, offset: 0, length: 0)
        case BlockRequestType.getID: identify(slot, writable)
        case BlockRequestType.discard, BlockRequestType.writeZeroes:
            let needed: FeatureSet = header.type == BlockRequestType.discard ? .blockDiscard : .blockWriteZeroes
            guard isReadOnly || features.contains(needed) else { return completeRequest(slot, .unsupported) }
            guard !isReadOnly, !readable.isEmpty, readable.byteCount % BlockRange.size == 0,
                readable.byteCount / BlockRange.size <= UInt64(BlockConfiguration.maximumRanges)
            else { return completeRequest(slot, .ioError) }
            startNextRange(slot)
        default: completeRequest(slot, .unsupported)
        }
    }

    /// Counts a request towards the disk's limits: one, and the bytes of its data.
    private mutating func charge(_ type: UInt32, _ readable: IOVectors, _ writable: IOVectors) {
        switch type {
        case BlockRequestType.read: throttle?.charge(bytes: writable.byteCount)
        case BlockRequestType.write: throttle?.charge(bytes: readable.byteCount)
        default: throttle?.charge(bytes: 0)
        }
    }

    private mutating func transfer(_ slot: Int, _ operation: DiskOperation, _ sector: UInt64, _ data: IOVectors) {
        // No data at all is a driver's mistake: it gave the buffer the wrong direction.
        // More than the announced segments hold no driver sends; a device that took it would be the driver's for
        // minutes.
        guard data.byteCount > 0, data.byteCount <= largestTransfer, data.byteCount % 512 == 0,
            let range = byteRange(sector: sector, count: data.byteCount / 512, size: capacity)
        else { return completeRequest(slot, .ioError) }
        start(slot, operation, range, data)
    }

    private mutating func start(
        _ slot: Int, _ operation: DiskOperation, _ range: (offset: UInt64, length: UInt64), _ data: IOVectors
    ) {
        // The vectors are the slot's own and stay until the slot is released.
        unsafe disk.start(
            slot, operation, offset: range.offset, length: range.length, vectors: data.base, count: data.count)
    }

    private mutating func identify(_ slot: Int, _ writable: IOVectors) {
        let zeroed = writable.fill(count: 20)
        // No more is copied than the span has, and than there is room for.
        unsafe writable.copy(from: serial.utf8Span.span.bytes)
        completeRequest(slot, .ok, written: UInt64(zeroed))
    }

    /// Starts with the next range of a DISCARD or WRITE_ZEROES, or completes the request when that range is wrong.
    private mutating func startNextRange(_ slot: Int) {
        guard let request = pending[slot] else { return }
        guard let range = BlockRange(request.readable, at: request.nextRange) else {
            return completeRequest(slot, .ioError)
        }
        pending[slot]?.nextRange += BlockRange.size
        let isDiscard = request.type == BlockRequestType.discard
        // §5.2.6.2: UNSUPP for flags that are not known, and for UNMAP in a DISCARD.
        guard range.flags & ~(isDiscard ? 0 : BlockRange.unmap) == 0 else { return completeRequest(slot, .unsupported) }
        let limit = isDiscard ? BlockConfiguration.maximumDiscardSectors : BlockConfiguration.maximumWriteZeroesSectors
        guard range.sectors <= limit,
            let bytes = byteRange(sector: range.sector, count: UInt64(range.sectors), size: capacity)
        else { return completeRequest(slot, .ioError) }
        // A file system may have to write them.
        if !isDiscard { throttle?.charge(bytes: bytes.length, operations: 0) }
        let operation: DiskOperation =
            isDiscard ? .discard : range.flags & BlockRange.unmap != 0 ? .writeZeroesUnmapping : .writeZeroes
        disk.start(slot, operation, offset: bytes.offset, length: bytes.length)
    }

    // MARK: - Their ends

    /// Where the host's kernel ends requests on threads of its own that share a CPU with this one, each end wakes this
    /// thread, which would show the driver one request at a time, and each of those costs an interrupt, a kick and four
    /// switches between threads. So those threads have their turn first for as long as that brings something. On an
    /// otherwise idle CPU this takes less than a microsecond.
    private mutating func gather() {
        var turns = Self.gatherTurns
        while turns > 0, disk.inFlight > 0, !disk.isTurnOver {
            let before = disk.inFlight
            Thread.yield()
            handleCompletions()
            if disk.inFlight == before { return }
            turns -= 1
        }
    }

    private mutating func handleCompletions() {
        while let completion = disk.nextCompletion() { handle(completion) }
        // Nothing is left to submit: what was refused meanwhile is reported.
        submit()
    }

    private mutating func handle(_ completion: DiskCompletion) {
        let slot = completion.request
        guard let request = pending[slot] else { return }
        if completion.error != 0 {
            switch react(to: completion) {
            case .report: return completeRequest(slot, .ioError)
            case .stop: return failedRequests.append(completion)
            case .ignore: break
            }
        }
        // What has failed and is ignored is counted as that alone.
        if completion.error == 0 { count(completion) }
        switch completion.operation {
        case .read: return completeRequest(slot, .ok, written: completion.length)
        case .flush: return completeRequest(slot, .ok)
        case .write: break
        case .discard, .writeZeroes, .writeZeroesUnmapping:
            if request.nextRange < request.readable.byteCount { return startNextRange(slot) }
        }
        // Without a write cache the driver takes the end of a write for durable.
        if cache.isWriteback.load(ordering: .acquiring) { return completeRequest(slot, .ok) }
        disk.start(slot, .flush, offset: 0, length: 0)
    }

    private func count(_ completion: DiskCompletion) {
        switch completion.operation {
        case .read:
            counts.reads.add()
            counts.readBytes.add(completion.length)
        case .write:
            counts.writes.add()
            counts.writtenBytes.add(completion.length)
        case .flush: counts.flushes.add()
        case .discard, .writeZeroes, .writeZeroesUnmapping: counts.discards.add()
        }
    }

    /// Decides what becomes of a request that the host, or the image, has refused, and reports it.
    private func react(to completion: DiskCompletion) -> DiskErrorPolicy.Reaction {
        // A write to a read-only disk is the driver's mistake.
        if completion.error == EROFS, isReadOnly { return .report }
        let reaction = onError.reaction(to: completion, canRetry: disk.canRetry(completion))
        let consequence: String
        switch reaction {
        case .report: consequence = "the guest gets an I/O error"
        case .ignore:
            statistics.ignored.add()
            consequence = "ignored: success is reported to the guest"
        case .stop:
            // One line for all that fails until the machine is resumed. What fails again then is reported again.
            guard stop.stop() else { return reaction }
            statistics.stops.add()
            consequence =
                "the machine is paused, and the request is started again when it is resumed (Ctrl-A r or SIGUSR2)"
        }
        let kind: DeviceEvents.Kind =
            completion.isDamage
            ? .damage : .hostError(operation: completion.operation.rawValue, errno: completion.error)
        events.report(
            kind, .error, isUrgent: reaction == .stop,
            "\(disk.failure(of: completion).map { "\($0)" } ?? ""); \(consequence)")
        return reaction
    }

    /// Starts the requests again that had the disk stop.
    private mutating func retryFailed() {
        guard !failedRequests.isEmpty, !isHolding else { return }
        for completion in failedRequests {
            let slot = completion.request, range = (offset: completion.offset, length: completion.length)
            guard let request = pending[slot] else { continue }
            switch completion.operation {
            case .read: start(slot, .read, range, request.writable)
            case .write: start(slot, .write, range, request.readable)
            case .flush, .discard, .writeZeroes, .writeZeroesUnmapping:
                disk.start(slot, completion.operation, offset: range.offset, length: range.length)
            }
        }
        // None completes before completions are processed next.
        failedRequests.removeAll(keepingCapacity: true)
    }

    /// The one end of every request that has a slot: status, used length, slot.
    private mutating func completeRequest(_ slot: Int, _ status: BlockStatus, written: UInt64 = 0) {
        guard let request = pending[slot] else { return }
        pending[slot] = nil
        returnChain(request.head, request.status, status, slot, written: written, room: request.writable.byteCount)
    }

    private mutating func reject(_ head: UInt16, _ byte: GuestByte, _ status: BlockStatus, _ slot: Int, room: UInt64) {
        returnChain(head, byte, status, slot, written: 0, room: room)
    }

    private mutating func returnChain(
        _ head: UInt16, _ byte: GuestByte, _ status: BlockStatus, _ slot: Int, written: UInt64, room: UInt64
    ) {
        byte.store(status.rawValue)
        disk.release(slot)
        counters?.requests.add()
        if status != .ok {
            counters?.errors.add()
            counts.failures.add()
        }
        // Bytes that are known to be written from the first on (virtio 1.2 §2.7.8.2): the status byte comes after all
        // of the data's room.
        queue?.push(head, written: UInt32(clamping: written == room ? written &+ 1 : written))
    }

    /// What a kernel that takes no operations refuses ends as IOERR, which every driver understands: a device that
    /// asked for a reset would be in the same state after it. The host learns why.
    private mutating func submit() {
        do throws(DiskImageError) { try disk.submit() } catch {
            events.report(.refusedOperations, .error, "\(error); requests of the guest fail")
        }
    }

    private mutating func publish() {
        if configurationInterrupt?.needsReset != true, queue?.publish() == true { interrupt?.signal() }
    }

    /// Cancels everything in flight. It is not reported to the driver any more.
    private mutating func cancelInFlight() {
        disk.cancelAll()
        // The disk has nothing of these.
        for completion in failedRequests { disk.release(completion.request) }
        failedRequests.removeAll(keepingCapacity: true)
        for slot in pending.indices { pending[slot] = nil }
        resizeIfQuiet()
    }
}
