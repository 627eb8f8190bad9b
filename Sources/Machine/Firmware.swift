// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import Devices
internal import GuestMemory
internal import KVM
internal import Linux
internal import Logging
internal import Platform

/// The firmware that a machine starts instead of a kernel, and the devices that a board has for it.
///
/// It outlives boards: each boot starts at the reset vector of the same code.
final class Firmware: Sendable {
    private let image: FirmwareImage
    private let log: Logger

    var name: String { image.name }

    init(_ path: String, log: Logger) throws(MachineError) {
        do throws(BootError) { image = try FirmwareImage(path: path) } catch { throw .boot(error) }
        self.log = log.of("firmware")
    }

    /// Maps the code where the processors start.
    /// - Parameter slot: a memory slot that RAM does not use.
    func map(_ machine: borrowing VirtualMachine, slot: UInt32) throws(KVMError) {
        // This object, which the board's parts refer to, outlives the board's virtual machine.
        unsafe try machine.setMemory(
            slot: slot, at: image.address, size: image.size, host: image.host, isReadOnly: true)
    }

    /// Copies the code's end to low RAM, which is all zero.
    /// - Parameter contents: the machine's description for the firmware.
    /// - Returns: the devices that only firmware uses.
    func start(
        _ contents: FirmwareConfiguration, _ memory: GuestMemory,
        request: @escaping @Sendable (MachineRequest) -> Void
    ) throws(MachineError) -> [AddressMap<any PortDevice>.Entry] {
        do throws(BootError) { try image.copy(into: memory) } catch { throw .boot(error) }
        var entries: [AddressMap<any PortDevice>.Entry] = [
            .init(Ports.firmwareConfiguration, FirmwareConfigurationPorts(contents, memory.ram)),
            // One of the ports of PCI's configuration mechanism: before them.
            .init(Ports.resetControl...Ports.resetControl, ResetControlPort(request: request)),
        ]
        // Each byte is an exit to user space. Without the port, firmware does not write its messages.
        if log.logLevel <= .debug {
            let port = FirmwareDebugPort { [log] in log.debug("\($0)") }
            entries.append(.init(Ports.firmwareDebug...Ports.firmwareDebug, port))
        }
        return entries
    }
}

extension Machine {
    /// The description of a machine for its firmware: the items and files of its configuration device.
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

    /// RAM, and the reserved ranges of the first 4 GiB. Firmware adds the ranges that it uses itself.
    private static func firmwareMemoryMap(_ memory: GuestMemory, reserved: [Range<UInt64>]) -> [MemoryMapEntry] {
        let pages = PhysicalLayout.identityMap..<PhysicalLayout.firmware.lowerBound
        return memory.regions.map { MemoryMapEntry(start: $0.start.rawValue, size: $0.size, kind: .ram) }
            + (reserved + [pages]).map {
                MemoryMapEntry(start: $0.lowerBound, size: $0.upperBound - $0.lowerBound, kind: .reserved)
            }
    }
}
