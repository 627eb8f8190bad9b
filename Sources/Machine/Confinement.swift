// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Devices
internal import DiskImage
internal import Glibc
internal import Linux
public import Sandbox

/// How a machine's process is confined, from the moment on when everything is open.
struct Confinement {
    let sandbox: Sandbox
    /// Reverts the changes on the host at the end; nil if there are none.
    private let broker: Broker?

    /// Starts the broker, if there is work for it, and confines the process and all of its threads.
    init(
        _ configuration: Configuration, _ machine: Machine, _ console: Console, _ metrics: MetricsReporter?,
        _ process: ProcessFile?, _ remote: RemoteSession?, _ group: Int32?, _ terminal: RawTerminal.State
    ) throws(MachineError) {
        guard configuration.sandbox.mode != .off else {
            (sandbox, broker) = (.off, nil)
            return
        }
        var needs = configuration.sandboxNeeds
        switch terminal {
        case .none: break
        case .elsewhere: needs.insert(.laterTerminal)
        case .guarded: needs.insert(.terminal)
        }
        var policy = configuration.sandbox
        if configuration.runAs != nil { policy = policy.requiring(.user) }
        do throws(Sandbox.Refusal) {
            broker = try Self.startBroker(policy, machine, console, process, remote)
            if broker != nil { needs.insert(.broker) }
            var sandbox = Sandbox(policy, needs: needs)
            try sandbox.enter(
                names: configuration.sandboxNames(metrics?.directory, group),
                user: configuration.machineUser(policy, needs))
            self.sandbox = sandbox
        } catch { throw .sandbox(error) }
    }

    /// Warnings to print once: parts that are missing.
    var warnings: [String] {
        sandbox.missing.map { "warning: the sandbox has no \($0.part.rawValue): \($0.reason)" }
    }

    /// Starts the process that reverts the changes on the host at the machine's end.
    func end() { broker?.finish() }

    private static func startBroker(
        _ policy: Sandbox.Policy, _ machine: Machine, _ console: Console, _ process: ProcessFile?,
        _ remote: RemoteSession?
    ) throws(Sandbox.Refusal) -> Broker? {
        let listeners = [
            console.listener, machine.debugger?.listener, machine.parts.vsockListener, remote?.listener,
        ].compactMap { $0 }.filter { $0.directory != nil }
        let networks = machine.parts.devices.all.compactMap { $0.device as? NetworkDevice }
            .filter { !$0.restoringDescriptors.isEmpty }
        var work = Broker.Work()
        work.directories = listeners.compactMap(\.directory) + (process.map { [$0.directory.rawValue] } ?? [])
        work.descriptors = networks.flatMap(\.restoringDescriptors) + work.directories
        work.changesNetwork = !networks.isEmpty
        guard !work.isEmpty else { return nil }
        let broker = try Broker(policy, work) {
            for network in networks.reversed() { network.restoreHost() }
            for listener in listeners { listener.removeFile() }
            process?.removeName()
        }
        for network in networks { network.delegateRestoring() }
        for listener in listeners { listener.delegateFile() }
        process?.delegateRemoval()
        return broker
    }
}

extension Configuration {
    /// What the machine has, besides a terminal, that needs system calls of its own while it runs.
    var sandboxNeeds: Sandbox.Needs {
        var needs: Sandbox.Needs = []
        for disk in disks {
            // Only this setting lets a local image have a remote backing file that is no disk of the machine too.
            let mayBeRemote = disk.options.namedFiles.isAnywhere
            if mayBeRemote || DiskImage.isRemote(disk.path) { needs.insert(.remoteDisk) }
            if mayBeRemote || DiskImage.isEncryptedRemote(disk.path) { needs.insert(.remoteTLS) }
        }
        if metrics?.format == .prometheus { needs.insert(.metricsFile) }
        if controlGroup != nil { needs.insert(.controlGroup) }
        if vsock != nil { needs.insert(.vsock) }
        if consoleLimits.file != nil { needs.insert(.rotatedFile) }
        return needs
    }

    /// What is still looked up by name.
    /// - Parameters:
    ///   - directory: that of a file of metrics that is replaced.
    ///   - group: the directory of the machine's control group.
    func sandboxNames(_ directory: Int32?, _ group: Int32?) -> Sandbox.Names {
        var names = Sandbox.Names()
        if let directory { names.replaced = [directory] }
        if let group { names.emptied = [group] }
        guard sandboxNeeds.contains(.remoteDisk) else { return names }
        if sandboxNeeds.contains(.remoteTLS) { names.read = DiskImage.filesOfTLS }
        for disk in disks {
            guard !disk.options.namedFiles.isAnywhere else {
                names.ports = nil
                continue
            }
            let server = DiskImage.server(ofRemote: disk.path)
            if let port = server.port { names.ports?.append(port) }
            names.read += server.files
        }
        // Over TCP where an answer of a name server is long.
        if sandboxNeeds.contains(.remoteTLS) { names.ports?.append(53) }
        return names
    }

    /// The user that a process of root switches to; nil to stay root.
    fileprivate func machineUser(_ policy: Sandbox.Policy, _ needs: Sandbox.Needs) -> Sandbox.User? {
        if let runAs { return runAs }
        guard policy.wants(.user), Sandbox.User.canChange else { return nil }
        // Files of another user are looked up by name: of a server's socket or key, of a port of a vsock device, of
        // metrics, of a control group.
        if !policy.requires(.user), !needs.isDisjoint(with: [.remoteDisk, .vsock, .metricsFile, .controlGroup]) {
            return nil
        }
        for disk in disks where !DiskImage.isRemote(disk.path) {
            guard let status = fileStatus(ofPath: disk.path), status.st_uid != 0 else { continue }
            return Sandbox.User(id: status.st_uid, group: status.st_gid, name: "\(status.st_uid)")
        }
        return .nobody
    }
}

extension Sandbox.User {
    /// A user by name, as /etc/passwd has it, or by number: `USER` or `UID:GID`.
    /// - Returns: nil for one that there is not, and for root.
    public init?(named text: String) {
        let numbers = text.split(separator: ":", omittingEmptySubsequences: false)
        if numbers.count == 2, let id = UInt32(numbers[0]), let group = UInt32(numbers[1]), id != 0, id != .max,
            group != .max
        {
            self.init(id: id, group: group, name: text)
            return
        }
        let table = (try? readFile("/etc/passwd", limit: 1 << 20)) ?? []
        for line in table.split(separator: UInt8(ascii: "\n")) {
            let fields = line.split(separator: UInt8(ascii: ":"), omittingEmptySubsequences: false)
                .map { String(decoding: $0, as: UTF8.self) }
            guard fields.count >= 4, fields[0] == text || fields[2] == text, let id = UInt32(fields[2]),
                let group = UInt32(fields[3]), id != 0
            else { continue }
            self.init(id: id, group: group, name: fields[0])
            return
        }
        return nil
    }
}
