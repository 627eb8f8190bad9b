// SPDX-License-Identifier: Apache-2.0

/// The local APIC of the CPU that accesses it (Intel SDM volume 3, chapter "APIC"), in xAPIC mode.
enum LocalAPIC {
    /// Interrupt lines (vector 0x20 + line) that belong to no device.
    static let timerLine = 48
    static let messageLine = 49
    private static let spuriousVector: UInt32 = 0x5f
    static let firstVector: UInt32 = 0x20

    private static var registers: Address { Address(0xfee0_0000) }  // entry.S ends interrupts there

    static var identifier: UInt32 { (registers.load(0x20) as UInt32) >> 24 }

    /// Enables interrupts. The PIC's line is masked: its interrupts come through the IOAPIC.
    static func start() {
        let masked: UInt32 = 0x1_0000
        registers.store(UInt32(0), 0x80)  // task priority: accept all
        registers.store(masked, 0x350)  // LINT0
        registers.store(masked | UInt32(timerLine) + firstVector, 0x320)
        registers.store(UInt32(0xb), 0x3e0)  // timer divided by 1
        registers.store(0x100 | spuriousVector, 0xf0)  // on
    }

    /// Starts the timer, which counts down from `count`; 0 stops it.
    static func setTimer(count: UInt32, periodic: Bool = false) {
        registers.store((periodic ? 0x2_0000 : 0) | UInt32(timerLine) + firstVector, 0x320)
        registers.store(count, 0x380)
    }

    static var timerCount: UInt32 { registers.load(0x390) }

    /// Sends an interrupt to the CPU with that APIC ID.
    static func send(line: Int, to target: UInt32) { command(UInt32(line) + firstVector, target) }

    static func sendInit(to target: UInt32) { command(0x4500, target) }

    /// Starts a CPU in real mode at `page` << 12.
    static func sendStartup(page: UInt32, to target: UInt32) { command(0x4600 | page, target) }

    private static func command(_ low: UInt32, _ target: UInt32) {
        registers.store(target << 24, 0x310)
        registers.store(low, 0x300)
        while (registers.load(0x300) as UInt32) & 0x1000 != 0 { spinPause() }  // until it has been sent
    }
}

/// The IOAPICs, as one sequence of lines.
enum IOAPIC {
    /// Routes an interrupt (edge, active high) to CPU `target`. Edge even if the firmware says level: ring 0 ends each
    /// interrupt before a driver has seen it, and a line that stays high would repeat it forever.
    static func connect(gsi: UInt32, line: Int, to target: UInt32) {
        guard let (registers, pin) = find(gsi) else { return }
        write(registers, 0x10 + pin * 2 + 1, target << 24)
        write(registers, 0x10 + pin * 2, LocalAPIC.firstVector + UInt32(line))
    }

    private static func find(_ gsi: UInt32) -> (Address, UInt32)? {
        for entry in acpi.ioapics where gsi >= entry.base {
            let pins = read(Address(entry.address), 1) >> 16 & 0xff + 1
            if gsi - entry.base < pins { return (Address(entry.address), gsi - entry.base) }
        }
        return nil
    }

    private static func read(_ registers: Address, _ index: UInt32) -> UInt32 {
        registers.store(index)
        return registers.load(0x10)
    }

    private static func write(_ registers: Address, _ index: UInt32, _ value: UInt32) {
        registers.store(index)
        registers.store(value, 0x10)
    }
}
