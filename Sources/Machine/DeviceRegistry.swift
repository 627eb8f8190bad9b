// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import GuestMemory
internal import KVM
internal import Linux
internal import PCI
internal import Platform
internal import Virtio

/// The virtio devices of a machine, which outlive its boards: the place of each, empty ones included.
final class AttachedDevices: Sendable {
    private let places: Guarded<[(any VirtioDevice)?]>

    /// - Parameter count: of the places.
    init(_ devices: [any VirtioDevice], count: Int) {
        places = Guarded(devices + Array(repeating: nil, count: max(0, count - devices.count)))
    }

    var count: Int { places.withLock { $0.count } }

    /// Those that are attached, by the numbers of their places.
    var all: [(index: Int, device: any VirtioDevice)] {
        places.withLock { places in places.enumerated().compactMap { index, device in device.map { (index, $0) } } }
    }

    subscript(index: Int) -> (any VirtioDevice)? {
        get { places.withLock { $0[index] } }
        set { places.withLock { $0[index] = newValue } }
    }

    /// The first place that is free.
    var firstFree: Int? { places.withLock { $0.firstIndex { $0 == nil } } }
}

/// Which virtio device is where on a board: slot, interrupt, transport.
///
/// Any thread may read it. While the guest runs, only the control's thread changes it.
final class DeviceRegistry: Sendable {
    /// What vCPU threads read.
    let map: AddressMap<any MMIODevice>
    /// The PCI hierarchy; nil in a machine whose devices are virtio-mmio.
    let root: PCIRoot?
    private let attached: AttachedDevices
    private let memory: GuestMemory
    private let queues: VirtqueueFormat
    private let current: Guarded<[VirtioSlot]>

    /// Puts a machine's devices in their places, with registers, doorbells and interrupts as after power-on.
    /// - Parameter queues: the kind of queues that all devices offer.
    init(
        _ attached: AttachedDevices, _ memory: GuestMemory, _ machine: borrowing VirtualMachine, _ root: PCIRoot?,
        queues: VirtqueueFormat
    ) throws(MachineError) {
        self.attached = attached
        self.memory = memory
        self.queues = queues
        self.root = root
        var slots: [VirtioSlot] = []
        for (index, device) in attached.all {
            let slot = try VirtioSlot(device, index: index, memory, root, queues: queues)
            try slot.connect(to: machine)
            slots.append(slot)
        }
        map = AddressMap(slots.compactMap(Self.entry) + (root?.mmioEntries ?? []))
        current = Guarded(slots)
        for slot in slots { show(slot) }
    }

    /// In the order of their places.
    var slots: [VirtioSlot] { current.withLock { $0 } }

    /// The slot of a device, by its name.
    func slot(named name: String) -> VirtioSlot? { slots.first { $0.device.name == name } }

    /// Connects a device in the first free place, on this board and those after it. vCPU threads find it when they take
    /// the map's new table.
    func attach(_ device: any VirtioDevice, _ machine: borrowing VirtualMachine) throws(MachineError) -> VirtioSlot {
        guard let index = attached.firstFree else {
            throw .tooManyDevices(wanted: attached.count + 1, maximum: attached.count)
        }
        let slot = try VirtioSlot(device, index: index, memory, root, queues: queues)
        do throws(MachineError) { try slot.connect(to: machine) } catch {
            slot.disconnect(from: machine)
            throw error
        }
        attached[index] = device
        current.withLock { slots in
            slots.append(slot)
            slots.sort { $0.index < $1.index }
        }
        if let entry = Self.entry(slot) { map.insert(entry) }
        show(slot)
        return slot
    }

    /// Removes a device from what vCPU threads find, when they take the map's new table.
    func hide(_ slot: VirtioSlot) {
        switch slot.place {
        case .mmio(_, let slot): map.remove(at: slot.address)
        // Found by the bridge, in whose windows no thread is when it has taken a table.
        case .pci(_, let address): root?.bridge.remove(at: address)
        }
    }

    /// Ends what a hidden device does and disconnects it; the place is free.
    func detach(_ slot: VirtioSlot, _ machine: borrowing VirtualMachine) {
        // The driver's last: its requests end, its doorbells are drained.
        slot.function.writeStatus(0)
        slot.disconnect(from: machine)
        attached[slot.index] = nil
        current.withLock { $0.removeAll { $0.index == slot.index } }
    }

    private func show(_ slot: VirtioSlot) {
        if case .pci(let transport, let address) = slot.place { root?.bridge.insert(transport, at: address) }
    }

    private static func entry(_ slot: VirtioSlot) -> AddressMap<any MMIODevice>.Entry? {
        guard case .mmio(let transport, let slot) = slot.place else { return nil }
        return AddressMap<any MMIODevice>.Entry(slot.address, count: MMIOTransport.span, transport)
    }
}
