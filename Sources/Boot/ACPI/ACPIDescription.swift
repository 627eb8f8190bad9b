// SPDX-License-Identifier: Apache-2.0

public import Platform

/// The machine as described to a guest by ACPI: the input of ``ACPITables``.
public struct ACPIDescription: Sendable, Equatable {
    /// An interrupt of the ISA bus that differs from the default (MADT, "Interrupt Source Override").
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

        public init(port: UInt16 = Ports.serial.lowerBound, irq: UInt32 = GSIs.serial) {
            (self.port, self.irq) = (port, irq)
        }
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
    public var localAPICAddress = UInt32(PhysicalLayout.localAPIC)
    public var ioapicAddress = UInt32(PhysicalLayout.ioapic)
    public var ioapicID: UInt8 = 0
    public var interruptOverrides: [InterruptOverride] = []
    public var serialPorts: [SerialPort] = [SerialPort()]
    public var virtioDevices: [VirtioMMIOSlot] = []
    /// The PCI root complex; nil for none.
    public var pci: PCIRootDescription?
    /// The clock's index port, the data port follows; nil for none.
    public var realTimeClockPort: UInt16? = Ports.clock.lowerBound
    /// Ports of ``PowerController``: sleep control, sleep status and the event register.
    public var sleepControlPort = Ports.sleepControl
    public var sleepStatusPort = Ports.sleepStatus
    public var eventPort = Ports.powerEvents
    /// Announces a bit in the event register.
    public var eventGSI = GSIs.power
    /// The port that resets the machine.
    public var resetPort = Ports.keyboardCommand
    public var resetValue = Ports.resetCommand
    /// The NUMA nodes; empty for a guest without NUMA topology.
    public var nodes: [Node] = []
    /// Distance from row to column, 10 for a node to itself; empty for 10 and 20.
    public var distances: [[UInt8]] = []

    public init(localAPICIDs: [UInt32], virtioDevices: [VirtioMMIOSlot] = []) {
        self.localAPICIDs = localAPICIDs
        self.virtioDevices = virtioDevices
        // IRQ 9 would be taken for a level-triggered SCI.
        interruptOverrides = [InterruptOverride(source: UInt8(GSIs.power), gsi: GSIs.power)]
        for device in virtioDevices where device.gsi < 16 {
            interruptOverrides.append(InterruptOverride(source: UInt8(device.gsi), gsi: device.gsi))
        }
    }
}
