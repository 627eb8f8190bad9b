// SPDX-License-Identifier: Apache-2.0

/// The serial console: a 16550A at 0x3f8.
enum Console {
    static let line = 4

    private static let port: UInt16 = 0x3f8
    private static let interruptEnable: UInt16 = 0x3f9
    private static let fifoControl: UInt16 = 0x3fa
    private static let modemControl: UInt16 = 0x3fc
    private static let lineStatus: UInt16 = 0x3fd
    private static let fifoSize = 16

    /// Bytes that the transmit FIFO is known to have room for.
    nonisolated(unsafe) private static var room = 0

    static func start() {
        writePort8(fifoControl, 0x07)  // enabled, and both cleared
        unsafe room = fifoSize
    }

    /// Writes a line without allocating memory.
    static func hello(_ line: StaticString) {
        line.withUTF8Buffer { buffer in
            send(Address(UInt64(UInt(bitPattern: buffer.baseAddress))), count: buffer.count)  // a constant of the image
        }
    }

    static func write(_ text: Text) {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(text.count + 2)
        for byte in text.bytes {
            if byte == UInt8(ascii: "\n") { bytes.append(UInt8(ascii: "\r")) }
            bytes.append(byte)
        }
        unsafe bytes.withUnsafeBytes { buffer in
            // The port reads the bytes within the array's closure.
            guard let base = buffer.baseAddress else { return }
            send(Address(UInt64(UInt(bitPattern: base))), count: buffer.count)
        }
    }

    static func print(_ text: Text = "") {
        var text = text
        text.append(UInt8(ascii: "\n"))
        write(text)
    }

    /// Enables an interrupt for each received byte, and with `transmitter` also for an empty transmit FIFO.
    static func listen(transmitter: Bool = false) {
        writePort8(modemControl, 0x0b)  // DTR, RTS, and OUT2, which enables the interrupt line
        writePort8(interruptEnable, transmitter ? 0x03 : 0x01)
    }

    /// Calls `handler` at the port's interrupts.
    static func handleInterrupt(_ handler: @escaping () -> Void) {
        interrupts.handle(isa: line) {
            _ = readPort8(fifoControl)  // the interrupt's cause: reading it clears that of the transmitter
            handler()
        }
    }

    /// The next received byte, if there is one.
    static func receive() -> UInt8? {
        (readPort8(lineStatus) & 0x01) != 0 ? readPort8(port) : nil
    }

    private static func send(_ bytes: Address, count: Int) {
        var sent = 0
        while sent < count {
            if unsafe room == 0 {
                while readPort8(lineStatus) & 0x20 == 0 { spinPause() }
                unsafe room = fifoSize
            }
            let burst = unsafe min(room, count - sent)
            (bytes + sent).output(count: burst, to: port)
            sent += burst
            unsafe room -= burst
        }
    }
}
