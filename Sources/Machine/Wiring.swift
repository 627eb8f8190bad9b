// SPDX-License-Identifier: Apache-2.0

/// Interrupt lines and addresses of the platform (docs/platform.md).
enum Wiring {
    static let serialGSI: UInt32 = 4
    static let powerGSI: UInt32 = 9
    /// Lines of the virtio devices, in their order: the IOAPIC's upper pins, which no ISA device has, then free ISA lines.
    static let virtioGSIs: [UInt32] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 12, 14, 15]
    /// Three pages below the BIOS's place in which KVM keeps a task state segment on CPUs without unrestricted guest mode.
    static let taskStateSegment: UInt32 = 0xfffb_d000
    /// The page before them: its identity map.
    static let identityMap: UInt64 = 0xfffb_c000
}

