// SPDX-License-Identifier: Apache-2.0

public import CLinux
internal import Linux

/// One vCPU: its `kvm_run` page and its registers. It belongs to the thread that runs it.
public struct VirtualCPU: ~Copyable, Sendable {
    /// The vCPU's number and local APIC ID.
    public let id: UInt32
    let descriptor: FileDescriptor
    private let runPage: Mapping
    private let runSize: Int

    init(id: UInt32, descriptor: consuming FileDescriptor, runSize: Int) throws(KVMError) {
        self.id = id
        let number = descriptor.rawValue
        runPage = try refusing("map the run page of vCPU \(id)") { () throws(SystemCallError) in
            try Mapping(size: runSize, protection: PROT_READ | PROT_WRITE, flags: MAP_SHARED, descriptor: number)
        }
        self.descriptor = descriptor
        self.runSize = runSize
    }

    // The mapping is at least one kvm_run long (KVM_GET_VCPU_MMAP_SIZE) and lives as long as this value.
    private var run: UnsafeMutablePointer<kvm_run> { unsafe runPage.start.assumingMemoryBound(to: kvm_run.self) }

    /// Runs the guest until an exit to user space (`KVM_RUN`).
    public func runGuest() throws(KVMError) -> Exit {
        if clinux_ioctl_value(descriptor.rawValue, CLINUX_KVM_RUN, 0) < 0 {
            let error = SystemCallError.last("KVM_RUN")
            // EAGAIN: an application processor that was just started; the next call enters it.
            if error.errno == EINTR || error.errno == EAGAIN { return .interrupted }
            throw .refused(purpose: "run vCPU \(id)", error)
        }
        let reason = unsafe run.pointee.exit_reason
        switch Int32(bitPattern: reason) {
        case KVM_EXIT_IO: return unsafe .port(PortAccess(clinux_kvm_run_io(run), run: runPage.start))
        case KVM_EXIT_MMIO: return unsafe .mmio(MMIOAccess(run))
        case KVM_EXIT_HLT: return .halt
        case KVM_EXIT_SHUTDOWN: return .shutdown
        case KVM_EXIT_INTR: return .interrupted
        case KVM_EXIT_INTERNAL_ERROR: return .internalError(internalError())
        case KVM_EXIT_FAIL_ENTRY: return unsafe .failedEntry(reason: clinux_kvm_run_fail_entry_reason(run))
        case KVM_EXIT_UNKNOWN: return unsafe .unknown(reason: clinux_kvm_run_hardware_reason(run))
        case KVM_EXIT_SYSTEM_EVENT: return unsafe .systemEvent(type: clinux_kvm_run_system_event_type(run))
        case KVM_EXIT_DEBUG: return unsafe .debug(DebugEvent(clinux_kvm_run_debug(run)))
        case KVM_EXIT_HYPERCALL: return .hypercall
        case KVM_EXIT_IOAPIC_EOI: return .endOfInterrupt
        case KVM_EXIT_X86_RDMSR: return unsafe .readMSR(index: clinux_kvm_run_msr_index(run))
        case KVM_EXIT_X86_WRMSR:
            return unsafe .writeMSR(index: clinux_kvm_run_msr_index(run), value: clinux_kvm_run_msr_data(run))
        default: return .other(reason: reason)
        }
    }

    /// A handle by which other threads make ``runGuest()`` return.
    ///
    /// The flag makes the next `KVM_RUN` return immediately, so a request that comes just before the thread enters the
    /// kernel is not lost; a signal to the thread ends a run that is under way. The value must not be used after the
    /// vCPU's end.
    @safe public struct ImmediateExit: @unchecked Sendable {
        private let run: UnsafeMutablePointer<kvm_run>

        fileprivate init(_ run: UnsafeMutablePointer<kvm_run>) { unsafe self.run = run }

        /// Sets or clears the flag; the signal is sent afterwards, by ``Linux/Thread/send(signal:)``.
        public func request(_ wanted: Bool) { unsafe clinux_kvm_run_set_immediate_exit(run, wanted ? 1 : 0) }
    }

    public var immediateExit: ImmediateExit { unsafe ImmediateExit(run) }

    // MARK: State

    /// Reads the general registers, RIP and RFLAGS.
    public func registers() throws(KVMError) -> kvm_regs { try get(CLINUX_KVM_GET_REGS, kvm_regs(), "KVM_GET_REGS") }
    public func setRegisters(_ value: kvm_regs) throws(KVMError) { try set(CLINUX_KVM_SET_REGS, value, "KVM_SET_REGS") }

    /// Reads the segments, control registers, descriptor tables and EFER.
    public func systemRegisters() throws(KVMError) -> kvm_sregs {
        try get(CLINUX_KVM_GET_SREGS, kvm_sregs(), "KVM_GET_SREGS")
    }
    public func setSystemRegisters(_ value: kvm_sregs) throws(KVMError) {
        try set(CLINUX_KVM_SET_SREGS, value, "KVM_SET_SREGS")
    }

    /// Reads the local APIC's registers, as laid out in its MMIO page.
    public func localAPIC() throws(KVMError) -> kvm_lapic_state {
        try get(CLINUX_KVM_GET_LAPIC, kvm_lapic_state(), "KVM_GET_LAPIC")
    }
    public func setLocalAPIC(_ value: kvm_lapic_state) throws(KVMError) {
        try set(CLINUX_KVM_SET_LAPIC, value, "KVM_SET_LAPIC")
    }

    /// Reads the run state: running, halted, waiting for INIT or SIPI (`KVM_MP_STATE_*`).
    public func mpState() throws(KVMError) -> UInt32 {
        try get(CLINUX_KVM_GET_MP_STATE, kvm_mp_state(), "KVM_GET_MP_STATE").mp_state
    }

    /// Sets the vCPU's CPUID leaves. Call it before the first run.
    public func setCPUID(_ entries: [kvm_cpuid_entry2]) throws(KVMError) {
        let table = CountedArray<kvm_cpuid_entry2>(headerSize: MemoryLayout<kvm_cpuid2>.size, entries)
        try refusing("set the CPUID of vCPU \(id)") { () throws(SystemCallError) in
            _ = try unsafe descriptor.ioctl(CLINUX_KVM_SET_CPUID2, buffer: table.address, named: "KVM_SET_CPUID2")
        }
    }

    /// Reads MSRs; those that this host's KVM does not know are missing from the result.
    public func modelSpecificRegisters(_ indices: [UInt32]) throws(KVMError) -> [UInt32: UInt64] {
        var values: [UInt32: UInt64] = [:]
        // KVM stops at the first MSR that it does not know, and returns how many it handled; one by one, none hides the
        // rest.
        for index in indices {
            let list = oneMSR(index: index, value: 0)
            let got = try refusing("read MSR 0x\(String(index, radix: 16)) of vCPU \(id)") {
                () throws(SystemCallError) in
                try unsafe descriptor.ioctl(CLINUX_KVM_GET_MSRS, buffer: list.address, named: "KVM_GET_MSRS")
            }
            if got == 1 { values[index] = list.elements[0].data }
        }
        return values
    }

    /// Sets an MSR.
    /// - Returns: false when this host's KVM does not know the MSR or refuses the value.
    @discardableResult
    public func setModelSpecificRegister(_ index: UInt32, _ value: UInt64) throws(KVMError) -> Bool {
        let list = oneMSR(index: index, value: value)
        return try refusing("set MSR 0x\(String(index, radix: 16)) of vCPU \(id)") { () throws(SystemCallError) in
            try unsafe descriptor.ioctl(CLINUX_KVM_SET_MSRS, buffer: list.address, named: "KVM_SET_MSRS")
        } == 1
    }

    /// Returns the frequency of the guest's time-stamp counter in kHz, or nil if KVM does not know it.
    public func timeStampCounterFrequency() -> Int? {
        let frequency = (try? descriptor.ioctl(CLINUX_KVM_GET_TSC_KHZ, named: "KVM_GET_TSC_KHZ")) ?? 0
        return frequency > 0 ? Int(frequency) : nil
    }

    /// Notifies a guest that uses KVM's clock that it was stopped for a while, so that its watchdogs do not take the
    /// gap for a hang (`KVM_KVMCLOCK_CTRL`).
    /// - Throws: also when the guest does not use the clock.
    public func markPausedClock() throws(KVMError) {
        do throws(SystemCallError) {
            _ = try descriptor.ioctl(CLINUX_KVM_KVMCLOCK_CTRL, named: "KVM_KVMCLOCK_CTRL")
        } catch {
            throw .refused(purpose: "mark the clock of vCPU \(id) as paused", error)
        }
    }

    /// Translates a guest-virtual address to a guest-physical one, or nil if it is not mapped (`KVM_TRANSLATE`).
    public func translate(_ linear: UInt64) -> UInt64? {
        var translation = kvm_translation()
        translation.linear_address = linear
        guard (try? descriptor.ioctl(CLINUX_KVM_TRANSLATE, &translation, named: "KVM_TRANSLATE")) != nil,
            translation.valid != 0
        else { return nil }
        return translation.physical_address
    }

    private func oneMSR(index: UInt32, value: UInt64) -> CountedArray<kvm_msr_entry> {
        var entry = kvm_msr_entry()
        entry.index = index
        entry.data = value
        return CountedArray<kvm_msr_entry>(headerSize: MemoryLayout<kvm_msrs>.size, [entry])
    }

    private func internalError() -> InternalError {
        var bytes: [UInt8] = []
        let suberror = unsafe clinux_kvm_run_internal_suberror(run)
        if suberror == UInt32(KVM_INTERNAL_ERROR_EMULATION) {
            bytes = unsafe Array(unsafeUninitializedCapacity: 15) { buffer, count in
                // At most 15 bytes are copied.
                count = unsafe Int(clinux_kvm_run_emulation_bytes(run, buffer.baseAddress))
            }
        }
        let data = unsafe (0..<clinux_kvm_run_internal_ndata(run)).map { unsafe clinux_kvm_run_internal_data(run, $0) }
        return InternalError(suberror: suberror, data: data, instruction: bytes)
    }

    private func get<Value>(_ request: UInt, _ initial: Value, _ name: String) throws(KVMError) -> Value {
        var value = initial
        do throws(SystemCallError) { try descriptor.ioctl(request, &value, named: name) } catch {
            throw .refused(purpose: "read the state of vCPU \(id)", error)
        }
        return value
    }

    private func set<Value>(_ request: UInt, _ value: Value, _ name: String) throws(KVMError) {
        var value = value
        do throws(SystemCallError) { try descriptor.ioctl(request, &value, named: name) } catch {
            throw .refused(purpose: "set the state of vCPU \(id)", error)
        }
    }
}
