// SPDX-License-Identifier: Apache-2.0

/// Power-off, reset and exit.
enum Power {
    private static let exitPort: UInt16 = 0x501
    private static let sleepControl: UInt16 = 0x600
    private static let keyboardController: UInt16 = 0x64
    /// SLP_TYP 5 and SLP_EN of a hardware-reduced ACPI machine's sleep control register.
    private static let softOff: UInt8 = 0x34

    /// The address of the sleep control register in the firmware's tables, once it was read.
    nonisolated(unsafe) static var firmwareSleepControl: ACPI.Register?

    /// Turns the machine off.
    static func off() -> Never {
        writePort8(sleepControl, softOff)
        unsafe firmwareSleepControl?.write(softOff)
        fail()  // for a machine with neither register
    }

    /// Resets the machine.
    static func reset() -> Never {
        writePort8(keyboardController, 0xfe)
        clock.spin(500 * milliseconds)  // a keyboard controller may be slow
        fail()
    }

    /// Causes a triple fault. If that does not end the machine, this CPU halts forever.
    static func fail() -> Never {
        crashByTripleFault()
        while true { idle() }
    }

    /// Ends the machine with a status, 0 … 63, if there is an exit device, and powers it off otherwise.
    static func exit(_ status: Int) -> Never {
        writePort8(exitPort, UInt8(clamping: min(status, 63)))
        off()
    }
}
