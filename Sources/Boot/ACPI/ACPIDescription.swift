// SPDX-License-Identifier: Apache-2.0

/// The machine as ACPI tells a guest of it: what ``ACPITables`` are built from.
public struct ACPIDescription: Sendable, Equatable {
    /// An interrupt of the ISA bus that is not what a guest would take it for (MADT, "Interrupt Source Override").
    public struct InterruptOverride: Sendable, Equatable {
        /// The ISA interrupt.
        public var source: UInt8
        /// The IOAPIC's pin.
        public var gsi: UInt32
        /// Level-triggered and active low as PCI's are; otherwise edge-triggered and active high.
        public var isLevel: Bool

        public init(source: UInt8, gsi: UInt32, isLevel: Bool = false) {
            (self.source, self.gsi, self.isLevel) = (source, gsi, isLevel)
        }
    }

    /// A UART of type 16550A.
    public struct SerialPort: Sendable, Equatable {
        public var port: UInt16
        public var irq: UInt32

        public init(port: UInt16 = 0x3f8, irq: UInt32 = 4) { (self.port, self.irq) = (port, irq) }
    }

    /// A node of the guest's NUMA topology.
    public struct Node: Sendable, Equatable {
        /// Indices into ``localAPICIDs``.
        public var cpus: [Int]
        /// The guest-physical ranges of the node's memory.
        public var memory: [Range<UInt64>]

        public init(cpus: [Int], memory: [Range<UInt64>]) { (self.cpus, self.memory) = (cpus, memory) }
    }

    /// One for each CPU, the boot processor's first.
    public var localAPICIDs: [UInt32]
    public var localAPICAddress: UInt32 = 0xfee0_0000
    public var ioapicAddress: UInt32 = 0xfec0_0000
    public var ioapicID: UInt8 = 0
    public var interruptOverrides: [InterruptOverride] = []
    public var serialPorts: [SerialPort] = [SerialPort()]
    public var virtioDevices: [VirtioMMIOSlot] = []
    /// The clock's index port, the data port follows; nil for none.
    public var realTimeClockPort: UInt16? = 0x70
    /// Ports of ``PowerController``: sleep control, sleep status and the event register.
    public var sleepControlPort: UInt16 = 0x600
    public var sleepStatusPort: UInt16 = 0x601
    public var eventPort: UInt16 = 0x602
    /// Announces a bit in the event register.
    public var eventGSI: UInt32 = 9
    /// The port that resets the machine.
    public var resetPort: UInt16 = 0x64
    public var resetValue: UInt8 = 0xfe
    /// The NUMA nodes; empty for a guest without NUMA topology.
    public var nodes: [Node] = []
    /// Distance from row to column, 10 for a node to itself; empty for 10 and 20.
    public var distances: [[UInt8]] = []

    public init(localAPICIDs: [UInt32], virtioDevices: [VirtioMMIOSlot] = []) {
        self.localAPICIDs = localAPICIDs
        self.virtioDevices = virtioDevices
        // IRQ 9 would be taken for a level-triggered SCI.
        interruptOverrides = [InterruptOverride(source: 9, gsi: 9)]
        for device in virtioDevices where device.gsi < 16 {
            interruptOverrides.append(InterruptOverride(source: UInt8(device.gsi), gsi: device.gsi))
        }
    }
}
