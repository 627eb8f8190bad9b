// SPDX-License-Identifier: Apache-2.0

public import Linux
internal import Synchronization
public import Virtio

/// A virtio memory balloon (virtio 1.2 §5.5): the guest gives up memory, which goes back to the host.
///
/// The driver in the guest chooses the pages and tells their numbers; the device returns them to the host's kernel.
/// Nothing forces a guest: its memory may grow again up to the machine's at any time.
public final class BalloonDevice: VirtioDevice {
    public let name: String
    public let deviceID: UInt32 = 5
    public let features: FeatureSet
    // All five, since a driver may use either of two numberings (``BalloonQueue/order(_:ready:)``).
    public let maximumQueueSizes = [UInt16](repeating: queueSize, count: BalloonQueue.allCases.count)
    public let configuration: ConfigurationSpace
    public let deviceEvents: DeviceEvents
    /// What the device offers; the target and the interval are those of the start.
    public let settings: BalloonSettings

    static let queueSize: UInt16 = 128

    private let state: BalloonState
    private let worker: DeviceWorker

    /// Creates the device; ``start()`` starts its I/O thread.
    /// - Parameters:
    ///   - name: of the device and its I/O thread: `balloon0`.
    ///   - settings: a target up to ``BalloonSettings/maximumTarget``.
    ///   - events: receives events for the log.
    public init(
        name: String, settings: BalloonSettings, events: DeviceEvents = .none
    ) throws(SystemCallError) {
        self.name = name
        self.settings = settings
        features = settings.features
        deviceEvents = events
        let state = BalloonState(settings)
        self.state = state
        var bytes = [UInt8](repeating: 0, count: BalloonField.bytes)
        BalloonField.target.store(state.target.load(ordering: .relaxed), in: &bytes)
        let configuration = ConfigurationSpace(bytes)
        self.configuration = configuration
        let engine = try BalloonEngine(
            queueSize: Int(Self.queueSize), state: state, configuration: configuration, events: events)
        worker = try DeviceWorker(name: name, engine: engine, events: events)
    }

    public func start(first: @escaping @Sendable () -> Void) throws(SystemCallError) {
        try worker.start(first: first)
    }

    public func activate(_ activation: Activation) { worker.activate(activation) }

    public func reset() {
        worker.reset()
        // The driver's fields; what the device wants of the next driver stays.
        state.actual.store(0, ordering: .relaxed)
        state.poison.store(0, ordering: .relaxed)
        configuration.update {
            BalloonField.actual.store(0, in: &$0)
            BalloonField.poison.store(0, in: &$0)
        }
    }

    public func stopQueue(_ index: Int) { worker.stopQueue(index) }
    public func startQueue(_ configuration: QueueConfiguration) { worker.startQueue(configuration) }
    public func pause(onQuiet: @escaping @Sendable () -> Void) { worker.pause(onQuiet: onQuiet) }
    public func resume() { worker.resume() }

    public func writeConfiguration(_ value: UInt64, at offset: Int, size: Int) {
        guard size == 4, let field = BalloonField(rawValue: offset) else { return }
        let value = UInt32(truncatingIfNeeded: value)
        switch field {
        case .actual: state.actual.store(value, ordering: .relaxed)
        case .poison: state.poison.store(value, ordering: .relaxed)
        case .target, .hintCommand: return
        }
        configuration.update { field.store(value, in: &$0) }
    }

    // MARK: The host's side; any thread

    /// Figures of the moment.
    public var statistics: BalloonStatistics { state.statistics }

    /// Changes the amount of memory that the guest is to give up. A configuration change informs the driver.
    /// - Parameter target: bytes, at most ``BalloonSettings/maximumTarget``; a part of a page is left out.
    public func setTarget(_ target: UInt64) {
        let pages = UInt32(clamping: target / BalloonSettings.pageSize)
        state.target.store(pages, ordering: .relaxed)
        configuration.update { BalloonField.target.store(pages, in: &$0) }
        deviceEvents.trace("the target is \(pages) pages")
        worker.perform(BalloonNotice.configuration)
    }

    /// Changes the interval of the guest's statistics, if the device offers them.
    /// - Parameter seconds: 1 … ``BalloonSettings/maximumInterval``.
    /// - Returns: false for a device that was created without.
    public func setStatisticsInterval(_ seconds: UInt32) -> Bool {
        guard settings.statisticsInterval > 0 else { return false }
        state.interval.store(min(max(seconds, 1), BalloonSettings.maximumInterval), ordering: .relaxed)
        worker.perform(BalloonNotice.interval)
        return true
    }

    /// Asks the guest for hints about all memory that it does not use, which goes back to the host as they come.
    /// - Parameter acknowledgesEnd: lets the guest use that memory again when it has given all hints; otherwise
    ///   ``endHints()`` does, and until then the guest has less memory.
    /// - Returns: false for a device that does not offer hints.
    public func requestHints(acknowledgesEnd: Bool) -> Bool {
        guard settings.hintsFreePages else { return false }
        worker.perform(BalloonNotice.hints(acknowledgesEnd: acknowledgesEnd))
        return true
    }

    /// Ends a run of hints: the guest may use all memory again. The same result.
    public func endHints() -> Bool {
        guard settings.hintsFreePages else { return false }
        worker.perform(BalloonNotice.endOfHints)
        return true
    }
}

/// What the device asks of its engine.
enum BalloonNotice: DeviceRequest {
    /// The configuration space has changed.
    case configuration
    /// The interval of statistics has changed.
    case interval
    case hints(acknowledgesEnd: Bool)
    case endOfHints
}
