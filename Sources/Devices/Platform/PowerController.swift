// SPDX-License-Identifier: Apache-2.0

internal import Platform
internal import Synchronization

/// Sleep control, sleep status and event register, from ``Ports/sleepControl`` on (docs/platform.md, "Ports"; ACPI 6.5
/// §4.8.3.7).
public final class PowerController: ByteWideDevice {
    /// Bits of the event register.
    public enum Event {
        /// The host asks for a power-off, as a power button does.
        public static let powerButton: UInt8 = 1 << 0
    }

    private enum Register {
        static let control: UInt16 = 0
        static let status = Ports.sleepStatus - Ports.sleepControl
        static let events = Ports.powerEvents - Ports.sleepControl
    }
    /// SLP_TYP (bits 2 to 4) of S5, and SLP_EN (bit 5).
    private static let sleepMask: UInt8 = 0x3c, powerOff: UInt8 = 5 << 2 | 1 << 5

    private let events = Atomic<UInt8>(0)
    private let request: @Sendable (MachineRequest) -> Void
    private let interrupt: @Sendable () -> Void

    /// - Parameters:
    ///   - request: called by the vCPU thread that requests the power-off.
    ///   - interrupt: raises the edge-triggered line of the event register (IRQ 9).
    public init(request: @escaping @Sendable (MachineRequest) -> Void, interrupt: @escaping @Sendable () -> Void) {
        self.request = request
        self.interrupt = interrupt
    }

    /// Asks the guest to power off. A guest may ignore it. Any thread may call it.
    public func requestPowerOff() {
        events.bitwiseOr(Event.powerButton, ordering: .sequentiallyConsistent)
        interrupt()
    }

    func readByte(_ offset: UInt16) -> UInt8 {
        switch offset {
        // SLP_EN reads as 0; S5 is the only state, and there is no wake-up from it that would set WAK_STS.
        case Register.control, Register.status: 0
        case Register.events: events.exchange(0, ordering: .sequentiallyConsistent)
        default: 0xff
        }
    }

    func writeByte(_ offset: UInt16, _ value: UInt8) {
        if offset == Register.control, value & Self.sleepMask == Self.powerOff { request(.powerOff) }
    }
}
