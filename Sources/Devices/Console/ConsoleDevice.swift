// SPDX-License-Identifier: Apache-2.0

public import Linux
public import Virtio
internal import Synchronization

/// A virtio console with one port (virtio 1.2 §5.3): a Linux guest's `hvc0`.
///
/// No byte is lost or overtakes another, in either direction. The driver's buffers are copied and returned immediately:
/// what the sink does not take waits in a ring, and only when that is full do buffers wait. Input that has no room
/// stays with the caller.
public final class ConsoleDevice: VirtioDevice, ConsolePort {
    public let name: String
    public let deviceID: UInt32 = 3
    public let features: FeatureSet = [.consoleSize, .emergencyWrite]
    public let maximumQueueSizes: [UInt16] = [64, 64]
    public let configuration = ConfigurationSpace([UInt8](repeating: 0, count: Field.size))
    public let deviceEvents: DeviceEvents

    private let line: ConsoleLine
    private let worker: DeviceWorker
    private let interrupt = Guarded<ConfigurationInterrupt?>(nil)

    /// `struct virtio_console_config` (§5.3.4).
    private enum Field {
        static let columns = 0, rows = 2, emergencyWrite = 8
        static let size = 12
    }

    /// Creates the device; ``start()`` starts its I/O thread.
    /// - Parameters:
    ///   - name: of the device and its I/O thread: `con0`.
    ///   - sink: takes the output; called by the I/O thread, and by vCPU threads for an emergency write.
    ///   - onRoom: signals that ``receive(_:)`` accepts bytes again after it had refused some; called by the I/O
    ///     thread.
    ///   - inputDelay: how long input waits for a driver that prints nothing, in milliseconds. Linux discards what
    ///     arrives between its first receive buffer and the registration of hvc0.
    ///   - events: receives events for the log.
    public init(
        name: String, sink: any SerialSink, onRoom: @escaping @Sendable () -> Void, inputDelay: Int = 500,
        events: DeviceEvents = .none
    ) throws(SystemCallError) {
        self.name = name
        deviceEvents = events
        line = try ConsoleLine(sink: sink, onRoom: onRoom)
        worker = try DeviceWorker(
            name: name,
            engine: try ConsoleEngine(line, queueSize: maximumQueueSizes[0], inputDelay: inputDelay, events: events),
            events: events
        )
    }

    // MARK: The host's end

    public func receive(_ bytes: Span<UInt8>) -> Int { line.receive(bytes) }

    @discardableResult public func flush() -> Bool {
        worker.perform(ConsoleEngine.Flush())
        // Without a driver no thread has to hold buffers back.
        return line.flush()
    }

    public var pendingOutput: Int { line.pendingOutput }
    /// None: a driver whose output has no room waits.
    public var droppedOutput: UInt64 { 0 }
    public var lostOutput: UInt64 { line.sink.lostBytes }

    /// Bytes from the guest, and to it.
    public var counters: ConsoleCounters { line.counters }

    /// Tells the driver the terminal's size (VIRTIO_CONSOLE_F_SIZE). Any thread.
    public func setSize(_ size: TerminalSize) {
        let before = configuration.generation
        configuration.update { bytes in
            for (offset, value) in [(Field.columns, size.columns), (Field.rows, size.rows)] {
                bytes[offset] = UInt8(truncatingIfNeeded: value)
                bytes[offset + 1] = UInt8(truncatingIfNeeded: value >> 8)
            }
        }
        if configuration.generation != before { interrupt.withLock { $0?.signal() } }
    }

    // MARK: VirtioDevice

    public func start(first: @escaping @Sendable () -> Void) throws(SystemCallError) {
        try worker.start(first: first)
    }

    /// One character, before or without a driver (§5.3.4): it overtakes what waits in buffers.
    public func writeConfiguration(_ value: UInt64, at offset: Int, size: Int) {
        guard offset == Field.emergencyWrite else { return }
        line.send(UInt8(truncatingIfNeeded: value))
    }

    public func activate(_ activation: Activation) {
        interrupt.withLock {
            $0 = activation.features.contains(.consoleSize) ? activation.interrupts.configuration : nil
        }
        worker.activate(activation)
    }

    public func reset() {
        interrupt.withLock { $0 = nil }
        worker.reset()
    }

    public func stopQueue(_ index: Int) { worker.stopQueue(index) }
    public func startQueue(_ configuration: QueueConfiguration) { worker.startQueue(configuration) }
    public func pause(onQuiet: @escaping @Sendable () -> Void) { worker.pause(onQuiet: onQuiet) }
    public func resume() { worker.resume() }
}

extension FeatureSet {
    /// VIRTIO_CONSOLE_F_SIZE: the configuration space has the terminal's size (virtio 1.2 §5.3.3).
    static let consoleSize = FeatureSet(bit: 0)
    /// VIRTIO_CONSOLE_F_EMERG_WRITE: a write to the configuration space is a character of output.
    static let emergencyWrite = FeatureSet(bit: 2)
}

/// What a virtio console has moved.
public final class ConsoleCounters: Sendable {
    /// Bytes that the guest has read.
    public let received = DeviceCounters.Counter()
    /// Bytes that it has written.
    public let sent = DeviceCounters.Counter()
}

/// What the I/O thread of a ``ConsoleDevice`` shares with the host's end: input that waits for the driver, and output
/// that waits for the sink.
final class ConsoleLine: Sendable {
    /// Bytes of output that wait for the sink before a driver's buffers do.
    static let outputCapacity = 64 << 10
    private static let inputCapacity = 4096

    let sink: any SerialSink
    let counters = ConsoleCounters()
    /// Signalled for the I/O thread when there is input.
    let arrival: EventFD
    private let onRoom: @Sendable () -> Void
    private let input = Guarded(Input())
    private let output = Guarded(ByteQueue(capacity: outputCapacity))

    private struct Input {
        var bytes = ByteQueue(capacity: inputCapacity)
        /// Some had to be refused.
        var wasRefused = false
    }

    init(sink: any SerialSink, onRoom: @escaping @Sendable () -> Void) throws(SystemCallError) {
        self.sink = sink
        self.onRoom = onRoom
        arrival = try EventFD()
    }

    // MARK: Input

    func receive(_ bytes: Span<UInt8>) -> Int {
        let taken = input.withLock { input in
            let taken = input.bytes.append(bytes)
            if taken < bytes.count { input.wasRefused = true }
            return taken
        }
        if taken > 0 { arrival.signal() }
        return taken
    }

    var hasInput: Bool { input.withLock { !$0.bytes.isEmpty } }

    /// Moves input to a driver's buffers.
    /// - Returns: how many bytes.
    func moveInput(to buffers: IOVectors) -> Int {
        let (count, hasRoom) = input.withLock { input in
            let count = input.bytes.move(to: buffers)
            // Once for all of them, not for each byte.
            let hasRoom = input.wasRefused && input.bytes.isEmpty
            if hasRoom { input.wasRefused = false }
            return (count, hasRoom)
        }
        if hasRoom { onRoom() }
        return count
    }

    // MARK: Output

    /// Gives bytes to the sink, behind what waits, or keeps them.
    /// - Returns: how many, from the front.
    func send(_ bytes: Span<UInt8>) -> Int {
        output.withLock { output in
            output.drain(to: sink)
            var done = output.isEmpty ? min(max(sink.take(bytes), 0), bytes.count) : 0
            done += output.append(bytes.extracting(done...))
            return done
        }
    }

    /// Gives one byte to the sink; dropped if there is no room for it.
    func send(_ byte: UInt8) {
        let bytes = CollectionOfOne(byte)
        _ = send(bytes.span)
    }

    /// - Returns: whether nothing waits any more.
    func flush() -> Bool {
        output.withLock { output in
            output.drain(to: sink)
            return output.isEmpty
        }
    }

    var pendingOutput: Int { output.withLock { $0.count } }
}
