// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import GuestMemory
internal import KVM
internal import Linux
internal import Synchronization

/// How a machine's threads learn that it ends, and why. The first reason counts.
final class Ending: Sendable {
    /// Rung when there is a reason.
    let bell: EventFD
    private let reason = Guarded<MachineEnd?>(nil)
    private let stopping = Atomic<Bool>(false)

    init() throws(SystemCallError) { bell = try EventFD() }

    /// Indicates whether vCPU threads are to leave.
    var isStopping: Bool { stopping.load(ordering: .acquiring) }

    var end: MachineEnd? { reason.withLock { $0 } }

    /// Waits until there is a reason. The bell stays rung.
    func wait() {
        bell.wait()
        bell.signal()
    }

    /// Any thread may call it. The first reason counts, except that who ends a machine ends it also when the guest resets itself just now.
    func post(_ end: MachineEnd) {
        reason.withLock { reason in
            if reason.map({ $0.isReset && end.overridesReset }) ?? true { reason = end }
            stopping.store(true, ordering: .releasing)
        }
        bell.signal()
    }

    /// The guest goes on with another boot.
    /// - Returns: false when the machine ends for another reason than a reset.
    func clear() -> Bool {
        reason.withLock { current in
            guard current?.isReset == true else { return false }
            current = nil
            stopping.store(false, ordering: .releasing)
            bell.drain()
            return true
        }
    }
}

/// One vCPU and the thread that runs it.
final class CPUThread: Sendable {
    let cpu: VirtualCPU
    private let ports: PortBus
    private let mmio: MMIOBus
    private let ram: GuestRAM
    private let ending: Ending
    /// Where the thread stops for a debugger; nil in a machine without.
    let seat: DebugSeat?
    /// Counts the exits, where that is asked for.
    let exits: ExitCounter?
    private let thread = Guarded<Thread?>(nil)

    init(
        _ cpu: consuming VirtualCPU, ports: PortBus, mmio: MMIOBus, ram: GuestRAM, ending: Ending, seat: DebugSeat? = nil,
        exits: ExitCounter? = nil
    ) {
        self.cpu = cpu
        self.ports = ports
        self.mmio = mmio
        self.ram = ram
        self.ending = ending
        self.seat = seat
        self.exits = exits
    }

    /// The signal that makes `KVM_RUN` return; its handler does nothing.
    static var kickSignal: Int32 { clinux_sigrtmin() }

    /// Starts the thread. It runs until the machine ends.
    func start() throws(SystemCallError) {
        try thread.withLock { (thread) throws(SystemCallError) in
            thread = try Thread.start(name: "vcpu\(cpu.id)") { [self] in run() }
        }
    }

    /// Makes the thread leave the guest and look whether the machine ends, or a debugger wants it to stop. The flag is set before the signal is sent, so a
    /// thread that is about to enter the kernel comes back too.
    func kick() {
        cpu.immediateExit.request(true)
        thread.withLock { (thread: inout Thread?) in thread?.send(signal: Self.kickSignal) }
        seat?.wake()
    }

    /// Waits for the thread's end.
    func join() {
        if let thread = thread.withLock({ $0.take() }) { thread.join() }
    }

    private func run() {
        SignalSet([Self.kickSignal]).unblock()
        if seat != nil || exits != nil { return runObserved() }
        while !ending.isStopping {
            do throws(KVMError) {
                if let end = try handle(cpu.runGuest()) { ending.post(end) }
            } catch {
                ending.post(.hostError(error.description))
            }
        }
    }

    /// The same for a debugger or a counter: a loop of its own, so that the other one has nothing to ask.
    private func runObserved() {
        // Whether the registers are whole: after an exit for I/O they are only when the next run has finished the instruction
        // (api.rst, KVM_RUN), which a run that returns at once does too.
        var isWhole = true
        while !ending.isStopping {
            if isWhole, let seat, seat.isWanted {
                seat.park { ending.isStopping }
                // Whoever sets the flag from here on has said why before: the loop looks again.
                cpu.immediateExit.request(false)
                continue
            }
            do throws(KVMError) {
                let exit = try cpu.runGuest()
                exits?.count(exit)
                isWhole = false
                switch exit {
                case .interrupted: isWhole = true
                case .debug(let event) where seat != nil:
                    seat?.report(.debug(event))
                    isWhole = true
                default:
                    guard let end = try handle(exit) else { continue }
                    // A last look, before nothing is left to look at.
                    if end.isCrash, let seat,
                        seat.reportFailure(end.sentence ?? "", isEmulation: end.isEmulationFailure, until: { ending.isStopping }) {
                        isWhole = true
                        cpu.immediateExit.request(false)
                        continue
                    }
                    ending.post(end)
                }
            } catch {
                ending.post(.hostError(error.description))
            }
        }
    }

    /// - Returns: how the machine ends, if the exit ends it.
    private func handle(_ exit: Exit) throws(KVMError) -> MachineEnd? {
        switch exit {
        case .port(let access): ports.handle(access)
        case .mmio(let access): mmio.handle(access)
        case .interrupted: break
        case .shutdown: return .tripleFault(cpu: cpu.id, state: dump(instruction: []))
        case .systemEvent(type: UInt32(KVM_SYSTEM_EVENT_SHUTDOWN)): return .powerOff
        case .systemEvent(type: UInt32(KVM_SYSTEM_EVENT_RESET)): return .reset
        case .systemEvent(type: UInt32(KVM_SYSTEM_EVENT_CRASH)): return unexpected("a crash that the guest reported")
        case .systemEvent(let type): return unexpected("KVM_EXIT_SYSTEM_EVENT of type \(type)")
        case .internalError(let error): return .internalError(cpu: cpu.id, error, state: dump(instruction: error.instruction))
        case .failedEntry(let reason):
            return unexpected("KVM_EXIT_FAIL_ENTRY, hardware reason 0x\(String(reason, radix: 16))")
        case .unknown(let reason): return unexpected("KVM_EXIT_UNKNOWN, hardware reason 0x\(String(reason, radix: 16))")
        case .halt: return unexpected("KVM_EXIT_HLT")
        case .debug(_): return unexpected("KVM_EXIT_DEBUG")
        case .hypercall: return unexpected("KVM_EXIT_HYPERCALL")
        case .endOfInterrupt: return unexpected("KVM_EXIT_IOAPIC_EOI")
        case .readMSR(let index): return unexpected("KVM_EXIT_X86_RDMSR of 0x\(String(index, radix: 16))")
        case .writeMSR(let index, _): return unexpected("KVM_EXIT_X86_WRMSR of 0x\(String(index, radix: 16))")
        case .other(let reason): return unexpected("KVM_EXIT_\(Exit.name(ofReason: reason))")
        }
        return nil
    }

    private func unexpected(_ name: String) -> MachineEnd {
        .unexpectedExit(cpu: cpu.id, name: name, state: dump(instruction: []))
    }

    /// Registers and the bytes at the instruction pointer, for a report.
    private func dump(instruction: [UInt8]) -> String {
        guard let registers = try? cpu.registers(), let system = try? cpu.systemRegisters() else {
            return "  (the registers could not be read)"
        }
        var bytes = instruction
        if bytes.isEmpty, let address = cpu.translate(registers.rip) {
            for offset in 0..<15 {
                guard let byte = try? ram.readUInt8(at: GuestAddress(address &+ UInt64(offset))) else { break }
                bytes.append(byte)
            }
        }
        func hex(_ value: UInt64, _ digits: Int = 16) -> String {
            let text = String(value, radix: 16)
            return String(repeating: "0", count: max(0, digits - text.count)) + text
        }
        let r = registers
        // AMD-V leaves nothing of a vCPU that shut down: KVM gives it the values of a processor that was just switched on.
        let isReset = r.rip == 0xfff0 && system.cs.base == 0xffff_0000
        let note = isReset ? "  (KVM resets the vCPU after a triple fault on AMD-V: these are not the guest's values)\n" : ""
        return note + """
              rip \(hex(r.rip)) rfl \(hex(r.rflags)) cs  \(hex(UInt64(system.cs.selector), 4)) ss \(hex(UInt64(system.ss.selector), 4)) cpl \(system.ss.dpl)
              rax \(hex(r.rax)) rbx \(hex(r.rbx)) rcx \(hex(r.rcx)) rdx \(hex(r.rdx))
              rsi \(hex(r.rsi)) rdi \(hex(r.rdi)) rbp \(hex(r.rbp)) rsp \(hex(r.rsp))
              r8  \(hex(r.r8)) r9  \(hex(r.r9)) r10 \(hex(r.r10)) r11 \(hex(r.r11))
              r12 \(hex(r.r12)) r13 \(hex(r.r13)) r14 \(hex(r.r14)) r15 \(hex(r.r15))
              cr0 \(hex(system.cr0)) cr2 \(hex(system.cr2)) cr3 \(hex(system.cr3)) cr4 \(hex(system.cr4)) efer \(hex(system.efer, 4))
              instruction bytes at rip: \(bytes.isEmpty ? "unreadable" : bytes.map { hex(UInt64($0), 2) }.joined(separator: " "))
            """
    }
}
