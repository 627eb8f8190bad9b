// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import Linux
internal import Synchronization
internal import Virtio

/// The balloon's I/O thread: the owner of its queues.
struct BalloonEngine: DeviceEngine, ~Copyable, @unchecked Sendable {
    // Moves to its thread as a whole and stays there, the queues with it: hence `Sendable`.

    private enum Token {
        /// The guest's statistics are wanted again.
        static let statistics = DeviceWorkerToken.firstOfEngine
        /// The host may have huge pages again.
        static let retry = DeviceWorkerToken.firstOfEngine + 1
    }

    /// What is done in one turn: requests, pieces of page numbers, bytes of ranges. The rest waits for the next one.
    private static let turn = (requests: 64, pieces: 4, bytes: 256 << 20 as UInt64)
    /// Milliseconds until a huge page that the host did not have is tried again.
    private static let retryDelay = 100

    /// A queue and the request of it that is under way; of the statistics' queue, the one that the device keeps.
    struct Line: ~Copyable {
        var queue: Virtqueue
        var chain: DescriptorChain?
        /// Bytes of page numbers that are done.
        var done: UInt64 = 0
    }

    let state: BalloonState
    private let configuration: ConfigurationSpace
    let events: DeviceEvents
    private let buffers: IOVectorPool
    private let statisticsTimer: TimerFD
    private let retryTimer: TimerFD
    var numbers: PageNumbers

    var activation: Activation?
    /// By ``BalloonQueue``.
    var lines: InlineArray<5, Line?>
    /// The queues by their numbers.
    private var order: [BalloonQueue] = []
    private(set) var queueAtWork = 0
    /// Where the host's pages are larger than the balloon's, and the driver tells of each that it takes.
    var ledger: HugePageLedger?
    private var isPaused = false
    /// Nothing is on its way when a call has returned.
    let isQuiet = true
    /// The command of the next run of hints.
    private var nextRun = BalloonHintCommand.firstRun
    var acknowledgesEndOfHints = false

    init(
        queueSize: Int, state: BalloonState, configuration: ConfigurationSpace, events: DeviceEvents
    ) throws(SystemCallError) {
        let statisticsTimer = try TimerFD(), retryTimer = try TimerFD()
        self.statisticsTimer = statisticsTimer
        self.retryTimer = retryTimer
        numbers = PageNumbers()
        lines = InlineArray { _ in nil }
        self.state = state
        self.configuration = configuration
        self.events = events
        buffers = IOVectorPool(slots: BalloonQueue.allCases.count, capacity: queueSize)
    }

    // MARK: Life

    mutating func activate(_ activation: Activation, epoll: borrowing Epoll) throws(VirtqueueError) {
        self.activation = activation
        order = BalloonQueue.order(
            activation.features, ready: activation.queues.lazy.filter(\.isReady).map(\.index))
        let memory = activation.memory
        if memory.backing.pageSize > BalloonSettings.pageSize, activation.features.contains(.balloonMustTellHost) {
            ledger = HugePageLedger(size: memory.size, hugePageSize: memory.backing.pageSize)
        }
        // Fails only for lack of kernel memory.
        do throws(SystemCallError) {
            try epoll.add(statisticsTimer.rawValue, .input, token: Token.statistics)
            try epoll.add(retryTimer.rawValue, .input, token: Token.retry)
        } catch {
            events.report(.needsReset, .error, "\(error); the device does nothing until the driver resets it")
            activation.interrupts.configuration.markNeedsReset()
        }
        for queue in activation.queues where queue.isReady {
            try start(queue.index, try activation.makeQueue(queue.index))
        }
        startStatisticsTimer()
    }

    private mutating func start(_ index: Int, _ queue: consuming Virtqueue?) throws(VirtqueueError) {
        // A queue without a purpose is left alone.
        guard order.indices.contains(index), let queue else { return }
        lines[order[index].rawValue] = Line(queue: queue)
    }

    mutating func reset(epoll: borrowing Epoll) {
        epoll.remove(statisticsTimer.rawValue)
        epoll.remove(retryTimer.rawValue)
        for index in lines.indices { lines[index] = nil }
        activation = nil
        ledger = nil
        isPaused = false
        setHintCommand(BalloonHintCommand.stop)
    }

    mutating func stopQueue(_ index: Int, epoll: borrowing Epoll) {
        if order.indices.contains(index) { lines[order[index].rawValue] = nil }
    }

    mutating func startQueue(
        _ configuration: QueueConfiguration, of activation: Activation, epoll: borrowing Epoll
    ) throws(VirtqueueError) {
        try start(
            configuration.index, try Virtqueue(configuration, features: activation.features, ram: activation.ram))
    }

    /// Puts requests that are under way back: what is done of them may be done once more.
    mutating func pause(epoll: borrowing Epoll) {
        isPaused = true
        for index in lines.indices where lines[index]?.chain != nil {
            lines[index]?.queue.rewind()
            lines[index]?.chain = nil
            lines[index]?.done = 0
        }
    }

    mutating func resume(epoll: borrowing Epoll) {
        isPaused = false
        startStatisticsTimer()
    }

    // MARK: Requests of the device

    mutating func perform(_ request: any DeviceRequest, epoll: borrowing Epoll) {
        guard let notice = request as? BalloonNotice else { return }
        switch notice {
        case .configuration: activation?.interrupts.configuration.signal()
        case .interval: startStatisticsTimer()
        case .hints(let acknowledgesEnd):
            acknowledgesEndOfHints = acknowledgesEnd
            setHintCommand(nextRun)
            nextRun = nextRun == .max ? BalloonHintCommand.firstRun : nextRun + 1
        case .endOfHints: setHintCommand(BalloonHintCommand.done)
        }
    }

    func setHintCommand(_ command: UInt32) {
        guard state.hintCommand.exchange(command, ordering: .relaxed) != command else { return }
        configuration.update { BalloonField.hintCommand.store(command, in: &$0) }
        activation?.interrupts.configuration.signal()
    }

    private func startStatisticsTimer() {
        let interval = state.interval.load(ordering: .relaxed)
        if interval > 0, activation != nil { statisticsTimer.start(milliseconds: Int(interval) * 1000) }
    }

    // MARK: Work

    mutating func notified(queue index: Int, epoll: borrowing Epoll) throws(VirtqueueError) {
        queueAtWork = index
        guard !isPaused, order.indices.contains(index) else { return }
        if order[index] == .statistics { try takeStatistics() } else { try serve(order[index], number: index) }
    }

    mutating func ready(token: UInt64, events: Epoll.Events, epoll: borrowing Epoll) throws(VirtqueueError) {
        if token == Token.retry {
            guard retryTimer.take(), let index = order.firstIndex(of: .deflate) else { return }
            return try notified(queue: index, epoll: epoll)
        }
        guard statisticsTimer.take(), !isPaused else { return }
        returnStatistics()
        startStatisticsTimer()
    }

    /// Serves a queue as far as one turn reaches.
    private mutating func serve(_ role: BalloonQueue, number: Int) throws(VirtqueueError) {
        let line = role.rawValue, state = self.state
        var left = Self.turn
        repeat {
            lines[line]?.queue.disableNotifications()
            var isStalled = false
            while left.requests > 0, left.pieces > 0, left.bytes > 0, !isStalled, try takeRequest(role) {
                let isDone: Bool
                switch role {
                case .inflate: isDone = inflate(&left.pieces)
                case .deflate:
                    isDone = deflate(&left.pieces)
                    isStalled = !isDone && left.pieces > 0
                case .hints: isDone = takeHints(&left.bytes)
                case .reports: isDone = takeFreePages(line, &left.bytes, count: state.reported, isIgnored: hasPoison)
                case .statistics: isDone = true
                }
                guard isDone else { break }
                complete(line)
                left.requests -= 1
            }
            if lines[line]?.queue.publish() == true { activation?.interrupts.queues[number].signal() }
            if isStalled { return retryTimer.start(milliseconds: Self.retryDelay) }
            if left.requests == 0 || left.pieces == 0 || left.bytes == 0 {
                return activation?.doorbells[number].event.signal() ?? ()
            }
        } while lines[line]?.queue.enableNotifications() == true
    }

    /// Indicates whether there is a request: the one under way, or the next one.
    private mutating func takeRequest(_ role: BalloonQueue) throws(VirtqueueError) -> Bool {
        let line = role.rawValue
        if lines[line]?.chain != nil { return true }
        guard let chain = try lines[line]?.queue.pop(into: buffers[line]) else { return false }
        lines[line]?.chain = chain
        lines[line]?.done = 0
        return true
    }

    private mutating func complete(_ line: Int) {
        guard let head = lines[line]?.chain?.head else { return }
        lines[line]?.queue.push(head, written: 0)
        lines[line]?.chain = nil
        activation?.counters.requests.add()
    }

    // MARK: Statistics

    /// Reads the buffer that the driver has filled, and keeps it until new figures are wanted (§5.5.6.3).
    private mutating func takeStatistics() throws(VirtqueueError) {
        let line = BalloonQueue.statistics.rawValue
        var left = Self.turn.requests
        repeat {
            lines[line]?.queue.disableNotifications()
            while left > 0, let chain = try lines[line]?.queue.pop(into: buffers[line]) {
                // A driver has one buffer; of several, the last one is kept.
                complete(line)
                lines[line]?.chain = chain
                state.guest.withLock { $0.update(chain.readable) }
                left -= 1
            }
            publishStatistics()
            guard left > 0 else { return signalStatisticsDoorbell() }
        } while lines[line]?.queue.enableNotifications() == true
    }

    /// Asks the driver for new figures by returning its buffer.
    private mutating func returnStatistics() {
        complete(BalloonQueue.statistics.rawValue)
        publishStatistics()
    }

    private mutating func publishStatistics() {
        guard lines[BalloonQueue.statistics.rawValue]?.queue.publish() == true,
            let number = order.firstIndex(of: .statistics)
        else { return }
        activation?.interrupts.queues[number].signal()
    }

    private func signalStatisticsDoorbell() {
        guard let number = order.firstIndex(of: .statistics) else { return }
        activation?.doorbells[number].event.signal()
    }
}
