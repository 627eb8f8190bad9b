// SPDX-License-Identifier: Apache-2.0

internal import CSandbox

extension Sandbox {
    /// Confines all threads of the process, with no_new_privs, to what any thread of a machine needs. With ``Mode/on``
    /// the process first releases what a running machine does not need: descriptors that it inherited and has not taken
    /// over, core files, the access of the user's other processes to its memory, a umask of the user's.
    ///
    /// SIGSYS must not be blocked in a thread: its handler drops the thread's privileges, and a call that is refused
    /// while it is blocked ends the process without a report.
    /// - Parameters:
    ///   - names: what is still looked up by name.
    ///   - user: who the process becomes; nil for none.
    /// - Throws: when a part that was asked for by name is unavailable. Other unavailable parts are in ``missing``.
    public mutating func enter(names: Names = Names(), user: User? = nil) throws(Refusal) {
        guard mode != .off else { return }
        // The handler copies the prefix.
        let handler = unsafe csandbox_report("swkvm: sandbox: ", mode == .report ? -1 : Self.exitStatus)
        guard handler == 0 else { throw Refusal(part: .seccomp, errno: handler) }
        // Metrics are for a collector, which may be another user.
        if mode == .on { csandbox_reduce(needs.contains(.metricsFile) ? 0 : 1) }
        var words: [String] = []
        let needs = needs
        var machine = machine
        let namespaces = try entering(.namespaces) { () throws(Refusal) in try Self.enterNamespaces(needs) }
        if let namespaces { words.append(namespaces) }
        // Before the user changes, who may look for less.
        let ruleset: Ruleset? = try entering(.landlock) { () throws(Refusal) -> Ruleset in try Ruleset(names) }
        let kept = Self.keptCapabilities(names)
        try dropPrivileges(user, kept: kept, ruleset, &words)
        // After a change of the user the kernel has set it again.
        if mode == .on { csandbox_hide() }
        let filters: Void? = try entering(.seccomp) { () throws(Refusal) in
            // Only read.
            let status = unsafe csandbox_confine_process(&machine)
            if status != 0 { throw Refusal(part: .seccomp, errno: status) }
        }
        hasFilters = filters != nil
        if hasFilters { words.append("seccomp") }
        summary = mode.rawValue + (mode == .report ? "" : " (\(words.joined(separator: ", ")))")
    }

    /// Enters a part if it is wanted. Returns nil if it is not wanted, or is unavailable.
    private mutating func entering<Answer>(
        _ part: Part, _ body: () throws(Refusal) -> Answer
    ) throws(Refusal) -> Answer? {
        guard policy.wants(part) else { return nil }
        do throws(Refusal) { return try body() } catch {
            if policy.requires(part) { throw error }
            missing.append(error)
            return nil
        }
    }

    private static func enterNamespaces(_ needs: Needs) throws(Refusal) -> String {
        // A connection is made again in the network where it was, perhaps by a name in a file.
        let isRemote = needs.contains(.remoteDisk)
        // A UNIX socket is found by its name in any network.
        let keepsFiles = isRemote || needs.contains(.vsock)
        let status = csandbox_separate(keepsFiles ? 0 : 1, isRemote ? 0 : 1)
        if status != 0 { throw Refusal(part: .namespaces, errno: status) }
        return "namespaces (\(keepsFiles ? "" : "mount, ")\(isRemote ? "" : "net, ")ipc, uts, cgroup)"
    }

    /// Capabilities that the machine needs later: to replace a file in another user's directory, or to remove a
    /// directory from one that is otherwise not writable, as the root of the control groups is on some hosts.
    private static func keptCapabilities(_ names: Names) -> UInt64 {
        (names.replaced + names.emptied).contains { csandbox_needs_override($0) != 0 }
            ? 1 << UInt64(CAP_DAC_OVERRIDE) : 0
    }

    private mutating func dropPrivileges(
        _ user: User?, kept: UInt64, _ ruleset: Ruleset?, _ words: inout [String]
    ) throws(Refusal) {
        guard mode == .on else { return }
        let drops = policy.wants(.capabilities), number = ruleset?.number ?? -1
        var rights = csandbox_rights(
            ruleset: number, drops_capabilities: drops ? 1 : 0, kept: kept, user: user?.id ?? 0,
            group: user?.group ?? 0)
        var userStatus: Int32 = 0
        // The first is only read, the second written.
        let status = unsafe csandbox_drop_privileges(&rights, &userStatus)
        if number >= 0 { close(number) }
        if let user, try entering(.user, { () throws(Refusal) in try Self.check(userStatus, of: .user) }) != nil {
            words.append("user \(user.name)")
        }
        if try entering(.capabilities, { () throws(Refusal) in try Self.check(status, of: .capabilities) }) != nil {
            words.append(kept == 0 ? "no capabilities" : "CAP_DAC_OVERRIDE only")
        }
        guard let ruleset else { return }
        if try entering(.landlock, { () throws(Refusal) in try Self.check(status, of: .landlock) }) != nil {
            words.append("Landlock \(ruleset.version)")
        }
    }

    private static func check(_ status: Int32, of part: Part) throws(Refusal) {
        if status != 0 { throw Refusal(part: part, errno: status) }
    }

    /// Landlock's rules.
    struct Ruleset {
        /// A descriptor, which its owner closes.
        let number: Int32
        let version: Int32

        init(_ names: Names) throws(Refusal) {
            version = csandbox_landlock_version()
            guard version > 0 else { throw Refusal(part: .landlock, errno: version == 0 ? ENOSYS : -version) }
            let replacing = CSANDBOX_WRITE_FILE.rawValue | CSANDBOX_MAKE_FILE.rawValue | CSANDBOX_REMOVE_FILE.rawValue
            let reading = CSANDBOX_READ_FILE.rawValue | CSANDBOX_READ_DIRECTORY.rawValue
            var places = names.replaced.map { csandbox_place(descriptor: $0, access: UInt64(replacing)) }
            let removing = UInt64(CSANDBOX_REMOVE_DIRECTORY.rawValue)
            places += names.emptied.map { csandbox_place(descriptor: $0, access: removing) }
            var opened: [Int32] = []
            for path in names.read {
                // A text that ends with a NUL, for the call.
                let descriptor = unsafe csandbox_name(path)
                guard descriptor >= 0 else { continue }
                opened.append(descriptor)
                places.append(csandbox_place(descriptor: descriptor, access: UInt64(reading)))
            }
            let ports = names.ports ?? []
            // Only read; as many as there are.
            number = unsafe csandbox_landlock_ruleset(
                version, &places, places.count, ports, ports.count, names.ports == nil ? 1 : 0)
            for descriptor in opened { close(descriptor) }
            if number < 0 { throw Refusal(part: .landlock, errno: -number) }
        }

        /// Directories of which files may be removed.
        init(removingIn directories: [Int32]) throws(Refusal) {
            version = csandbox_landlock_version()
            guard version > 0 else { throw Refusal(part: .landlock, errno: version == 0 ? ENOSYS : -version) }
            var places = directories.map {
                csandbox_place(descriptor: $0, access: UInt64(CSANDBOX_REMOVE_FILE.rawValue))
            }
            // Only read; as many as there are.
            number = unsafe csandbox_landlock_ruleset(version, &places, places.count, nil, 0, 0)
            if number < 0 { throw Refusal(part: .landlock, errno: -number) }
        }
    }

    // MARK: Availability

    /// Indicates whether the kernel takes filters. Nothing is changed.
    public static var hasFilters: Bool {
        var action = UInt32(SECCOMP_RET_TRAP)
        // The kernel reads the one word.
        return unsafe csandbox_has_action(&action) != 0
    }

    /// The version of Landlock, or why there is none. Nothing is changed.
    public static var landlock: Result<Int, Refusal> {
        let version = csandbox_landlock_version()
        return version > 0
            ? .success(Int(version)) : .failure(Refusal(part: .landlock, errno: version == 0 ? ENOSYS : -version))
    }

    /// Why a process of this user's gets no namespaces; nil if it does. A child process tries.
    public static var namespacesRefusal: Refusal? {
        let status = csandbox_can_separate()
        return status == 0 ? nil : Refusal(part: .namespaces, errno: status)
    }
}
