// SPDX-License-Identifier: Apache-2.0

internal import Platform

/// What real-mode code finds where a BIOS has its entry.
///
/// Linux on a hardware-reduced machine (ACPI 6.5 §4.1) takes for granted that there is EFI to reset by. Where there is
/// none it does not try the FADT's reset register: it goes back to real mode and jumps to F000:FFF0.
enum ResetVector {
    /// Resets the machine by the keyboard controller, as a write to the FADT's register does.
    static let code: [UInt8] = [
        0xb0, Ports.resetCommand,  // mov $0xfe, %al
        0xe6, UInt8(Ports.keyboardCommand),  // out %al, $0x64
        0xf4,  // 1: hlt
        0xeb, 0xfd,  // jmp 1b
    ]
}
