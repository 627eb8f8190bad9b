// SPDX-License-Identifier: Apache-2.0

/// The ways out of the machine.
enum Power {
    private static let exitPort: UInt16 = 0x501
    private static let sleepControl: UInt16 = 0x600
    private static let keyboardController: UInt16 = 0x64
    /// SLP_TYP 5 and SLP_EN of a hardware-reduced ACPI machine's sleep control register.
    private static let softOff: UInt8 = 0x34

    /// Where the firmware says the sleep control register is, once it has been asked.
    nonisolated(unsafe) static var firmwareSleepControl: ACPI.Register?

    /// Turns the machine off.
    static func off() -> Never {
        writePort8(sleepControl, softOff)
        unsafe firmwareSleepControl?.write(softOff)
        fail()  // a machine without either ends so
    }

    /// Resets the machine.
    static func reset() -> Never {
        writePort8(keyboardController, 0xfe)
        clock.spin(500 * milliseconds)  // a keyboard controller takes its time
        fail()
    }

    /// A triple fault. Where even that does not end the machine, this CPU is silent for ever.
    static func fail() -> Never {
        crashByTripleFault()
        while true { idle() }
    }

    /// Ends the machine with a status, 0 … 63, where there is an exit device, and turns it off elsewhere.
    static func exit(_ status: Int) -> Never {
        writePort8(exitPort, UInt8(clamping: min(status, 63)))
        off()
    }
}
