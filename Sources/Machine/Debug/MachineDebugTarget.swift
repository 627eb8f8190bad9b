// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import GDBRemote
internal import GuestMemory
internal import KVM

/// A machine as its debugger sees it: vCPU n is thread n + 1. It lives on the debugger's thread (``DebugServer``),
/// which owns the state of every stopped vCPU and all breakpoints.
final class MachineDebugTarget: DebugTarget {
    let cpus: [CPUThread]
    let ram: GuestRAM
    /// What `monitor` may ask of the machine.
    let monitor: DebugMonitor

    /// Makes ``nextStop()`` be asked again.
    private let lookAgain: () -> Void
    private let holdsInterrupts: Bool
    private var instructions: BreakpointInstructions
    private var debugRegisters = DebugRegisterSet()
    /// The last action requested of each vCPU.
    private var plan: [ResumeAction]
    /// Exceptions that were the guest's own, which each vCPU gets when it continues.
    private var injections: [GuestDebug.Injection?]
    /// All vCPUs are being stopped: because the debugger wants it, or because one of them has.
    private var isStopping = false
    private var isInterrupted = false
    private var lastThread = 1
    /// Indicates whether a debugger's visit has begun and not been ended by ``detach()``.
    private(set) var isAttached = false

    /// - Parameters:
    ///   - cpus: each with a pause point that has the debugger as an observer.
    ///   - lookAgain: signals what the pause points signal.
    ///   - holdsInterrupts: whether KVM can hold interrupts back while a vCPU steps.
    init(
        _ cpus: [CPUThread], ram: GuestRAM, lookAgain: @escaping () -> Void, holdsInterrupts: Bool,
        monitor: DebugMonitor
    ) {
        self.cpus = cpus
        self.ram = ram
        self.lookAgain = lookAgain
        self.holdsInterrupts = holdsInterrupts
        self.monitor = monitor
        instructions = BreakpointInstructions(ram)
        plan = cpus.map { _ in .run }
        injections = cpus.map { _ in nil }
    }

    // MARK: Stopping

    /// A debugger connects: everything stops, which ``nextStop()`` reports.
    func attach() {
        isAttached = true
        interrupt()
    }

    func interrupt() {
        isInterrupted = true
        stopAll()
    }

    private func stopAll() {
        isStopping = true
        for cpu in cpus where cpu.pausePoint.request(.debugger) { cpu.kick() }
        // They may all be stopped already.
        lookAgain()
    }

    /// Called whenever a vCPU has stopped. When all have, and one has a reason to report, this is it; until the next
    /// ``resume(_:)`` all stay.
    func nextStop() -> DebugStop? {
        if !isStopping, cpus.contains(where: { $0.pausePoint.event != nil }) { stopAll() }
        guard isStopping, cpus.allSatisfy({ $0.pausePoint.isStopped }) else { return nil }
        isStopping = false
        var best: (index: Int, reason: DebugStop.Reason)?
        for index in cpus.indices {
            guard let reason = reason(of: index) else { continue }
            if best.map({ Self.rank(reason) > Self.rank($0.reason) }) ?? true { best = (index, reason) }
        }
        defer { isInterrupted = false }
        guard let best else {
            if isInterrupted { return DebugStop(thread: lastThread, reason: .interrupt) }
            // It was the guest's own exception: on as before.
            resume(plan)
            return nil
        }
        for index in cpus.indices where index == best.index || !isKept(index) { _ = cpus[index].pausePoint.takeEvent() }
        lastThread = best.index + 1
        return DebugStop(thread: lastThread, reason: best.reason)
    }

    /// What a vCPU's event means to the debugger; nil when it has none, or none of the debugger's.
    private func reason(of index: Int) -> DebugStop.Reason? {
        let pausePoint = cpus[index].pausePoint
        guard let event = pausePoint.event else { return nil }
        switch event {
        case .failure(let sentence, let isEmulation):
            // Where KVM interprets ring 0 without knowing `int3`, a breakpoint comes this way.
            guard isEmulation, isAtBreakpoint(index) else { return .failure(sentence) }
            pausePoint.forgive()
            return .softwareBreakpoint
        case .debug(let event) where event.exception == 3:
            if let address = cpus[index].cpu.translate(event.instruction), instructions.contains(GuestAddress(address))
            {
                return .softwareBreakpoint
            }
            injections[index] = .breakpoint
        case .debug(let event):
            for register in 0..<4 where event.status >> UInt64(register) & 1 != 0 {
                guard let breakpoint = debugRegisters.breakpoint(at: register) else { continue }
                return breakpoint.kind == .hardware
                    ? .hardwareBreakpoint : .watchpoint(breakpoint.kind, address: breakpoint.address)
            }
            if plan[index] == .step { return .step }
            injections[index] = .debug
        }
        _ = pausePoint.takeEvent()
        return nil
    }

    private func isAtBreakpoint(_ index: Int) -> Bool {
        guard let registers = try? cpus[index].cpu.registers(), let system = try? cpus[index].cpu.systemRegisters()
        else { return false }
        return cpus[index].cpu.translate(system.cs.base &+ registers.rip).map {
            instructions.contains(GuestAddress($0))
        } ?? false
    }

    private static func rank(_ reason: DebugStop.Reason) -> Int {
        switch reason {
        case .failure: 4
        case .watchpoint: 3
        case .softwareBreakpoint, .hardwareBreakpoint: 2
        case .step: 1
        case .interrupt: 0
        }
    }

    /// Indicates whether an event that is not reported now is reported next time. A vCPU in front of a breakpoint comes
    /// to it again; one that is past a watched access does not.
    private func isKept(_ index: Int) -> Bool {
        switch reason(of: index) {
        case .failure, .watchpoint: true
        default: false
        }
    }

    // MARK: Resuming

    func resume(_ actions: [ResumeAction]) {
        plan = actions
        if zip(cpus, actions).contains(where: { $1 != .stay && $0.pausePoint.event != nil }) {
            // Nothing runs before it is reported.
            isStopping = true
            lookAgain()
            return
        }
        for (index, action) in actions.enumerated() where action != .stay { release(index, action) }
    }

    private func release(_ index: Int, _ action: ResumeAction) {
        var debug = GuestDebug()
        debug.isStepping = action == .step
        debug.holdsInterrupts = debug.isStepping && holdsInterrupts
        debug.takesBreakpointInstructions = !instructions.isEmpty
        debug.debugRegisters = debugRegisters.value
        debug.injection = injections[index]
        injections[index] = nil
        do throws(KVMError) { try cpus[index].cpu.setDebug(debug) } catch {
            // The vCPU stays where it is, and reports that.
            cpus[index].pausePoint.report(.failure(error.description, isEmulation: false))
            return lookAgain()
        }
        cpus[index].pausePoint.release(.debugger)
    }

    func detach() {
        isAttached = false
        instructions.removeAll()
        debugRegisters = DebugRegisterSet()
        for cpu in cpus { _ = cpu.pausePoint.takeEvent() }
        isStopping = false
        resume(cpus.map { _ in .run })
    }

    func kill() { monitor.control.end(.killed) }

    // MARK: State

    var threadCount: Int { cpus.count }

    func describe(thread: Int) -> String {
        guard let cpu = cpu(thread) else { return "" }
        return "vCPU \(thread - 1), \(Self.state(cpu))"
    }

    /// What the vCPU would do if it were not stopped.
    static func state(_ cpu: CPUThread) -> String {
        switch Int32(bitPattern: (try? cpu.cpu.mpState()) ?? .max) {
        case KVM_MP_STATE_RUNNABLE: "running"
        case KVM_MP_STATE_HALTED: "halted"
        case KVM_MP_STATE_UNINITIALIZED: "waits for INIT"
        case KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_SIPI_RECEIVED: "waits for SIPI"
        default: "state unknown"
        }
    }

    private func cpu(_ thread: Int) -> CPUThread? { cpus.indices.contains(thread - 1) ? cpus[thread - 1] : nil }

    func registers(of thread: Int) throws(DebugTargetError) -> RegisterFile {
        guard let cpu = cpu(thread) else { throw .refused }
        do throws(KVMError) { return try cpu.cpu.debugRegisters() } catch { throw .refused }
    }

    func setRegisters(_ file: RegisterFile, changing numbers: [Int], of thread: Int) throws(DebugTargetError) {
        guard let cpu = cpu(thread) else { throw .refused }
        try cpu.cpu.setDebugRegisters(file, changing: numbers)
    }

    // MARK: Memory

    func readMemory(at address: UInt64, count: Int, thread: Int) throws(DebugTargetError) -> [UInt8] {
        var bytes: [UInt8] = []
        for piece in pieces(of: address, count: count, thread: thread) {
            guard let physical = piece.physical, let more = try? instructions.read(at: physical, count: piece.count)
            else { break }
            bytes += more
        }
        if bytes.isEmpty { throw .unmapped }
        return bytes
    }

    func writeMemory(_ bytes: [UInt8], at address: UInt64, thread: Int) throws(DebugTargetError) {
        let pieces = pieces(of: address, count: bytes.count, thread: thread)
        for piece in pieces {
            guard let physical = piece.physical, ram.contains(physical, count: UInt64(piece.count)) else {
                throw .unmapped
            }
        }
        var rest = bytes[...]
        for piece in pieces {
            if let physical = piece.physical { try instructions.write(rest.prefix(piece.count), at: physical) }
            rest = rest.dropFirst(piece.count)
        }
    }

    /// The guest-physical address that a virtual one means to a thread; nil where nothing is mapped.
    func physical(_ address: UInt64, thread: Int) -> GuestAddress? {
        pieces(of: address, count: 1, thread: thread).first?.physical
    }

    /// A range of virtual addresses, cut at the pages' borders.
    private func pieces(of address: UInt64, count: Int, thread: Int) -> [(physical: GuestAddress?, count: Int)] {
        guard let cpu = cpu(thread), let system = try? cpu.cpu.systemRegisters() else { return [] }
        var pieces: [(GuestAddress?, Int)] = []
        var address = address
        var rest = count
        while rest > 0 {
            let size = min(rest, 4096 - Int(address & 4095))
            let isPossible = Self.isCanonical(address, system)
            pieces.append((isPossible ? cpu.cpu.translate(address).map { GuestAddress($0) } : nil, size))
            address &+= UInt64(size)
            rest -= size
        }
        return pieces
    }

    /// Indicates whether the processor would take the address at all; KVM's walk of the page tables looks only at the
    /// bits that they have.
    private static func isCanonical(_ address: UInt64, _ system: kvm_sregs) -> Bool {
        let longModeActive: UInt64 = 1 << 10, fiveLevels: UInt64 = 1 << 12
        guard system.efer & longModeActive != 0 else { return address >> 32 == 0 }
        let unused: UInt64 = system.cr4 & fiveLevels != 0 ? 7 : 16
        return UInt64(bitPattern: Int64(bitPattern: address << unused) >> Int64(unused)) == address
    }

    // MARK: Breakpoints

    func insert(_ breakpoint: Breakpoint, thread: Int) throws(DebugTargetError) {
        guard breakpoint.kind == .software else { return try debugRegisters.insert(breakpoint) }
        guard let physical = physical(breakpoint.address, thread: thread) else { throw .unmapped }
        try instructions.insert(breakpoint, at: physical)
    }

    func remove(_ breakpoint: Breakpoint) throws(DebugTargetError) {
        if breakpoint.kind == .software { instructions.remove(breakpoint) } else { debugRegisters.remove(breakpoint) }
    }
}
