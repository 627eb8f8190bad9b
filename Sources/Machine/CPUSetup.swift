// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import CLinux
internal import KVM

extension BootState {
    /// The general registers that `KVM_SET_REGS` takes.
    var registers: kvm_regs {
        var registers = kvm_regs()
        registers.rip = rip
        registers.rflags = rflags
        registers.rbx = rbx
        registers.rsi = rsi
        registers.rdi = rdi
        return registers
    }

    /// Puts the rest into what `KVM_GET_SREGS` gave.
    func apply(to system: inout kvm_sregs) {
        system.cs = code.kernelValue
        (system.ds, system.es, system.ss) = (data.kernelValue, data.kernelValue, data.kernelValue)
        (system.fs, system.gs) = (extra.kernelValue, extra.kernelValue)
        system.tr = task.kernelValue
        (system.gdt.base, system.gdt.limit) = (gdt.base, gdt.limit)
        (system.idt.base, system.idt.limit) = (idt.base, idt.limit)
        (system.cr0, system.cr3, system.cr4, system.efer) = (cr0, cr3, cr4, efer)
    }
}

extension BootState.Segment {
    fileprivate var kernelValue: kvm_segment {
        var segment = kvm_segment()
        segment.base = base
        segment.limit = limit
        segment.selector = selector
        segment.type = type
        segment.present = 1
        segment.s = isCodeOrData ? 1 : 0
        segment.l = isLong ? 1 : 0
        segment.db = is32Bit ? 1 : 0
        segment.g = inPages ? 1 : 0
        return segment
    }
}

extension VirtualMachine {
    /// Creates a vCPU with its CPUID, MSRs and local APIC; the boot processor also with its first registers.
    func makeCPU(id: UInt32, _ model: borrowing CPUModel, boot state: BootState?) throws(KVMError) -> VirtualCPU {
        let cpu = try createCPU(id: id)
        try cpu.setCPUID(model.entries(id: id, timeStampCounterFrequency: cpu.timeStampCounterFrequency()))
        for (index, value) in CPUModel.modelSpecificRegisters { try cpu.setModelSpecificRegister(index, value) }
        guard let state else { return cpu }
        var system = try cpu.systemRegisters()
        state.apply(to: &system)
        try cpu.setSystemRegisters(system)
        try cpu.setRegisters(state.registers)
        try cpu.connectLegacyInterrupts()
        return cpu
    }
}

extension VirtualCPU {
    /// Local interrupts as firmware leaves them on the boot processor: the PIC on LINT0, NMI on LINT1 (virtual wire
    /// mode, MultiProcessor Specification §3.6.2.2), so that a guest that knows only the PIC gets its interrupts.
    fileprivate func connectLegacyInterrupts() throws(KVMError) {
        var apic = try localAPIC()
        unsafe withUnsafeMutableBytes(of: &apic) { registers in
            // Offsets in the APIC's page, which the structure is the first 1024 bytes of (Intel SDM volume 3, §11.5.1).
            unsafe registers.storeBytes(of: 0x700, toByteOffset: 0x350, as: UInt32.self)  // LVT LINT0: ExtINT
            unsafe registers.storeBytes(of: 0x400, toByteOffset: 0x360, as: UInt32.self)  // LVT LINT1: NMI
        }
        try setLocalAPIC(apic)
    }
}
