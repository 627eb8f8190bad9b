// SPDX-License-Identifier: Apache-2.0

internal import CSandbox

/// A process that keeps the privileges to revert, at the machine's end, what was changed on the host for it: an
/// interface's bridge, a socket's file. The machine itself no longer has these rights.
///
/// It is asked for one thing only, which the end of a pipe says, however the machine ends: there is nothing else that
/// code of an attacker in the machine could ask it for.
public final class Broker {
    /// What it needs for its work.
    public struct Work: Sendable {
        /// Descriptors that it keeps.
        public var descriptors: [Int32] = []
        /// Directories, among those descriptors, of which files are removed.
        public var directories: [Int32] = []
        /// Indicates whether interfaces are changed.
        public var changesNetwork = false

        public init() {}
        public var isEmpty: Bool { descriptors.isEmpty }
    }

    private let process: Int32
    /// The write end of a pipe that only this process holds; -1 after its end.
    private var lifeline: Int32

    /// Starts it. Called while no other thread changes what `body` uses.
    /// - Parameter body: what it does at the end, with the descriptors that it keeps.
    /// - Throws: when the host gives no process.
    public init(_ policy: Sandbox.Policy, _ work: Work, _ body: () -> Void) throws(Sandbox.Refusal) {
        var ends: [Int32] = [-1, -1]
        // Two numbers are written.
        let status = unsafe csandbox_pipe(&ends)
        guard status == 0 else { throw Sandbox.Refusal(part: .seccomp, errno: status) }
        let kept = (work.descriptors + [ends[0]]).sorted()
        // Only read; as many as there are. `pkill swkvm` must not kill it, too: nothing would be taken back.
        process = unsafe csandbox_fork("vm-broker", kept, kept.count)
        lifeline = ends[1]
        if process == 0 {
            Self.confine(policy, work)
            csandbox_await_close(ends[0])
            body()
            _exit(0)
        }
        close(ends[0])
        if process < 0 {
            close(ends[1])
            throw Sandbox.Refusal(part: .seccomp, errno: -process)
        }
    }

    /// Has it do its work, and waits for it.
    public func finish() {
        guard lifeline >= 0 else { return }
        close(lifeline)
        lifeline = -1
        csandbox_await(process)
    }

    deinit { finish() }

    /// Leaves the process the rights for its work. A part that the host does not have is missing in the machine too,
    /// which says so.
    private static func confine(_ policy: Sandbox.Policy, _ work: Work) {
        guard policy.mode == .on else { return }
        let sandbox = Sandbox(policy, needs: [])
        _ = unsafe csandbox_report("swkvm: sandbox: ", Sandbox.exitStatus)
        csandbox_hide()
        var kept: UInt64 = work.changesNetwork ? 1 << UInt64(CAP_NET_ADMIN) : 0
        // A directory, and a file in it, may be another user's.
        if !work.directories.isEmpty { kept |= 1 << UInt64(CAP_DAC_OVERRIDE) | 1 << UInt64(CAP_FOWNER) }
        var rights = csandbox_rights(
            ruleset: -1, drops_capabilities: policy.wants(.capabilities) ? 1 : 0, kept: kept, user: 0, group: 0)
        if policy.wants(.landlock), let ruleset = try? Sandbox.Ruleset(removingIn: work.directories) {
            rights.ruleset = ruleset.number
        }
        var userStatus: Int32 = 0
        // The first is only read, the second written.
        _ = unsafe csandbox_drop_privileges(&rights, &userStatus)
        if policy.wants(.seccomp), Sandbox.hasFilters { sandbox.confine(CSANDBOX_BROKER) }
    }
}
