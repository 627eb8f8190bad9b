// SPDX-License-Identifier: Apache-2.0

/// Which interrupt belongs to which device (docs/platform.md, "Interrupts"): pins of the IOAPIC, the lower ones of the
/// PICs too.
public enum GSIs {
    /// Pins of the IOAPIC.
    public static let pins: UInt32 = 24
    public static let serial: UInt32 = 4
    /// The power controller's, for its event register.
    public static let power: UInt32 = 9
    /// Pins for the interrupt pins of PCI functions, level-triggered; several functions share one.
    public static let pci: ClosedRange<UInt32> = 16...23
    /// The pin of a PCI device's INTA#, by the device's number.
    public static func pci(device: UInt8) -> UInt32 { pci.lowerBound + UInt32(device) % UInt32(pci.count) }
    /// Lines of the virtio-mmio devices, in their order: the IOAPIC's upper pins, which no ISA device has, then free
    /// ISA lines.
    public static let virtio: [UInt32] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 12, 14, 15]
}
