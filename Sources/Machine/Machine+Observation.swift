// SPDX-License-Identifier: Apache-2.0

internal import Devices
internal import GuestMemory
internal import KVM
internal import Linux
internal import Logging

/// What watches a machine from outside: a debugger, and the counting of its exits.
extension Machine {
    // MARK: Debugger

    static func makeDebugServer(
        _ address: Configuration.Debugger, log: Logger
    ) throws(MachineError) -> DebugServer {
        do throws(SystemCallError) { return try DebugServer(address, log: log) } catch {
            throw .debugger(address, error)
        }
    }

    /// The message about the debugger that the guest waits for; nil if it does not wait.
    public var debuggerAnnouncement: String? { board.waitsForDebugger ? debugger?.announcement : nil }

    /// Indicates whether a vCPU is stopped for the debugger.
    var isStoppedByDebugger: Bool { board.cpus.contains { $0.pausePoint.isRequested(for: .debugger) } }

    /// Lets debuggers in. What its thread gets has no reference to the machine, which would otherwise live as long as
    /// the thread does.
    func startDebugger(_ board: Board) throws(MachineError) {
        guard let debugger else { return }
        let monitor = DebugMonitor(
            control: control,
            exits: configuration.countsExits ? makeExitTable : nil)
        let makeTarget: @Sendable () -> MachineDebugTarget = { [memory] in
            MachineDebugTarget(
                board.cpus, ram: memory.ram, lookAgain: { debugger.stopped.event.signal() },
                holdsInterrupts: board.holdsInterrupts, monitor: monitor)
        }
        do throws(SystemCallError) { try debugger.start(ending: ending, makeTarget) } catch {
            control.end(.hostError("the debugger's thread could not be started: \(error)"))
            _ = waitForEnd()
            throw .host(purpose: "start a thread for the debugger", error)
        }
    }

    // MARK: Exits

    /// Prints the exits to user space so far.
    private var makeExitTable: @Sendable () -> String {
        { [parts, board] in
            ExitReport(
                tables: parts.exits.map(\.table),
                device: { ExitReport.device(at: $0, board.ports.table, board.registry.map.table) }
            ).userSpace + "\n"
        }
    }

    /// The exits to user space, and what KVM has counted besides since the last reset, in two tables; nil unless the
    /// configuration requests it. At any time.
    public var exitReport: String? {
        guard configuration.countsExits else { return nil }
        return makeExitTable() + "\n" + kernelReport
    }

    private var kernelReport: String {
        do throws(KVMError) {
            let board = self.board
            let machine = try board.virtualMachine.counters()
            var counters: [[KVMCounter]] = []
            for cpu in board.cpus { counters.append(try cpu.cpu.counters()) }
            return ExitReport.kernel(machine: machine, cpus: counters)
        } catch {
            return "the kernel's statistics are unavailable: \(error) (KVM_CAP_BINARY_STATS_FD, Linux 5.14 and later)"
        }
    }
}
