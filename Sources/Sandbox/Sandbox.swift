// SPDX-License-Identifier: Apache-2.0

internal import CSandbox

/// Confines the process to the system calls that its machine makes while it runs, and each kind of thread to its own.
///
/// The calls are listed in Sources/CSandbox/SystemCalls.c. A filter cannot be taken away: it stays until the process
/// ends, and every thread that is started later inherits it.
public struct Sandbox: Sendable {
    /// What happens with a system call that is not in the list.
    public enum Mode: String, CaseIterable, Sendable {
        /// There is no filter.
        case off
        /// It is reported in a line on standard error, and made.
        case report
        /// It is reported, not made, and the process ends.
        case on
    }

    /// What a machine has that needs system calls of its own while it runs.
    public struct Needs: OptionSet, Sendable {
        public let rawValue: UInt32
        public init(rawValue: UInt32) { self.rawValue = rawValue }
        private init(_ need: csandbox_need) { rawValue = 1 << need.rawValue }

        /// A terminal, which a child process restores.
        public static let terminal = Needs(CSANDBOX_TERMINAL)
        /// A terminal that is not the process's yet: the child process is made when it is.
        public static let laterTerminal = Needs(CSANDBOX_LATER_TERMINAL)
        /// A disk on a server: a connection that was lost is made again.
        public static let remoteDisk = Needs(CSANDBOX_REMOTE_DISK)
        /// The same, over TLS.
        public static let remoteTLS = Needs(CSANDBOX_REMOTE_TLS)
        /// A file of metrics that is replaced as a whole.
        public static let metricsFile = Needs(CSANDBOX_METRICS_FILE)
        /// A UNIX socket of its own, which is removed at the end.
        public static let socketFile = Needs(CSANDBOX_SOCKET_FILE)
        /// A console's file with a bound, whose contents move to others that are open.
        public static let rotatedFile = Needs(CSANDBOX_ROTATED_FILE)
        /// A control group of its own, which is removed at the end.
        public static let controlGroup = Needs(CSANDBOX_CONTROL_GROUP)
    }

    /// What a thread does; all others are confined as the process is.
    public enum Thread: Sendable {
        case vcpu
        /// Serves queues of a virtio device.
        case device
    }

    /// Why a process is not confined.
    public struct Refusal: Error, Equatable {
        /// An `errno` value: `ENOSYS` or `EINVAL` of a kernel without seccomp.
        public let errno: Int32
    }

    /// The exit status of a process that ended for a call that the sandbox does not allow: that of SIGSYS.
    public static let exitStatus: Int32 = 128 + SIGSYS

    /// No confinement.
    public static let off = Sandbox(.off, needs: [])

    public let mode: Mode
    private let needs: Needs
    private let machine: csandbox_machine

    /// - Parameter needs: what the machine has.
    public init(_ mode: Mode, needs: Needs) {
        self.mode = mode
        self.needs = needs
        machine = csandbox_machine(needs: needs.rawValue, process: getpid(), reports: mode == .report ? 1 : 0)
    }

    /// Confines all threads of the process, with no_new_privs, to what any thread of a machine may call. With
    /// ``Mode/on`` the process first gives up what a running machine does not need: descriptors that it inherited and
    /// has not taken over, core files, the access of the user's other processes to its memory, a umask of the user's.
    ///
    /// SIGSYS must not be blocked in a thread: a call that is refused there ends the process without a report.
    public func enter() throws(Refusal) {
        guard mode != .off else { return }
        // The handler copies the prefix.
        let handler = unsafe csandbox_report("swkvm: sandbox: ", mode == .report ? -1 : Self.exitStatus)
        guard handler == 0 else { throw Refusal(errno: handler) }
        // Metrics are for a collector, which may be another user.
        if mode == .on { csandbox_reduce(needs.contains(.metricsFile) ? 0 : 1) }
        var machine = machine
        // Only read.
        let status = unsafe csandbox_confine_process(&machine)
        if status != 0 { throw Refusal(errno: status) }
    }

    /// Confines the calling thread to the calls of its kind; for its first action. A thread that cannot be confined ends
    /// the process.
    public func confine(_ thread: Thread) {
        guard mode != .off else { return }
        let kind = thread == .vcpu ? CSANDBOX_VCPU.rawValue : CSANDBOX_DEVICE.rawValue
        var machine = machine
        // Only read.
        let status = unsafe csandbox_confine_thread(&machine, kind)
        if status != 0 { csandbox_end(status, Self.exitStatus) }
    }

    /// Indicates whether the kernel takes filters. Nothing is changed.
    public static var isAvailable: Bool {
        var action = UInt32(SECCOMP_RET_TRAP)
        // The kernel reads the one word.
        return unsafe csandbox_has_action(&action) != 0
    }
}
