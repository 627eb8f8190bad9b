// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Devices
internal import Linux
internal import Synchronization
internal import Virtio

/// Writes a serial port's output to a file, pipe or terminal, or to the clients of a socket. Called by vCPU threads, it
/// never waits.
///
/// Without a reader the output is dropped, as a serial line would do. Clients of a socket that do not read lose it
/// (``ClientOutput``); for a pipe or terminal the guest waits.
final class ConsoleOutput: SerialSink {
    /// Signalled after a byte was refused: the port must be flushed, when ``rawValue`` is writable if there is one,
    /// immediately otherwise. Signalled, too, when a client has fallen behind.
    let attention: EventFD

    private enum Sink {
        case descriptor(DescriptorSink)
        case background(BackgroundWriter)
    }

    private let connection = Guarded<Sink?>(nil)
    /// Those of a socket.
    private let clients = Guarded<[ClientOutput]>([])
    /// Gets what is taken from the guest; nil without a log.
    private let log: BackgroundWriter?
    /// nil without a limit of bytes a second, and after its end.
    private let limit: Guarded<TokenBucket?>
    private let isLimited: Bool

    /// What the log is to say of it.
    let events: DeviceEvents
    private let lost = LostBytes()

    /// - Parameters:
    ///   - mayBlock: the descriptor's writes may wait: a thread does them.
    ///   - rotation: bounds a file.
    ///   - limit: bytes a second that the guest may write to a reader.
    ///   - name: the file's, for messages.
    ///   - log: a file that gets all output, whether there is a client or not.
    init(
        _ descriptor: consuming FileDescriptor?, mayBlock: Bool = false, rotation: FileRotation? = nil,
        limit: TokenBucket.Rate? = nil, name: String = "", log: consuming OutputFile? = nil,
        events: DeviceEvents = .none
    ) throws(SystemCallError) {
        self.events = events
        isLimited = limit != nil
        self.limit = Guarded(limit.map { TokenBucket($0, now: TimerFD.nanoseconds) })
        attention = try EventFD()
        // The thread may call while this object is being destroyed: it signals through a descriptor of its own.
        if let log {
            let path = log.path
            self.log = try Self.writer(log.descriptor, log.rotation, path, lost, events) {}
        } else {
            self.log = nil
        }
        guard let descriptor else { return }
        if mayBlock {
            let signal = try attention.duplicate()
            let writer = try Self.writer(descriptor, rotation, name, lost, events) { signal.signal() }
            connection.withLock { $0 = .background(writer) }
        } else {
            connect(descriptor)
        }
    }

    private static func writer(
        _ descriptor: consuming FileDescriptor, _ rotation: FileRotation?, _ name: String, _ lost: LostBytes,
        _ events: DeviceEvents, onRoom: @escaping @Sendable () -> Void
    ) throws(SystemCallError) -> BackgroundWriter {
        // A reader that has gone is nothing to be reported.
        let isFile = (FileDescriptor.kind(of: descriptor.rawValue) ?? 0) == S_IFREG
        return try BackgroundWriter(
            descriptor, name: "console", rotation: rotation, onRoom: onRoom,
            onLoss: { error, count in
                guard isFile else { return }
                lost.count.add(UInt64(count), ordering: .relaxed)
                events.report(
                    .hostError(operation: 0, errno: error.errno), .warning,
                    "console file \(name): \(error); output of the guest is lost")
            })
    }

    var lostBytes: UInt64 { lost.count.load(ordering: .relaxed) }

    /// The descriptor that output goes to now, to wait until it is writable; nil where a thread does that.
    var rawValue: Int32? {
        connection.withLock { if case .descriptor(let sink)? = $0 { sink.rawValue } else { nil } }
    }

    /// A client's descriptor that output waits for; nil if it waits for none.
    var descriptorBehind: Int32? { clients.withLock { $0.first { $0.pending > 0 }?.rawValue } }

    /// Bytes that were taken, and that a thread has not written yet, or a client not read.
    var pending: Int {
        (log?.pending ?? 0) + clients.withLock { $0.reduce(0) { $0 + $1.pending } }
            + connection.withLock { if case .background(let writer)? = $0 { writer.pending } else { 0 } }
    }

    /// Has ``attention`` signalled when the thread, if there is one, has written some.
    func noticeNextWrite() {
        log?.noticeNextWrite()
        connection.withLock { if case .background(let writer)? = $0 { writer.noticeNextWrite() } }
    }

    /// - Parameter descriptor: non-blocking, or a socket.
    private func connect(_ descriptor: consuming FileDescriptor) {
        // Called within `take` only, whose caller holds this object.
        let sink = DescriptorSink(descriptor, onFull: { [unowned self] in attention.signal() })
        connection.withLock { $0 = .descriptor(sink) }
    }

    /// Adds a client of a socket.
    func add(_ client: ClientOutput) { clients.withLock { $0.append(client) } }

    func remove(_ client: ClientOutput) { clients.withLock { $0.removeAll { $0 === client } } }

    /// Sends clients what waits for them.
    func drainClients() { for client in clients.withLock({ $0 }) { client.drain() } }

    func take(_ bytes: Span<UInt8>) -> Int {
        guard isLimited else { return pass(bytes) }
        // Output without a receiver is not charged.
        guard isConnected || log != nil else { return bytes.count }
        let allowed = limit.withLock { $0?.available(at: TimerFD.nanoseconds) } ?? .max
        guard allowed < bytes.count else {
            let taken = pass(bytes)
            if allowed != .max { limit.withLock { $0?.charge(UInt64(taken)) } }
            return taken
        }
        let taken = allowed > 0 ? pass(bytes.extracting(first: Int(allowed))) : 0
        limit.withLock { $0?.charge(UInt64(taken)) }
        // The loop waits for the limit first.
        attention.signal()
        return taken
    }

    private var isConnected: Bool { connection.withLock { $0 != nil } || clients.withLock { !$0.isEmpty } }

    /// Nanoseconds until the limit allows a byte; nil: now.
    var delay: UInt64? {
        limit.withLock {
            guard let delay = $0?.delay(at: TimerFD.nanoseconds), delay > 0 else { return nil }
            return delay
        }
    }

    /// The guest has ended: what it has written goes to the reader as fast as that takes it.
    func endLimit() { limit.withLock { $0 = nil } }

    /// Gives bytes to the reader, and what it takes to the log: that is a file, which is never behind for long.
    private func pass(_ bytes: Span<UInt8>) -> Int {
        let taken = send(bytes)
        guard let log, taken > 0 else { return taken }
        let kept = log.take(bytes.extracting(first: taken))
        guard kept < taken else { return taken }
        // The guest does not wait for a disk that only has a copy.
        lost.count.add(UInt64(taken - kept), ordering: .relaxed)
        events.report(
            .hostError(operation: 0, errno: EAGAIN), .warning,
            "console log: the host writes it more slowly than the guest prints; output is missing in it")
        return taken
    }

    private func send(_ bytes: Span<UInt8>) -> Int {
        switch connection.withLock({ $0 }) {
        case nil:
            for client in clients.withLock({ $0 }) where client.take(bytes) { attention.signal() }
            return bytes.count
        case .background(let writer)?: return writer.take(bytes)
        case .descriptor(let sink)?:
            let taken = sink.take(bytes)
            return taken < bytes.count && isAbandoned(sink.rawValue) ? bytes.count : taken
        }
    }

    /// A pseudo-terminal that no client has open takes output until its buffer is full, and then none.
    private func isAbandoned(_ number: Int32) -> Bool {
        var descriptor = pollfd(fd: number, events: Int16(POLLOUT), revents: 0)
        return unsafe poll(&descriptor, 1, 0) > 0 && descriptor.revents & Int16(POLLHUP) != 0
    }
}

/// Bytes of a file's that were not written, counted by the thread that writes it.
private final class LostBytes: Sendable {
    let count = Atomic<UInt64>(0)
}
