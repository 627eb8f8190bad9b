// SPDX-License-Identifier: Apache-2.0

/// Which I/O ports belong to which device (docs/platform.md, "Ports").
public enum Ports {
    /// The two 8259 interrupt controllers, in the kernel.
    public static let interruptControllers: [ClosedRange<UInt16>] = [0x20...0x21, 0xa0...0xa1]
    /// The 8254 timer.
    public static let timer: ClosedRange<UInt16> = 0x40...0x43
    /// System control port B, with the gate and the output of the timer's third channel.
    public static let systemControl: UInt16 = 0x61
    public static let keyboardData: UInt16 = 0x60
    public static let keyboardCommand: UInt16 = 0x64
    /// Written to ``keyboardCommand``, it resets the machine.
    public static let resetCommand: UInt8 = 0xfe
    /// Index and data of the clock and its memory.
    public static let clock: ClosedRange<UInt16> = 0x70...0x71
    public static let postCode: UInt16 = 0x80
    public static let serial: ClosedRange<UInt16> = 0x3f8...0x3ff
    /// PCI configuration mechanism #1: address and data.
    public static let pciConfiguration: ClosedRange<UInt16> = 0xcf8...0xcff
    /// The reset control register of a machine with firmware.
    public static let resetControl: UInt16 = 0xcf9
    /// The firmware's messages for developers.
    public static let firmwareDebug: UInt16 = 0x402
    /// The firmware's configuration device: selector, data, and the address for DMA from 0x514 on.
    public static let firmwareConfiguration: ClosedRange<UInt16> = 0x510...0x51b
    public static let exit: UInt16 = 0x501
    /// The power controller's registers, which follow each other.
    public static let sleepControl: UInt16 = 0x600
    public static let sleepStatus: UInt16 = 0x601
    public static let powerEvents: UInt16 = 0x602
}
