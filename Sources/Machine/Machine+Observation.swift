internal import Devices
internal import GuestMemory
internal import KVM
internal import Linux

/// What watches a machine from outside: a debugger, and the counting of its exits.
extension Machine {
    // MARK: Debugger

    static func makeDebugServer(_ address: Configuration.Debugger) throws(MachineError) -> DebugServer {
        do throws(SystemCallError) { return try DebugServer(address) } catch { throw .debugger(address, error) }
    }

    static func makeSeat(_ server: DebugServer) throws(MachineError) -> DebugSeat {
        try host("make an eventfd") { () throws(SystemCallError) in try DebugSeat(parked: server.parked) }
    }

    /// For the user: where a debugger connects; nil without one.
    public var debuggerAnnouncement: String? { debugger?.announcement }

    /// Lets debuggers in. What its thread gets has no reference to the machine, which would otherwise live as long as the thread does.
    func startDebugger() throws(MachineError) {
        guard let debugger else { return }
        let monitor = DebugMonitor(
            status: { [configuration, memory, devices] in MachineStatus(configuration, memory, devices).description },
            pressPowerButton: { [power] in power.requestPowerOff() },
            exits: configuration.countsExits ? makeExitTable : nil)
        let makeTarget: @Sendable () -> MachineDebugTarget = { [cpus, memory, ending, holdsInterrupts] in
            MachineDebugTarget(
                cpus, ram: memory.ram, ending: ending, lookAgain: { debugger.parked.signal() }, holdsInterrupts: holdsInterrupts, monitor: monitor)
        }
        do throws(SystemCallError) { try debugger.start(ending: ending, makeTarget) } catch {
            stop(.hostError("the debugger's thread could not be started: \(error)"))
            _ = finish()
            throw .host(purpose: "start a thread for the debugger", error)
        }
    }

    // MARK: Exits

    /// Prints the exits to user space so far.
    private var makeExitTable: @Sendable () -> String {
        { [cpus, ports, mmio] in
            ExitReport(tables: cpus.compactMap { $0.exits?.table }, device: { ExitReport.device(at: $0, ports, mmio) }).userSpace + "\n"
        }
    }

    /// The exits to user space and what KVM has counted besides, in two tables; nil unless the configuration asked for it. At any time.
    public var exitReport: String? {
        guard configuration.countsExits else { return nil }
        return makeExitTable() + "\n" + kernelReport
    }

    private var kernelReport: String {
        do throws(KVMError) {
            let machine = try virtualMachine.counters()
            var counters: [[KVMCounter]] = []
            for cpu in cpus { counters.append(try cpu.cpu.counters()) }
            return ExitReport.kernel(machine: machine, cpus: counters)
        } catch {
            return "what the kernel counts is not to be had: \(error) (KVM_CAP_BINARY_STATS_FD, Linux 5.14 and later)"
        }
    }
}
