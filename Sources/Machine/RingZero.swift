// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import GuestMemory
internal import KVM
internal import Platform

/// How this host's KVM runs a guest's ring 0.
///
/// No capability and no flag of the CPU shows it, so it is tried, in a machine of its own: two to three milliseconds.
enum RingZero: Equatable {
    case native
    /// Ring 0 runs in KVM's instruction emulator, which does not support all instructions.
    case interpreted

    /// `lock cmpxchg16b (%rdi); hlt`: an instruction that Linux needs and KVM's emulator does not know. A CPU without
    /// it raises an exception, which is a native answer too.
    private static let code: [UInt8] = [0xf0, 0x48, 0x0f, 0xc7, 0x0f, 0xf4]

    /// - Returns: nil if no machine can be created, or the result is inconclusive.
    static func found(on system: borrowing System) -> RingZero? {
        guard let memory = try? GuestMemory(size: 2 << 20),
            let state = try? BootState.longMode(running: code, in: memory)
        else { return nil }
        // The memory outlives the machine that uses it.
        return withExtendedLifetime(memory) { try? run(system, memory, state) }
    }

    private static func run(
        _ system: borrowing System, _ memory: GuestMemory, _ state: BootState
    ) throws(KVMError) -> RingZero? {
        let machine = try system.createVirtualMachine()
        try machine.setTSSAddress(UInt32(PhysicalLayout.taskStateSegment))
        try machine.setIdentityMapAddress(PhysicalLayout.identityMap)
        for (slot, region) in memory.regions.enumerated() {
            // `found` holds the memory until this returns, and the machine is gone by then.
            try unsafe machine.setMemory(
                slot: UInt32(slot), at: region.start.rawValue, size: region.size, host: region.host)
        }
        let cpu = try machine.createCPU(id: 0)
        try cpu.setCPUID(system.supportedCPUID())
        var registers = try cpu.systemRegisters()
        state.apply(to: &registers)
        try cpu.setSystemRegisters(registers)
        try cpu.setRegisters(state.registers)
        // A signal makes KVM_RUN return early; nothing else here can come again and again.
        for _ in 0..<1000 {
            switch try cpu.runGuest() {
            case .interrupted: continue
            case .internalError(let error) where error.isEmulation: return .interpreted
            case .halt, .shutdown: return .native
            default: return nil
            }
        }
        return nil
    }
}
