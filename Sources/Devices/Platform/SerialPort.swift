// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// A 16550A UART, the guest's console (National Semiconductor PC16550D data sheet).
///
/// No byte is lost or overtakes another, in either direction. Output that the sink does not take waits in a ring; when
/// that runs full the transmitter is "not empty" until the sink has taken some. Input beyond the receive FIFO stays
/// with the caller, which is notified when there is room. The line has no speed: what is written has been sent.
public final class SerialPort: ByteWideDevice, ConsolePort {
    /// While this much of the ring is free the transmitter reports itself empty: at least what one `rep outsb` brings.
    static let guaranteedRoom = 4096
    static let ringCapacity = 16 << 10

    private let state = Guarded(SerialState(ringCapacity: ringCapacity))
    private let sink: any SerialSink
    private let interrupt: @Sendable () -> Void
    private let onRoom: @Sendable () -> Void

    /// - Parameters:
    ///   - sink: takes the output.
    ///   - interrupt: raises the edge-triggered interrupt line (IRQ 4).
    ///   - onRoom: signals that ``receive(_:)`` accepts bytes again after it had refused some; called by a vCPU thread.
    public init(sink: any SerialSink, interrupt: @escaping @Sendable () -> Void, onRoom: @escaping @Sendable () -> Void)
    {
        self.sink = sink
        self.interrupt = interrupt
        self.onRoom = onRoom
    }

    // MARK: The console's side

    /// Puts input into the receive FIFO.
    /// - Returns: how many bytes were accepted, from the front. The rest must be offered again after `onRoom`.
    public func receive(_ bytes: Span<UInt8>) -> Int {
        let (taken, raises) = state.withLock { state in
            let taken = state.receive(bytes)
            return (taken, state.takeEdge())
        }
        if raises { interrupt() }
        return taken
    }

    /// Offers waiting output to the sink once more.
    /// - Returns: whether all of it is gone.
    @discardableResult
    public func flush() -> Bool {
        let (isEmpty, raises) = state.withLock { state in
            state.output.drain(to: sink)
            state.outputChanged()
            return (state.output.isEmpty, state.takeEdge())
        }
        if raises { interrupt() }
        return isEmpty
    }

    /// Bytes of output that the sink has not accepted yet.
    public var pendingOutput: Int { state.withLock { $0.output.count } }

    /// Bytes that a guest wrote while the transmitter was not empty and the ring full.
    public var droppedOutput: UInt64 { state.withLock { $0.dropped } }

    /// Bytes that the sink has lost.
    public var lostOutput: UInt64 { sink.lostBytes }

    /// Registers and receive FIFO as after power-on. Output on its way stays on its way.
    public func reset() {
        state.withLock { $0.resetRegisters() }
    }

    // MARK: The guest's side

    func readByte(_ offset: UInt16) -> UInt8 {
        let (value, raises, hasRoom) = state.withLock { state in
            let value = state.read(offset)
            return (value, state.takeEdge(), state.takeRoom())
        }
        if raises { interrupt() }
        if hasRoom { onRoom() }
        return value
    }

    func writeByte(_ offset: UInt16, _ value: UInt8) {
        let (raises, hasRoom) = state.withLock { state in
            if state.isTransmit(offset) {
                let byte = CollectionOfOne(value)
                state.transmit(byte.span, to: sink)
            } else {
                state.write(offset, value)
            }
            return (state.takeEdge(), state.takeRoom())
        }
        if raises { interrupt() }
        if hasRoom { onRoom() }
    }

    /// The bytes of a `rep outsb` to the transmitter go to the sink in one piece.
    public func write(_ offset: UInt16, size: Int, string: Span<UInt8>) {
        // nil when they are not for the transmitter.
        let raises: Bool? = state.withLock { state in
            guard size == 1, state.isTransmit(offset) else { return nil }
            state.transmit(string, to: sink)
            return state.takeEdge()
        }
        switch raises {
        case true?: interrupt()
        case false?: break
        case nil: writeElements(offset, size: size, string: string)
        }
    }
}
