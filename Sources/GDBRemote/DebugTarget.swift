// SPDX-License-Identifier: Apache-2.0

/// A machine under a debugger. Each of its processors is a thread to the debugger.
///
/// Threads are numbered from 1. But for ``interrupt()`` and ``kill()``, methods are called only while all of them are
/// stopped.
public protocol DebugTarget: AnyObject {
    var threadCount: Int { get }
    /// What `info threads` shows.
    func describe(thread: Int) -> String

    func registers(of thread: Int) throws(DebugTargetError) -> RegisterFile
    /// Sets the registers with these numbers from a file that ``registers(of:)`` gave; all or none.
    func setRegisters(_ file: RegisterFile, changing numbers: [Int], of thread: Int) throws(DebugTargetError)

    /// Reads memory by virtual addresses, as the thread has them mapped. What the debugger has put there is not seen.
    /// - Returns: as many bytes as can be read in a row, at least one.
    func readMemory(at address: UInt64, count: Int, thread: Int) throws(DebugTargetError) -> [UInt8]
    /// Writes all of it or nothing.
    func writeMemory(_ bytes: [UInt8], at address: UInt64, thread: Int) throws(DebugTargetError)

    /// Inserts a breakpoint for all threads; one that is there already stays as it is.
    func insert(_ breakpoint: Breakpoint, thread: Int) throws(DebugTargetError)
    /// Removes it; one that is not there is no error.
    func remove(_ breakpoint: Breakpoint) throws(DebugTargetError)

    /// Resumes threads, each by its action; those without one stay stopped. A stop is reported to the session later.
    func resume(_ actions: [ResumeAction])
    /// Asks running threads to stop, which is reported later.
    func interrupt()
    /// Removes all breakpoints and lets all threads continue.
    func detach()
    /// Ends the machine.
    func kill()

    /// Carries out a command for the machine's monitor; the thread is the one that the user has selected.
    /// - Returns: lines for the user.
    func monitor(_ command: String, thread: Int) -> String
}

/// The next action of one thread.
public enum ResumeAction: Sendable, Equatable {
    case stay
    case run
    case step
}

/// An error of a target, with the number that the protocol sends.
public enum DebugTargetError: Error, Equatable {
    /// An address that is not mapped to RAM. (EFAULT)
    case unmapped
    /// There is no more room, such as a fifth debug register. (ENOSPC)
    case noRoom
    /// The value or address is invalid. (EINVAL)
    case refused
    /// A feature that the processor does not have: the debugger is informed and does without it.
    case unsupported
}

/// A breakpoint or watchpoint at an address (packets `Z` and `z`).
public struct Breakpoint: Hashable, Sendable {
    public enum Kind: Int, Sendable {
        case software = 0
        case hardware
        case writeWatch
        case readWatch
        case accessWatch
    }

    public let kind: Kind
    /// Virtual.
    public let address: UInt64
    /// Bytes that are watched; of a breakpoint, the length of the instruction that is put there, 1.
    public let size: Int

    public init(kind: Kind, address: UInt64, size: Int) {
        self.kind = kind
        self.address = address
        self.size = size
    }
}

/// The reason for a stop, and the thread that caused it.
public struct DebugStop: Sendable, Equatable {
    public enum Reason: Sendable, Equatable {
        /// The debugger's Ctrl-C, or its arrival.
        case interrupt
        case step
        case softwareBreakpoint
        case hardwareBreakpoint
        /// The debug register's own kind and the address that is watched.
        case watchpoint(Breakpoint.Kind, address: UInt64)
        /// The machine is about to end; a sentence for the user.
        case failure(String)
    }

    /// The number of the thread, from 1.
    public let thread: Int
    public let reason: Reason

    public init(thread: Int, reason: Reason) {
        self.thread = thread
        self.reason = reason
    }
}

/// The way in which the machine ended.
public enum DebugEnd: Sendable, Equatable {
    case status(UInt8)
    case signal(UInt8)
}
