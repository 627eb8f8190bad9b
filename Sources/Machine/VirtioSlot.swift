internal import Boot
internal import Devices
internal import DiskImage
internal import GuestMemory
internal import HostNetwork
internal import KVM
internal import Linux
internal import Virtio

/// A virtio device in its place: transport, address and interrupt line.
struct VirtioSlot: Sendable {
    let transport: MMIOTransport
    let place: VirtioMMIOSlot

    static func checkCount(_ wanted: Int) throws(MachineError) {
        let maximum = Wiring.virtioGSIs.count
        if wanted > maximum { throw .tooManyDevices(wanted: wanted, maximum: maximum) }
    }

    /// Makes the disks, then the network interfaces, and binds their bells.
    static func makeAll(_ configuration: Configuration, _ ram: GuestRAM, _ machine: borrowing VirtualMachine) throws(MachineError) -> [VirtioSlot] {
        let devices: [any VirtioDevice] = []
        var slots: [VirtioSlot] = []
        for device in devices { slots.append(try VirtioSlot(device, index: slots.count, ram, machine)) }
        return slots
    }

    private init(_ device: any VirtioDevice, index: Int, _ ram: GuestRAM, _ machine: borrowing VirtualMachine) throws(MachineError) {
        let place = VirtioMMIOSlot(
            address: MMIOBus.address(ofDevice: index), size: UInt32(MMIOTransport.span), gsi: Wiring.virtioGSIs[index])
        let transport = try Machine.host("make the eventfds of \(device.name)") { () throws(SystemCallError) in
            try MMIOTransport(device: device, ram: ram)
        }
        do throws(KVMError) {
            for (queue, bell) in transport.bells.enumerated() {
                try machine.setBell(bell.event, atMMIO: place.address + MMIOTransport.queueNotifyOffset, length: 4, value: UInt64(queue))
            }
            try machine.setInterruptBell(transport.interrupt.line, gsi: place.gsi)
        } catch { throw .kvm(error) }
        self.transport = transport
        self.place = place
    }
}
