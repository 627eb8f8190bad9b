// SPDX-License-Identifier: Apache-2.0

/// The registers of a 16550A and what is behind them. The section names are those of the PC16550D data sheet.
struct SerialState {
    enum Register {
        static let data: UInt16 = 0, interruptEnable: UInt16 = 1, interruptIdentity: UInt16 = 2, lineControl: UInt16 = 3
        static let modemControl: UInt16 = 4, lineStatus: UInt16 = 5, modemStatus: UInt16 = 6, scratch: UInt16 = 7
    }
    enum InterruptEnable {
        static let received: UInt8 = 1 << 0, transmitterEmpty: UInt8 = 1 << 1, lineStatus: UInt8 = 1 << 2,
            modemStatus: UInt8 = 1 << 3
    }
    /// In the order of their priority (table 5).
    enum InterruptIdentity {
        static let lineStatus: UInt8 = 0x6, received: UInt8 = 0x4, timeout: UInt8 = 0xc, transmitterEmpty: UInt8 = 0x2
        static let modemStatus: UInt8 = 0x0, none: UInt8 = 0x1
        static let fifosEnabled: UInt8 = 0xc0
    }
    enum LineStatus {
        static let dataReady: UInt8 = 1 << 0, overrun: UInt8 = 1 << 1, holdingEmpty: UInt8 = 1 << 5,
            transmitterEmpty: UInt8 = 1 << 6
    }
    enum ModemControl { static let loopback: UInt8 = 1 << 4 }
    private static let divisorLatch: UInt8 = 1 << 7
    private static let fifoSize = 16

    private var interruptEnable: UInt8 = 0
    private var lineControl: UInt8 = 0
    private var modemControl: UInt8 = 0
    private var scratch: UInt8 = 0
    /// 115,200 baud; it has no effect.
    private var divisor: UInt16 = 1
    private var fifosEnabled = false
    /// Bytes in the FIFO from which on "received" is reported instead of a time-out.
    private var trigger = 1
    private var received = ByteQueue(capacity: fifoSize)
    private var overrun = false
    /// The transmitter became empty and no read of the identity register has reported it.
    private var transmitterEmptyPending = false
    /// Changes of the modem lines since the last read, bits 0 to 3 of the status register.
    private var modemChanges: UInt8 = 0
    /// Indicates whether the guest's driver has shown that it receives: until then input waits, since setting the port
    /// up empties the FIFO.
    private var isAttended = false
    /// Indicates whether input had to be refused since ``takeRoom()``.
    private var refusedInput = false
    /// Level of the interrupt line as of the last ``takeEdge()``.
    private var line = false

    /// What the sink has not taken.
    var output: ByteQueue
    var dropped: UInt64 = 0
    private var wasHoldingEmpty = true

    init(ringCapacity: Int) { output = ByteQueue(capacity: ringCapacity) }

    mutating func resetRegisters() {
        let (output, dropped, refusedInput) = (self.output, self.dropped, self.refusedInput)
        self = SerialState(ringCapacity: 0)
        (self.output, self.dropped, self.refusedInput) = (output, dropped, refusedInput)
        wasHoldingEmpty = isHoldingEmpty
    }

    private var isLoopback: Bool { modemControl & ModemControl.loopback != 0 }
    private var isDivisorLatched: Bool { lineControl & Self.divisorLatch != 0 }
    private var isHoldingEmpty: Bool { output.room >= SerialPort.guaranteedRoom }
    private var receiveCapacity: Int { fifosEnabled ? Self.fifoSize : 1 }

    // MARK: Interrupt line

    /// Indicates whether the interrupt line has risen since the last call.
    mutating func takeEdge() -> Bool {
        let before = line
        line = interrupt != InterruptIdentity.none
        return line && !before
    }

    private var interrupt: UInt8 {
        if interruptEnable & InterruptEnable.lineStatus != 0, overrun { return InterruptIdentity.lineStatus }
        if interruptEnable & InterruptEnable.received != 0, !received.isEmpty {
            // A line without speed has no pauses: what is there below the trigger level has timed out.
            return !fifosEnabled || received.count >= trigger ? InterruptIdentity.received : InterruptIdentity.timeout
        }
        if interruptEnable & InterruptEnable.transmitterEmpty != 0, transmitterEmptyPending {
            return InterruptIdentity.transmitterEmpty
        }
        if interruptEnable & InterruptEnable.modemStatus != 0, modemChanges != 0 {
            return InterruptIdentity.modemStatus
        }
        return InterruptIdentity.none
    }

    // MARK: Output

    /// Indicates whether a write to this register is a byte to be sent.
    func isTransmit(_ offset: UInt16) -> Bool { offset == Register.data && !isDivisorLatched }

    mutating func transmit(_ bytes: Span<UInt8>, to sink: any SerialSink) {
        if isLoopback {
            for index in 0..<bytes.count { loop(bytes[index]) }
        } else {
            // What waits goes first.
            output.drain(to: sink)
            let direct = output.isEmpty ? min(max(sink.take(bytes), 0), bytes.count) : 0
            for index in direct..<bytes.count where !output.append(bytes[index]) { dropped += 1 }
        }
        transmitterEmptyPending = isHoldingEmpty
        wasHoldingEmpty = isHoldingEmpty
    }

    /// The sink has taken some: the transmitter may have become empty.
    mutating func outputChanged() {
        if isHoldingEmpty, !wasHoldingEmpty { transmitterEmptyPending = true }
        wasHoldingEmpty = isHoldingEmpty
    }

    /// The transmitter's output is the receiver's input (MCR bit 4).
    private mutating func loop(_ byte: UInt8) {
        if received.count < receiveCapacity { _ = received.append(byte) } else { overrun = true }
    }

    // MARK: Input

    mutating func receive(_ bytes: Span<UInt8>) -> Int {
        let room = isLoopback || !isAttended ? 0 : receiveCapacity - received.count
        let taken = min(max(room, 0), bytes.count)
        for index in 0..<taken { _ = received.append(bytes[index]) }
        if taken < bytes.count { refusedInput = true }
        return taken
    }

    /// Indicates whether input that was refused may be offered again. It waits until the FIFO is empty: one call for 16
    /// bytes.
    mutating func takeRoom() -> Bool {
        guard refusedInput, received.isEmpty, !isLoopback, isAttended else { return false }
        refusedInput = false
        return true
    }

    // MARK: Registers

    mutating func read(_ offset: UInt16) -> UInt8 {
        switch offset {
        case Register.data where isDivisorLatched: return UInt8(truncatingIfNeeded: divisor)
        case Register.data:
            isAttended = true
            return received.removeFirst() ?? 0
        case Register.interruptEnable where isDivisorLatched: return UInt8(truncatingIfNeeded: divisor >> 8)
        case Register.interruptEnable: return interruptEnable
        case Register.interruptIdentity:
            let identity = interrupt
            if identity == InterruptIdentity.transmitterEmpty { transmitterEmptyPending = false }
            return identity | (fifosEnabled ? InterruptIdentity.fifosEnabled : 0)
        case Register.lineControl: return lineControl
        case Register.modemControl: return modemControl
        case Register.lineStatus:
            isAttended = true
            defer { overrun = false }
            return (received.isEmpty ? 0 : LineStatus.dataReady) | (overrun ? LineStatus.overrun : 0)
                | (isHoldingEmpty ? LineStatus.holdingEmpty : 0) | (output.isEmpty ? LineStatus.transmitterEmpty : 0)
        case Register.modemStatus:
            defer { modemChanges = 0 }
            return modemLines | modemChanges
        case Register.scratch: return scratch
        default: return 0xff
        }
    }

    /// Everything but the transmitter.
    mutating func write(_ offset: UInt16, _ value: UInt8) {
        switch offset {
        case Register.data: divisor = divisor & 0xff00 | UInt16(value)
        case Register.interruptEnable where isDivisorLatched: divisor = divisor & 0x00ff | UInt16(value) << 8
        case Register.interruptEnable:
            let enabled = value & ~interruptEnable
            interruptEnable = value & 0x0f
            if interruptEnable & InterruptEnable.received != 0 { isAttended = true }
            if enabled & InterruptEnable.transmitterEmpty != 0, isHoldingEmpty { transmitterEmptyPending = true }
        case Register.interruptIdentity: writeFIFOControl(value)
        case Register.lineControl: lineControl = value
        case Register.modemControl:
            let before = modemLines
            modemControl = value & 0x1f
            let changed = before ^ modemLines
            // CTS, DSR and DCD report any change, RI (bit 6) only its end.
            modemChanges |= (changed & 0xb0) >> 4 | (changed & before & 0x40) >> 4
        case Register.scratch: scratch = value
        default: break
        }
    }

    private mutating func writeFIFOControl(_ value: UInt8) {
        let enable = value & 1 != 0
        // A change of mode empties the FIFOs. What was transmitted is gone already.
        if value & 2 != 0 || enable != fifosEnabled { received.removeAll() }
        fifosEnabled = enable
        if enable { isAttended = true }
        trigger = enable ? [1, 4, 8, 14][Int(value >> 6)] : 1
    }

    /// CTS, DSR, RI and DCD (bits 4 to 7): a peer is there and ready; in loopback RTS, DTR, OUT1 and OUT2.
    private var modemLines: UInt8 {
        guard isLoopback else { return 0xb0 }
        return (modemControl & 0x02) << 3 | (modemControl & 0x01) << 5 | (modemControl & 0x0c) << 4
    }
}
