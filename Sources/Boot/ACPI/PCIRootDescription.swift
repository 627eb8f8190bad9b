// SPDX-License-Identifier: Apache-2.0

/// A PCI Express root complex as described to a guest by ACPI.
public struct PCIRootDescription: Sendable, Equatable {
    /// Where the configuration space of bus 0 is (ECAM); 1 MiB for each bus.
    public var configuration: UInt64
    public var lastBus: UInt8
    /// Where BARs may be. One does not cross 4 GiB.
    public var windows: [Range<UInt64>]
    /// The IOAPIC's pin that INTA# of each device of bus 0 is connected to, from device 1 on.
    public var interrupts: [UInt32]

    public init(configuration: UInt64, lastBus: UInt8, windows: [Range<UInt64>], interrupts: [UInt32]) {
        (self.configuration, self.lastBus, self.windows) = (configuration, lastBus, windows)
        self.interrupts = interrupts
    }

    /// Bytes of ``configuration``.
    var configurationSize: UInt64 { (UInt64(lastBus) + 1) << 20 }

    /// The memory that the machine's map of RAM has as reserved: Linux uses ECAM only if the map, or ACPI, reserves it.
    public var reserved: Range<UInt64> { configuration..<configuration + configurationSize }

    /// The content of the table with ECAM's address (PCI Firmware Specification 3.3 §4.1.2).
    var mcfg: [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 8)
        bytes.append(littleEndian: configuration)
        bytes += [0, 0, 0, lastBus, 0, 0, 0, 0]
        return bytes
    }

    /// The root bridge, and the memory that is ECAM's.
    var devices: [AML] {
        [
            .device(
                "PCI0",
                [
                    .name("_HID", .eisaID("PNP0A08")),
                    .name("_CID", .eisaID("PNP0A03")),
                    .name("_UID", .integer(0)),
                    .name("_SEG", .integer(0)),
                    .name("_BBN", .integer(0)),
                    .name("_CCA", .integer(1)),
                    .name("_CRS", .resources(resources)),
                    .name("_PRT", interruptRouting),
                    operatingSystemCapabilities,
                ]),
            .device(
                "MBRD",
                [
                    .name("_HID", .eisaID("PNP0C02")),
                    .name("_UID", .integer(0)),
                    .name(
                        "_CRS",
                        .resources([
                            .memory(
                                UInt32(truncatingIfNeeded: configuration),
                                size: UInt32(truncatingIfNeeded: configurationSize))
                        ])),
                ]),
        ]
    }

    private var resources: [Resource] {
        [.buses(0...lastBus), .ports(0xcf8, count: 8)]
            + windows.map { $0.upperBound <= 1 << 32 ? .memoryWindow32($0) : .memoryWindow64($0) }
    }

    /// `_PRT` (ACPI 6.5 §6.2.13): the pins are wired, no link device is between.
    private var interruptRouting: AML {
        .package(
            interrupts.enumerated().map { index, gsi in
                .package([
                    .integer(UInt64(index + 1) << 16 | 0xffff), .integer(0), .integer(0), .integer(UInt64(gsi)),
                ])
            })
    }

    /// `_OSC` (PCI Firmware Specification 3.3 §4.5): all requested control is granted, but for what would need hardware
    /// that is not there.
    private var operatingSystemCapabilities: AML {
        .method(
            "_OSC", arguments: 4, isSerialized: true,
            [
                .doubleWordField("CDW1", of: .argument(3), at: 0),
                .when(
                    .equal(.argument(0), .uuid("33DB4D5B-1FF7-401C-9657-7441C03DD766")),
                    [
                        .doubleWordField("CDW3", of: .argument(3), at: 8),
                        // PCI Express capability structure, and its error reporting.
                        .and(.reference("CDW3"), .integer(0x18), in: .reference("CDW3")),
                        .when(
                            .not(.equal(.argument(1), .integer(1))),
                            [.or(.reference("CDW1"), .integer(8), in: .reference("CDW1"))]),
                        .giveBack(.argument(3)),
                    ]),
                .or(.reference("CDW1"), .integer(4), in: .reference("CDW1")),
                .giveBack(.argument(3)),
            ])
    }
}
