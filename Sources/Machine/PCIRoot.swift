// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import Devices
internal import KVM
internal import Linux
internal import PCI
internal import Platform
internal import Virtio

/// The PCI hierarchy of a board: the host bridge, the addresses at which a guest finds it, and what connects its
/// functions with KVM.
final class PCIRoot: Sendable {
    /// The most functions besides the bridge: on bus 0, of 8 for each of 31 devices.
    static let maximumFunctions = 64

    let bridge: PCIHostBridge
    private let wires: Wires

    /// - Parameters:
    ///   - endOfMemory: where RAM ends.
    ///   - addressBits: of a guest-physical address.
    ///   - isForFirmware: firmware assigns the BARs.
    init(
        _ system: borrowing System, _ machine: borrowing VirtualMachine, endOfMemory: UInt64, addressBits: Int,
        isForFirmware: Bool
    ) throws(KVMError) {
        bridge = PCIHostBridge(
            windows: Self.windows(endOfMemory: endOfMemory, addressBits: addressBits, isForFirmware: isForFirmware),
            isForFirmware: isForFirmware)
        wires = try Wires(system, machine)
    }

    /// The windows for BARs: one below 4 GiB, and, where addresses are wide enough, one above RAM.
    ///
    /// Firmware chooses addresses by its own rules: from 2 GiB, or the end of RAM below 3 GiB, up to the IOAPIC.
    static func windows(
        endOfMemory: UInt64, addressBits: Int, isForFirmware: Bool = false
    ) -> [Range<UInt64>] {
        let limit: UInt64 = 1 << UInt64(min(max(addressBits, 32), 52))
        // Directly behind RAM, where a guest that ignores ACPI's windows puts BARs as well.
        let start = (max(endOfMemory, PhysicalLayout.hole.upperBound) &+ 0x1f_ffff) & ~0x1f_ffff
        let end = min(start &+ (64 << 30), limit)
        let low: [Range<UInt64>]
        if isForFirmware {
            let first = min(max(endOfMemory, 1 << 31), PhysicalLayout.hole.lowerBound)
            let configuration = PhysicalLayout.pciConfiguration
            low = [
                first..<configuration,
                configuration + PhysicalLayout.pciConfigurationSize..<PhysicalLayout.ioapic,
            ]
        } else {
            low = [PhysicalLayout.pciWindow]
        }
        return low + (start < end ? [start..<end] : [])
    }

    /// Where the function of a slot is: function 0 of the devices first, as a guest looks for others only then.
    static func address(ofSlot index: Int) -> PCIAddress {
        PCIAddress(device: UInt8(1 + index % 31), function: UInt8(index / 31))
    }

    /// What connects a function.
    func platform(for address: PCIAddress) -> any PCIPlatform {
        PCIConnections(
            wires, pin: Int(GSIs.pci(device: address.device) - GSIs.pci.lowerBound),
            member: Int(address.device) * 8 + Int(address.function))
    }

    /// Where BAR 0 of a slot's function is after power-on.
    static func barAddress(ofSlot index: Int) -> UInt64 {
        PhysicalLayout.pciWindow.lowerBound + UInt64(index) * PCITransport.barSize
    }

    /// What vCPU threads find where.
    var mmioEntries: [AddressMap<any MMIODevice>.Entry] {
        bridge.windows.map {
            .init($0.lowerBound, count: $0.upperBound - $0.lowerBound, PCIWindow(bridge, $0.lowerBound))
        } + [
            .init(
                PhysicalLayout.pciConfiguration, count: PhysicalLayout.pciConfigurationSize,
                PCIConfigurationWindow(bridge))
        ]
    }

    var portEntry: AddressMap<any PortDevice>.Entry { .init(Ports.pciConfiguration, PCIConfigurationPorts(bridge)) }

    /// For the ACPI tables.
    var description: PCIRootDescription {
        PCIRootDescription(
            configuration: PhysicalLayout.pciConfiguration, lastBus: 0, windows: bridge.windows,
            interrupts: (1..<32).map { GSIs.pci(device: $0) })
    }

    /// What all connections are made with. The functions have it, and the bridge has the functions.
    private final class Wires: Sendable {
        let machine: VirtualMachine
        let router: InterruptRouter
        /// One for each of ``GSIs/pci``.
        let lines: [SharedInterruptLine]
        /// The width of a write that is a notification; 0 for any.
        let doorbellLength: UInt32

        init(_ system: borrowing System, _ machine: borrowing VirtualMachine) throws(KVMError) {
            self.machine = try machine.duplicate()
            router = try machine.interruptRouter()
            var lines: [SharedInterruptLine] = []
            for gsi in GSIs.pci { lines.append(SharedInterruptLine(try machine.interruptLine(gsi: gsi))) }
            self.lines = lines
            doorbellLength = system.check(.ioEventAnyLength) != 0 ? 0 : 2
        }
    }

    /// One function's connections.
    private final class PCIConnections: PCIPlatform {
        private let wires: Wires
        private let pin: Int
        private let member: Int

        init(_ wires: Wires, pin: Int, member: Int) { (self.wires, self.pin, self.member) = (wires, pin, member) }

        private static func refusable<Result>(_ body: () throws(KVMError) -> Result) throws(PCIRefusal) -> Result {
            do throws(KVMError) { return try body() } catch { throw PCIRefusal(error.description) }
        }

        func addRoute(_ message: MSIMessage) throws(PCIRefusal) -> UInt32 {
            try Self.refusable { () throws(KVMError) in try wires.router.add(Self.interrupt(message)) }
        }

        func changeRoute(_ route: UInt32, to message: MSIMessage) throws(PCIRefusal) {
            try Self.refusable { () throws(KVMError) in try wires.router.change(route, to: Self.interrupt(message)) }
        }

        func removeRoute(_ route: UInt32) { try? wires.router.remove(route) }

        private static func interrupt(_ message: MSIMessage) -> InterruptMessage {
            InterruptMessage(address: message.address, data: message.data)
        }

        func connect(_ event: borrowing EventFD, to route: UInt32) throws(PCIRefusal) {
            do throws(KVMError) { try wires.machine.assignIRQFD(event, gsi: route) } catch {
                throw PCIRefusal(error.description)
            }
            // KVM has sent what it found signalled, and left it there; what came after that it has taken itself.
            event.drain()
        }

        func disconnect(_ event: borrowing EventFD, from route: UInt32) {
            try? wires.machine.deassignIRQFD(event, gsi: route)
        }

        func connectDoorbell(_ event: borrowing EventFD, at address: UInt64) throws(PCIRefusal) {
            let match = IOEventMatch(address: address, length: wires.doorbellLength)
            do throws(KVMError) { try wires.machine.assignIOEventFD(event, for: match) } catch {
                throw PCIRefusal(error.description)
            }
        }

        func disconnectDoorbell(_ event: borrowing EventFD, at address: UInt64) {
            // Refused where it was not connected.
            try? wires.machine.deassignIOEventFD(
                event, for: IOEventMatch(address: address, length: wires.doorbellLength))
        }

        func setInterruptPin(_ isAsserted: Bool) { wires.lines[pin].set(isAsserted, by: member) }
    }
}

/// A level-triggered line that several functions assert.
final class SharedInterruptLine: Sendable {
    private let line: InterruptLine
    private let members = Guarded<Set<Int>>([])

    init(_ line: InterruptLine) { self.line = line }

    func set(_ isAsserted: Bool, by member: Int) {
        members.withLock { members in
            let before = members.isEmpty
            if isAsserted { members.insert(member) } else { members.remove(member) }
            if members.isEmpty != before { line.set(isAsserted) }
        }
    }
}

/// A window for BARs.
private final class PCIWindow: MMIODevice {
    private let bridge: PCIHostBridge
    private let first: UInt64

    init(_ bridge: PCIHostBridge, _ first: UInt64) { (self.bridge, self.first) = (bridge, first) }

    func read(at offset: UInt64, size: Int) -> UInt64 { bridge.read(at: first &+ offset, size: size) }
    func write(_ value: UInt64, at offset: UInt64, size: Int) { bridge.write(value, at: first &+ offset, size: size) }
    func name(at offset: UInt64) -> String? { bridge.name(at: first &+ offset) }
}

/// ECAM.
private final class PCIConfigurationWindow: MMIODevice {
    private let bridge: PCIHostBridge

    init(_ bridge: PCIHostBridge) { self.bridge = bridge }

    func read(at offset: UInt64, size: Int) -> UInt64 { bridge.readECAM(at: offset, size: size) }
    func write(_ value: UInt64, at offset: UInt64, size: Int) { bridge.writeECAM(value, at: offset, size: size) }
    func name(at offset: UInt64) -> String? { bridge.name(at: offset, isConfiguration: true) }
}

/// Configuration mechanism #1.
private final class PCIConfigurationPorts: PortDevice {
    private let bridge: PCIHostBridge

    init(_ bridge: PCIHostBridge) { self.bridge = bridge }

    func read(_ offset: UInt16, size: Int) -> UInt32 { bridge.readPort(offset, size: size) }
    func write(_ offset: UInt16, size: Int, value: UInt32) { bridge.writePort(value, offset, size: size) }
}
