// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import Linux

/// One virtual machine of KVM's: its memory slots, interrupt controllers, ioeventfds, irqfds, and vCPUs.
///
/// Safe to use from any thread, as the kernel serializes what must be. It must outlive the mappings' users,
/// and the mappings given to ``setMemory(slot:at:size:host:)`` must outlive it.
public struct VirtualMachine: ~Copyable, Sendable {
    let descriptor: FileDescriptor
    private let runSize: Int

    init(descriptor: consuming FileDescriptor, runSize: Int) {
        self.descriptor = descriptor
        self.runSize = runSize
    }

    /// Returns another handle of the same machine, for an owner of its own.
    public func duplicate() throws(KVMError) -> VirtualMachine {
        do throws(SystemCallError) {
            return VirtualMachine(descriptor: try descriptor.duplicate(), runSize: runSize)
        } catch { throw .refused(purpose: "duplicate its descriptor", error) }
    }

    /// Maps host memory as guest RAM; a size of 0 removes the slot (`KVM_SET_USER_MEMORY_REGION`).
    /// - Parameters:
    ///   - address: guest-physical, a multiple of 4096.
    ///   - size: bytes, a multiple of 4096.
    ///   - host: the first byte; it stays mapped as long as the slot exists.
    ///   - isReadOnly: a guest's write is an exit to user space, like one to a device.
    public func setMemory(
        slot: UInt32, at address: UInt64, size: UInt64, host: UnsafeMutableRawPointer, isReadOnly: Bool = false
    ) throws(KVMError) {
        var region = kvm_userspace_memory_region()
        region.slot = slot
        // KVM_MEM_READONLY, whose definition is not imported.
        region.flags = isReadOnly ? 1 << 1 : 0
        region.guest_phys_addr = address
        region.memory_size = size
        region.userspace_addr = UInt64(UInt(bitPattern: host))
        try call(
            CLINUX_KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION",
            "put \(size) bytes of guest RAM at 0x\(String(address, radix: 16))")
    }

    /// Sets the three pages of guest-physical space that KVM needs on older Intel CPUs; below 4 GiB, outside RAM.
    public func setTSSAddress(_ address: UInt32) throws(KVMError) {
        try call(CLINUX_KVM_SET_TSS_ADDR, UInt(address), "KVM_SET_TSS_ADDR", "place its task state segment")
    }

    /// Sets the page of guest-physical space for KVM's identity map; outside RAM. Call it before creating a vCPU.
    public func setIdentityMapAddress(_ address: UInt64) throws(KVMError) {
        var address = address
        try call(CLINUX_KVM_SET_IDENTITY_MAP_ADDR, &address, "KVM_SET_IDENTITY_MAP_ADDR", "place its identity map")
    }

    /// Creates both PICs, the IOAPIC, and a local APIC for each later vCPU. Call it before creating a vCPU.
    public func createInterruptControllers() throws(KVMError) {
        try call(CLINUX_KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP", "create the interrupt controllers")
    }

    /// Prepares the 8254 timer, created when the guest first accesses it. Call it after the interrupt controllers.
    public func intervalTimer() throws(KVMError) -> IntervalTimer {
        do throws(SystemCallError) { return IntervalTimer(try descriptor.duplicate()) } catch {
            throw .refused(purpose: "duplicate its descriptor", error)
        }
    }

    /// Waits until the kernel has freed the I/O buses that the devices made so far have replaced; a few milliseconds,
    /// on a thread that has them.
    ///
    /// The end of a machine waits for the same, and a normal grace period takes 15 to 20 ms. The ioctl is chosen for
    /// what the kernel does after it, an expedited grace period: an empty list of denied PMU events denies nothing.
    public func waitForReplacedBuses() {
        var filter = kvm_pmu_event_filter()
        filter.action = UInt32(KVM_PMU_EVENT_DENY)
        _ = try? unsafe withUnsafeMutablePointer(to: &filter) { filter throws(SystemCallError) in
            // With no events the structure is only its header.
            try unsafe descriptor.ioctl(
                CLINUX_KVM_SET_PMU_EVENT_FILTER, buffer: filter, named: "KVM_SET_PMU_EVENT_FILTER")
        }
    }

    /// Signals `event` when the guest makes such a write, without an exit to user space (`KVM_IOEVENTFD`).
    ///
    /// KVM keeps the eventfd open until ``deassignIOEventFD(_:for:)``, or the machine's end.
    public func assignIOEventFD(_ event: borrowing EventFD, for match: IOEventMatch) throws(KVMError) {
        var request = match.kernelValue(event)
        try call(CLINUX_KVM_IOEVENTFD, &request, "KVM_IOEVENTFD", "assign an ioeventfd to \(match)")
    }

    /// Ends what ``assignIOEventFD(_:for:)`` began: from now on such a write is an exit to user space.
    /// - Throws: also when `event` is not assigned for this match.
    public func deassignIOEventFD(_ event: borrowing EventFD, for match: IOEventMatch) throws(KVMError) {
        var request = match.kernelValue(event)
        request.flags |= 1 << UInt32(kvm_ioeventfd_flag_nr_deassign)
        try call(CLINUX_KVM_IOEVENTFD, &request, "KVM_IOEVENTFD", "deassign the ioeventfd of \(match)")
    }

    /// Injects an interrupt on `gsi` whenever `event` is signalled, an edge each time (`KVM_IRQFD`).
    ///
    /// An eventfd is assigned to one GSI at a time. KVM keeps it open until ``deassignIRQFD(_:gsi:)``, or the machine's
    /// end.
    public func assignIRQFD(_ event: borrowing EventFD, gsi: UInt32) throws(KVMError) {
        var request = kvm_irqfd()
        request.fd = UInt32(bitPattern: event.rawValue)
        request.gsi = gsi
        try call(CLINUX_KVM_IRQFD, &request, "KVM_IRQFD", "assign an irqfd to GSI \(gsi)")
    }

    /// Ends what ``assignIRQFD(_:gsi:)`` began; returns when an interrupt on its way has been injected. Harmless when
    /// nothing was assigned.
    public func deassignIRQFD(_ event: borrowing EventFD, gsi: UInt32) throws(KVMError) {
        var request = kvm_irqfd()
        request.fd = UInt32(bitPattern: event.rawValue)
        request.gsi = gsi
        request.flags = UInt32(KVM_IRQFD_FLAG_DEASSIGN)
        try call(CLINUX_KVM_IRQFD, &request, "KVM_IRQFD", "deassign the irqfd of GSI \(gsi)")
    }

    /// Returns an interrupt line (`KVM_IRQ_LINE`). It keeps the machine's descriptor open.
    public func interruptLine(gsi: UInt32) throws(KVMError) -> InterruptLine {
        do throws(SystemCallError) { return InterruptLine(try descriptor.duplicate(), gsi: gsi) } catch {
            throw .refused(purpose: "duplicate its descriptor", error)
        }
    }

    /// Creates a vCPU.
    /// - Parameter id: its number and local APIC ID, from 0.
    public func createCPU(id: UInt32) throws(KVMError) -> VirtualCPU {
        let number = try refusing("create vCPU \(id)") { () throws(SystemCallError) in
            try descriptor.ioctl(CLINUX_KVM_CREATE_VCPU, UInt(id), named: "KVM_CREATE_VCPU")
        }
        return try VirtualCPU(id: id, descriptor: FileDescriptor(owning: number), runSize: runSize)
    }

    /// The owner of the interrupt routing table; one for each machine, after the interrupt controllers.
    public func interruptRouter() throws(KVMError) -> InterruptRouter {
        do throws(SystemCallError) { return InterruptRouter(try descriptor.duplicate()) } catch {
            throw .refused(purpose: "duplicate its descriptor", error)
        }
    }

    private func call(
        _ request: UInt, _ value: UInt, _ name: String, _ purpose: @autoclosure () -> String
    ) throws(KVMError) {
        do throws(SystemCallError) { try descriptor.ioctl(request, value, named: name) } catch {
            throw .refused(purpose: purpose(), error)
        }
    }

    private func call<Argument>(
        _ request: UInt, _ argument: inout Argument, _ name: String, _ purpose: @autoclosure () -> String
    ) throws(KVMError) {
        do throws(SystemCallError) { try descriptor.ioctl(request, &argument, named: name) } catch {
            throw .refused(purpose: purpose(), error)
        }
    }
}
