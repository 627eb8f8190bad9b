// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Devices
internal import GuestMemory
internal import KVM
internal import Linux
internal import Synchronization
internal import Virtio

/// How a machine's threads learn that it ends, and why. The first reason counts.
final class Ending: Sendable {
    /// Readable from the moment on when there is a reason.
    let event: EventFD
    private let reason = Guarded<MachineEnd?>(nil)
    private let stopping = Atomic<Bool>(false)

    init() throws(SystemCallError) { event = try EventFD() }

    /// Indicates whether vCPU threads are to leave.
    var isStopping: Bool { stopping.load(ordering: .acquiring) }

    var end: MachineEnd? { reason.withLock { $0 } }

    /// Waits until there is a reason. The event stays signalled.
    func wait() {
        event.wait()
        event.signal()
    }

    /// Any thread may call it. The first reason counts, except that a request to end the machine takes effect even when
    /// the guest resets itself just now.
    func post(_ end: MachineEnd) {
        reason.withLock { reason in
            if reason.map({ $0.isReset && end.overridesReset }) ?? true { reason = end }
            stopping.store(true, ordering: .releasing)
        }
        event.signal()
    }

    /// The guest continues with another boot.
    /// - Returns: false when the machine ends for another reason than a reset.
    func clear() -> Bool {
        reason.withLock { current in
            guard current?.isReset == true else { return false }
            current = nil
            stopping.store(false, ordering: .releasing)
            event.drain()
            return true
        }
    }
}

/// One vCPU and the thread that runs it.
final class CPUThread: Sendable {
    let cpu: VirtualCPU
    private let ports: AddressMap<any PortDevice>
    private let mmio: AddressMap<any MMIODevice>
    private let ram: GuestRAM
    private let ending: Ending
    /// Where the thread stops, for a debugger and while the machine is paused.
    let pausePoint: PausePoint
    /// Counts the exits, where that is asked for.
    let exits: ExitCounter?
    private let thread = Guarded<Thread?>(nil)

    init(
        _ cpu: consuming VirtualCPU, ports: AddressMap<any PortDevice>, mmio: AddressMap<any MMIODevice>, ram: GuestRAM,
        ending: Ending, pausePoint: PausePoint,
        exits: ExitCounter? = nil
    ) {
        self.cpu = cpu
        self.ports = ports
        self.mmio = mmio
        self.ram = ram
        self.ending = ending
        self.pausePoint = pausePoint
        self.exits = exits
    }

    /// The signal that makes `KVM_RUN` return; its handler does nothing.
    static var kickSignal: Int32 { clinux_sigrtmin() }

    /// Starts the thread. It runs until the machine ends.
    /// - Parameter first: what the thread does before anything else.
    func start(first: @escaping @Sendable () -> Void) throws(SystemCallError) {
        try thread.withLock { (thread) throws(SystemCallError) in
            thread = try Thread.start(name: "vcpu\(cpu.id)") { [self] in
                first()
                run()
            }
        }
    }

    /// Makes the thread leave the guest and check whether the machine ends, or a stop is requested. The flag is set
    /// before the signal is sent, so a thread that is about to enter the kernel comes back too.
    func kick() {
        cpu.immediateExit.request(true)
        thread.withLock { (thread: inout Thread?) in thread?.send(signal: Self.kickSignal) }
        pausePoint.wake()
    }

    /// Waits for the thread's end.
    func join() {
        if let thread = thread.withLock({ $0.take() }) { thread.join() }
    }

    private func run() {
        SignalSet([Self.kickSignal]).unblock()
        // Whether the registers are complete: after an exit for I/O they are only when the next run has finished the
        // instruction (api.rst, KVM_RUN), which a run that returns immediately does too.
        var isComplete = true
        var tables = currentTables
        while !ending.isStopping {
            if pausePoint.isRequested {
                if pausePoint.needsReload {
                    tables = currentTables
                    pausePoint.confirmReload()
                    takeKick()
                    continue
                }
                if isComplete {
                    // A stopped thread holds no table, so that no other thread has to wait for it to release one.
                    tables = AddressTables()
                    pausePoint.stop { ending.isStopping }
                    takeKick()
                    tables = currentTables
                    continue
                }
                // The next run only completes the instruction.
                cpu.immediateExit.request(true)
            }
            do throws(KVMError) {
                let exit = try cpu.runGuest()
                exits?.count(exit)
                isComplete = false
                switch exit {
                case .interrupted: isComplete = true
                case .debug(let event) where pausePoint.hasDebugger:
                    pausePoint.report(.debug(event))
                    isComplete = true
                default:
                    guard let end = try handle(exit, tables) else { continue }
                    // A last look, before nothing is left to look at.
                    if end.isCrash, pausePoint.hasDebugger {
                        tables = AddressTables()
                        let goesOn = pausePoint.reportFailure(
                            end.sentence ?? "", isEmulation: end.isEmulationFailure, until: { ending.isStopping })
                        tables = currentTables
                        if goesOn {
                            isComplete = true
                            takeKick()
                            continue
                        }
                    }
                    ending.post(end)
                }
            } catch {
                ending.post(.hostError(error.description))
            }
        }
    }

    private var currentTables: AddressTables { AddressTables(ports: ports.table, mmio: mmio.table) }

    /// Takes a kick that has done its work. The reason of a later kick is stored before it, and the loop looks again:
    /// the flag must be cleared before that.
    private func takeKick() {
        cpu.immediateExit.request(false)
        atomicMemoryFence(ordering: .sequentiallyConsistent)
    }

    /// - Returns: how the machine ends, if the exit ends it.
    private func handle(_ exit: Exit, _ tables: borrowing AddressTables) throws(KVMError) -> MachineEnd? {
        switch exit {
        case .port(let access): tables.ports?.handle(access)
        case .mmio(let access): tables.mmio?.handle(access)
        case .interrupted: break
        case .shutdown: return .tripleFault(cpu: cpu.id, state: dump(instruction: []))
        case .systemEvent(type: UInt32(KVM_SYSTEM_EVENT_SHUTDOWN)): return .powerOff
        case .systemEvent(type: UInt32(KVM_SYSTEM_EVENT_RESET)): return .reset
        case .systemEvent(type: UInt32(KVM_SYSTEM_EVENT_CRASH)): return unexpected("a crash that the guest reported")
        case .systemEvent(let type): return unexpected("KVM_EXIT_SYSTEM_EVENT of type \(type)")
        case .internalError(let error):
            return .internalError(cpu: cpu.id, error, state: dump(instruction: error.instruction))
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
        // AMD-V leaves nothing of a vCPU that shut down: KVM gives it the values of a processor that was just switched
        // on.
        let isReset = r.rip == 0xfff0 && system.cs.base == 0xffff_0000
        let note =
            isReset ? "  (KVM resets the vCPU after a triple fault on AMD-V: these are not the guest's values)\n" : ""
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
