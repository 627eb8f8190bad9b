internal import CLinux
internal import Devices
internal import Linux

/// Takes a serial port's output to whoever is connected. Called by vCPU threads, it never waits.
///
/// With nobody connected the output is dropped, as a serial line would do.
final class ConsoleOutput: SerialSink {
    /// Rung when a byte was refused: somebody is to wait until ``rawValue`` is writable and flush the port.
    let isFull: EventFD
    private let connection = Guarded<DescriptorSink?>(nil)

    init(_ descriptor: consuming FileDescriptor?) throws(SystemCallError) {
        isFull = try EventFD()
        if let descriptor { connect(descriptor) }
    }

    /// The descriptor that output goes to now.
    var rawValue: Int32? { connection.withLock { $0?.rawValue } }

    func connect(_ descriptor: consuming FileDescriptor) {
        let sink = DescriptorSink(descriptor, onFull: { [unowned self] in isFull.signal() })
        connection.withLock { $0 = sink }
    }

    func disconnect() { connection.withLock { $0 = nil } }

    func take(_ bytes: Span<UInt8>) -> Int {
        guard let sink = connection.withLock({ $0 }) else { return bytes.count }
        let taken = sink.take(bytes)
        return taken < bytes.count && isAbandoned(sink.rawValue) ? bytes.count : taken
    }

    /// A pseudo-terminal that no client has open takes output until its buffer is full, and then none.
    private func isAbandoned(_ number: Int32) -> Bool {
        var descriptor = pollfd(fd: number, events: Int16(POLLOUT), revents: 0)
        return unsafe poll(&descriptor, 1, 0) > 0 && descriptor.revents & Int16(POLLHUP) != 0
    }
}
