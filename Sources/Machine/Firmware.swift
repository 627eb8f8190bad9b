// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import Devices
internal import GuestMemory
internal import KVM
internal import Linux
internal import Logging
internal import Platform

/// The firmware that a machine starts with, instead of a kernel, and what a board has for it.
///
/// It outlives boards: each boot begins at the reset vector of the same code.
final class Firmware: Sendable {
    private let image: FirmwareImage
    private let log: Logger

    var name: String { image.name }

    init(_ path: String, log: Logger) throws(MachineError) {
        do throws(BootError) { image = try FirmwareImage(path: path) } catch { throw .boot(error) }
        self.log = log.of("firmware")
    }

    /// Puts the code where the processors start.
    /// - Parameter slot: a number that no RAM has.
    func map(_ machine: borrowing VirtualMachine, slot: UInt32) throws(KVMError) {
        // The board's machine ends before this object, which its parts have.
        unsafe try machine.setMemory(
            slot: slot, at: image.address, size: image.size, host: image.host, isReadOnly: true)
    }

    /// Prepares RAM, which is all zero, for the start.
    /// - Parameter contents: what the firmware is told of the machine.
    /// - Returns: the devices that only firmware looks for.
    func start(
        _ contents: FirmwareConfiguration, _ memory: GuestMemory,
        request: @escaping @Sendable (MachineRequest) -> Void
    ) throws(MachineError) -> [AddressMap<any PortDevice>.Entry] {
        do throws(BootError) { try image.copy(into: memory) } catch { throw .boot(error) }
        var entries: [AddressMap<any PortDevice>.Entry] = [
            .init(Ports.firmwareConfiguration, FirmwareConfigurationPorts(contents, memory.ram)),
            // Between the ports of PCI: before them.
            .init(Ports.resetControl...Ports.resetControl, ResetControlPort(request: request)),
        ]
        // Without a reader, firmware does not even write: an exit for each byte.
        if log.logLevel <= .debug {
            let port = FirmwareDebugPort { [log] in log.debug("\($0)") }
            entries.append(.init(Ports.firmwareDebug...Ports.firmwareDebug, port))
        }
        return entries
    }
}

extension Machine {
    /// What firmware is told of a machine.
    static func firmwareConfiguration(
        _ parts: Board.Parts, _ layout: NodeLayout, _ registry: DeviceRegistry, _ model: CPUModel
    ) throws(MachineError) -> FirmwareConfiguration {
        typealias Item = FirmwareConfiguration.Item
        let (configuration, memory) = (parts.configuration, parts.memory)
        var contents = FirmwareConfiguration()
        contents.add(configuration.uuid?.bytes ?? [UInt8](repeating: 0, count: 16), as: Item.uuid)
        contents.add(memory.size, as: Item.memorySize)
        contents.add(UInt16(1), as: Item.noGraphic)
        let cpus = UInt16(clamping: layout.localAPICIDs.count)
        contents.add(cpus, as: Item.cpus)
        contents.add(UInt16(clamping: (layout.localAPICIDs.max() ?? 0) + 1), as: Item.maximumCPUs)
        contents.add(UInt16(0), as: Item.bootMenu)
        contents.add(file: "etc/boot-cpus", [UInt8(truncatingIfNeeded: cpus), UInt8(truncatingIfNeeded: cpus >> 8)])
        if configuration.console != .none {
            let port = Ports.serial.lowerBound
            contents.add(
                file: "etc/sercon-port", [UInt8(truncatingIfNeeded: port), UInt8(truncatingIfNeeded: port >> 8)])
        }
        do throws(BootError) {
            var machine = description(layout, registry.slots.compactMap(\.mmio))
            machine.pci = registry.root?.description
            let tables = try FirmwareTables(
                machine, identity(configuration, layout, model, memory),
                memoryMap: firmwareMemoryMap(memory, reserved: machine.pci.map { [$0.reserved] } ?? []))
            for file in tables.files { contents.add(file: file.name, file.bytes) }
        } catch { throw .boot(error) }
        return contents
    }

    /// RAM as it is, and what else is in the first 4 GiB: firmware adds what it uses itself.
    private static func firmwareMemoryMap(_ memory: GuestMemory, reserved: [Range<UInt64>]) -> [MemoryMapEntry] {
        let pages = PhysicalLayout.identityMap..<PhysicalLayout.firmware.lowerBound
        return memory.regions.map { MemoryMapEntry(start: $0.start.rawValue, size: $0.size, kind: .ram) }
            + (reserved + [pages]).map {
                MemoryMapEntry(start: $0.lowerBound, size: $0.upperBound - $0.lowerBound, kind: .reserved)
            }
    }
}
