// SPDX-License-Identifier: Apache-2.0

internal import CSandbox

/// Confines the process to what its machine needs while it runs, and each kind of thread to its own system calls.
///
/// The calls are listed in Sources/CSandbox/SystemCalls.c. Nothing of it can be taken away: it stays until the process
/// ends, and every thread that is started later inherits it.
public struct Sandbox: Sendable {
    /// What happens with what a machine does not need.
    public enum Mode: String, CaseIterable, Sendable {
        /// There is no confinement.
        case off
        /// A system call that is not in the list is reported in a line on standard error, and made.
        case report
        /// It is reported, not made, and the process ends; other parts have calls fail.
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
        /// A console's file with a bound, whose contents move to others that are open.
        public static let rotatedFile = Needs(CSANDBOX_ROTATED_FILE)
        /// A control group of its own, which is removed at the end.
        public static let controlGroup = Needs(CSANDBOX_CONTROL_GROUP)
        /// A vsock device: connections are accepted, and made to sockets by name.
        public static let vsock = Needs(CSANDBOX_VSOCK)
        /// A ``Broker``.
        public static let broker = Needs(CSANDBOX_RESTORED)
    }

    /// What a machine still looks up by name while it runs.
    public struct Names: Sendable {
        /// Descriptors of directories where a file is replaced.
        public var replaced: [Int32] = []
        /// Descriptors of directories of which an empty directory is removed.
        public var emptied: [Int32] = []
        /// Files, and directories with all below them, that may be read.
        public var read: [String] = []
        /// TCP ports of servers; nil for any.
        public var ports: [UInt16]? = []

        public init() {}
    }

    /// Another user of the host's.
    public struct User: Equatable, Sendable {
        public let id: UInt32
        public let group: UInt32
        /// For messages.
        public let name: String

        public init(id: UInt32, group: UInt32, name: String) { (self.id, self.group, self.name) = (id, group, name) }

        /// The user without files: the kernel's overflow user.
        public static let nobody = User(id: 65_534, group: 65_534, name: "nobody")

        /// Indicates whether the process belongs to root, and may switch to another user.
        public static var canChange: Bool { geteuid() == 0 }
    }

    /// What a thread does; all others are confined as the process is.
    public enum Thread: Sendable {
        case vcpu
        /// Serves queues of a virtio device.
        case device
        /// The same, of a device that accepts and makes connections.
        case sockets
        /// Serves clients of the management API.
        case api
    }

    /// Why a part is not in force.
    public struct Refusal: Error, Equatable {
        public let part: Part
        public let errno: Int32

        /// A sentence's end: why.
        public var reason: String {
            switch (part, errno) {
            case (.seccomp, ENOSYS), (.seccomp, EINVAL): "this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)"
            case (.landlock, ENOSYS): "this kernel has no Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK)"
            case (.landlock, EOPNOTSUPP): "Landlock is not among the kernel's security modules (lsm=landlock,…)"
            case (.user, EINVAL): "this user namespace has no such user"
            case (.user, EPERM): "the process may not change its user"
            case (.namespaces, EPERM): "this host or container does not allow unprivileged user namespaces"
            case (.namespaces, ENOSPC): "their limit is reached (/proc/sys/user/max_*_namespaces)"
            case (.namespaces, EINVAL): "a thread that writes a file, for the console or --metrics, would stay outside"
            case (_, EBUSY): "a thread waits in the kernel"
            default: unsafe String(cString: strerror(errno))
            }
        }
    }

    /// The exit status of a process that ended for a call that the sandbox does not allow: that of SIGSYS.
    public static let exitStatus: Int32 = 128 + SIGSYS

    /// The exit status of a process that ended for a fault of its own (EX_SOFTWARE of `<sysexits.h>`).
    public static let faultStatus: Int32 = 70

    /// Has a fault of the process, in any thread, be reported on standard error before it ends with ``faultStatus``.
    public static func reportFaults() {
        // Fails for no argument of ours.
        _ = unsafe csandbox_report_faults("swkvm: ", faultStatus)
    }

    /// No confinement.
    public static let off = Sandbox(.off, needs: [])

    public let policy: Policy
    let needs: Needs
    let machine: csandbox_machine
    /// For the user: what is in force, as `on (user nobody, …)`; nil for nothing.
    public internal(set) var summary: String?
    /// Parts that were requested, and are not in force.
    public internal(set) var missing: [Refusal] = []
    var hasFilters = false

    public var mode: Mode { policy.mode }

    /// - Parameter needs: what the machine has.
    public init(_ policy: Policy, needs: Needs) {
        self.policy = policy
        self.needs = needs
        machine = csandbox_machine(
            needs: needs.rawValue, process: getpid(), reports: policy.mode == .report ? 1 : 0)
    }

    /// Confines the calling thread to the calls of its kind; for its first action. A thread that cannot be confined
    /// ends the process.
    public func confine(_ thread: Thread) {
        guard hasFilters else { return }
        switch thread {
        case .vcpu: confine(CSANDBOX_VCPU)
        case .device: confine(CSANDBOX_DEVICE)
        case .sockets: confine(csandbox_threads(CSANDBOX_DEVICE.rawValue | CSANDBOX_SOCKETS.rawValue))
        case .api: confine(CSANDBOX_API)
        }
    }

    func confine(_ kind: csandbox_threads) {
        var machine = machine
        // Only read.
        let status = unsafe csandbox_confine_thread(&machine, kind.rawValue)
        if status != 0 { csandbox_end(status, Self.exitStatus) }
    }
}
