// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The networks of a host that machines are connected to: each is a bridge with a server of addresses and names, and
/// leads to the host's own networks by address translation.
///
/// There is no daemon that knows them all: a network that is up has a process of its own (``NetworkKeeper``), whose
/// lock tells whether it is.
public struct Networks: Sendable {
    public let directories: NetworkDirectories

    public init(_ directories: NetworkDirectories = .current) { self.directories = directories }

    func files(of name: NetworkName) -> NetworkFiles { NetworkFiles(name: name, directories: directories) }

    /// Indicates whether this process may have such networks, and the host the programs for them.
    public static var areAvailable: Bool {
        geteuid() == 0 && DNSMasq.find() != nil && HelperProgram.find("nft") != nil
    }

    // MARK: Definitions

    /// All that are defined, and `default`.
    public func names() -> [NetworkName] {
        let defined = directoryNames(directories.definitions).compactMap { file in
            file.hasSuffix(".toml") ? try? NetworkName(String(file.dropLast(5))) : nil
        }
        return Set(defined + [.standard]).sorted()
    }

    /// - Throws: `notDefined`, `badDefinition`.
    public func definition(of name: NetworkName) throws(NetworkError) -> NetworkDefinition {
        let path = files(of: name).definition
        let bytes: [UInt8]
        do throws(SystemCallError) { bytes = try readFile(path, limit: NetworkDefinition.limit) } catch {
            guard error.errno == ENOENT else { throw .system(purpose: "read", path: path, error) }
            guard name == .standard else { throw .notDefined(name) }
            return .standard
        }
        guard let definition = NetworkDefinition(text: String(decoding: bytes, as: UTF8.self)) else {
            throw .badDefinition(path: path)
        }
        return definition
    }

    /// Defines a network.
    /// - Parameters:
    ///   - bridge: nil for the first `swkvmN` that no other network has.
    ///   - subnet: nil for a range that is free when the network starts.
    public func define(
        _ name: NetworkName, bridge: InterfaceName?, subnet: Subnet?
    ) throws(NetworkError) -> NetworkDefinition {
        try checkUser(name)
        if let subnet, !NetworkDefinition.isUsable(subnet) {
            throw .badSubnet(subnet.description)
        }
        if let bridge, !NetworkDefinition.isUsable(bridge) { throw .badBridge(bridge) }
        try NetworkDirectories.create(directories.definitions, mode: 0o755)
        try NetworkDirectories.create(directories.runtime, mode: 0o755)
        let lock = try NetworksLock(directories)
        let file = files(of: name).definition
        guard fileStatus(ofPath: file) == nil else { throw .alreadyDefined(name) }
        guard process(of: name) == nil else { throw .isUp(name) }
        var bridges: [InterfaceName: NetworkName] = [:]
        for other in names() where other != name {
            bridges[(try? definition(of: other))?.bridge ?? .init(fromKernel: "")] = other
        }
        if let bridge, let other = bridges[bridge] { throw .bridgeOfAnother(bridge, other) }
        let usual = NetworkDefinition.standard.bridge
        let free = (name == .standard ? [usual] : []) + (1..<1000).map { InterfaceName(fromKernel: "swkvm\($0)") }
        let definition = NetworkDefinition(
            bridge: bridge ?? free.first { bridges[$0] == nil } ?? usual, subnet: subnet)
        try NetworkSetUp.write(definition.text, to: file)
        _ = consume lock
        return definition
    }

    /// Removes a network that is down, with its leases.
    public func delete(_ name: NetworkName) throws(NetworkError) {
        try checkUser(name)
        _ = try definition(of: name)
        try NetworkDirectories.create(directories.runtime, mode: 0o755)
        let lock = try NetworksLock(directories)
        guard process(of: name) == nil, NetworkState(of: files(of: name)) == nil else { throw .isUp(name) }
        let files = files(of: name)
        for file in [files.leases, files.chosenSubnet, files.definition] { removeName(file) }
        _ = consume lock
    }

    // MARK: State

    /// A network at one moment.
    public struct Status: Sendable {
        public let name: NetworkName
        public let definition: NetworkDefinition
        /// nil while it is down.
        public let state: NetworkState?
        public let process: Int32?
        /// Indicates whether it stays up without machines.
        public let isKept: Bool
        /// The bridge that it has; after a change of the definition, the new one from its next start on.
        public var bridge: InterfaceName { state?.bridge ?? definition.bridge }
        /// The interfaces of machines; empty if they are not visible from here.
        public let ports: [InterfaceName]
    }

    public func status(of name: NetworkName) throws(NetworkError) -> Status {
        let definition = try definition(of: name), files = files(of: name)
        let process = process(of: name), state = process == nil ? nil : NetworkState(of: files)
        var ports: [InterfaceName] = []
        if let state, state.namespace == NetworkState.currentNamespace, let netlink = try? RouteNetlink(),
            let bridge = try? netlink.link(named: state.bridge)
        {
            ports = ((try? netlink.ports(of: bridge.index)) ?? []).map(\.name)
        }
        return Status(
            name: name, definition: definition, state: state, process: process,
            isKept: process != nil && fileStatus(ofPath: files.kept) != nil, ports: ports)
    }

    private func process(of name: NetworkName) -> Int32? {
        (try? ProcessFile.owner(files(of: name).process))?.number
    }

    /// The addresses that guests have, by address. A network that is down keeps them for its next start.
    public func leases(of name: NetworkName) throws(NetworkError) -> [Lease] {
        let file = files(of: name).leases
        let bytes: [UInt8]
        do throws(SystemCallError) { bytes = try readFile(file, limit: Lease.limit) } catch {
            guard error.errno == ENOENT else { throw .system(purpose: "read", path: file, error) }
            return []
        }
        return Lease.all(in: bytes, subnet: NetworkState(of: files(of: name))?.subnet, now: UInt64(max(0, time(nil))))
    }

    // MARK: Up and down

    /// Brings a network up, to stay up until ``stop(_:)``.
    /// - Returns: what a user is to know.
    public func start(_ name: NetworkName) throws(NetworkError) -> [String] {
        let lock = try prepare(name)
        // From before its process looks for machines the first time.
        let isUp = process(of: name) != nil, wasKept = fileStatus(ofPath: files(of: name).kept) != nil
        try NetworkSetUp.write("", to: files(of: name).kept)
        do throws(NetworkError) {
            let report = try bringUp(name).report
            _ = consume lock
            return isUp ? ["the network \(name) is up already, and now stays up without machines"] : report
        } catch {
            if !wasKept { removeName(files(of: name).kept) }
            removeEmpty(files(of: name))
            throw error
        }
    }

    /// Takes a network down that no machine uses.
    public func stop(_ name: NetworkName) throws(NetworkError) {
        try checkUser(name)
        let status = try status(of: name)
        guard let state = status.state else { throw .notUp(name) }
        guard state.namespace == NetworkState.currentNamespace else {
            throw .elsewhere(name, process: status.process ?? 0)
        }
        guard status.ports.isEmpty else { throw .inUse(name, ports: status.ports) }
        let files = files(of: name)
        removeName(files.kept)
        do throws(SystemCallError) {
            guard let process = try ProcessFile.owner(files.process) else { return }
            try process.send(signal: SIGTERM)
            guard process.waitForEnd(milliseconds: 30_000) else {
                // A machine has come meanwhile.
                throw .init("waiting for its end", errno: EBUSY)
            }
        } catch {
            guard error.errno != ESRCH else { return }
            if status.isKept { try NetworkSetUp.write("", to: files.kept) }
            throw .system(purpose: "end the process of", path: files.process, error)
        }
    }

    /// The bridge of a network that is up, held so for as long as this value lives: until the interface of a machine is
    /// its port.
    struct Membership: ~Copyable {
        let state: NetworkState
        /// What a user is to know.
        let report: [String]
        private let lock: NetworksLock

        init(_ state: NetworkState, _ report: [String], _ lock: consuming NetworksLock) {
            self.state = state
            self.report = report
            self.lock = lock
        }
    }

    /// Brings a network up if it is down.
    func join(_ name: NetworkName) throws(NetworkError) -> Membership {
        let lock = try prepare(name)
        let (state, report) = try bringUp(name)
        return Membership(state, report, lock)
    }

    /// Gives a machine's guest an address and a name in a network that is up; a few names cannot be one there.
    public func register(_ mac: MACAddress, _ host: String, in name: NetworkName) throws(NetworkError) {
        let files = files(of: name)
        let lock = try NetworksLock(directories)
        guard let state = NetworkState(of: files) else { throw .notUp(name) }
        let lines = directoryNames(files.hosts).compactMap { file in
            (try? readFile(files.hosts + "/" + file, limit: 256)).map { String(decoding: $0, as: UTF8.self) }
        }
        let address = DNSMasq.address(for: mac, in: state.subnet, try leases(of: name), lines: lines)
        try NetworkSetUp.write(
            DNSMasq.host(mac, address, host), to: "\(files.hosts)/\(DNSMasq.hostFile(mac))",
            place: files.runtime + "/host.new")
        _ = consume lock
        if DNSMasq.isKeyword(DNSMasq.hostName(host)) { throw .notAHostName(host) }
    }

    /// Repairs networks whose process was killed: one that machines use, or that is to stay up, gets another process;
    /// what is left of others is removed.
    /// - Returns: what a user is to know.
    public func repair() -> [String] {
        guard geteuid() == 0 else { return [] }
        let broken = directoryNames(directories.runtime).compactMap { try? NetworkName($0) }.filter { name in
            process(of: name) == nil
        }
        guard !broken.isEmpty, let lock = try? NetworksLock(directories) else { return [] }
        var report: [String] = []
        for name in broken {
            let files = files(of: name)
            guard process(of: name) == nil else { continue }
            guard let state = NetworkState(of: files) else {
                // A start that was killed before its first change.
                NetworkSetUp.removeFiles(files)
                removeName(files.process)
                _ = files.runtime.withRawCString { unsafe rmdir($0) }
                continue
            }
            let isHere = state.namespace == NetworkState.currentNamespace
            if !isHere, NetworkState.isInUse(namespace: state.namespace) {
                report.append(NetworkError.leftElsewhere(name).description)
            } else if isHere, isUsed(state) || fileStatus(ofPath: files.kept) != nil {
                do throws(NetworkError) { report += try bringUp(name).report } catch {
                    report.append("the network \(name) could not be repaired: \(error)")
                }
            } else {
                let notes = NetworkSetUp.takeDown(files, state)
                removeName(files.process)
                _ = files.runtime.withRawCString { unsafe rmdir($0) }
                report.append("removed what the killed process of the network \(name) has left")
                report += notes
            }
        }
        _ = consume lock
        return report
    }

    private func isUsed(_ state: NetworkState) -> Bool {
        guard let netlink = try? RouteNetlink(), let bridge = try? netlink.link(named: state.bridge) else {
            return false
        }
        return (try? netlink.ports(of: bridge.index))?.isEmpty == false
    }

    // MARK: Helpers

    /// Removes the directories that a start which failed has created.
    private func removeEmpty(_ files: NetworkFiles) {
        for path in [files.hosts, files.runtime] { _ = path.withRawCString { unsafe rmdir($0) } }
    }

    private func checkUser(_ name: NetworkName) throws(NetworkError) {
        guard geteuid() == 0 else { throw .notPermitted(name) }
    }

    /// Checks what a start needs, creates the directories, and locks.
    private func prepare(_ name: NetworkName) throws(NetworkError) -> NetworksLock {
        try checkUser(name)
        _ = try definition(of: name)
        if DNSMasq.find() == nil { throw .programMissing("dnsmasq", package: DNSMasq.package) }
        if HelperProgram.find("nft") == nil { throw .programMissing("nft", package: "nftables") }
        try NetworkDirectories.create(directories.data, mode: 0o755)
        try NetworkDirectories.create(directories.runtime, mode: 0o755)
        let lock = try NetworksLock(directories)
        try NetworkDirectories.create(files(of: name).runtime, mode: 0o755)
        try NetworkDirectories.create(files(of: name).hosts, mode: 0o755)
        for path in [directories.runtime, files(of: name).runtime, files(of: name).hosts] {
            // Whatever the mask of modes is: dnsmasq's user reads there.
            _ = path.withRawCString { unsafe chmod($0, 0o755) }
        }
        return lock
    }

    /// Starts the network's process, unless it runs. Its caller has the lock.
    private func bringUp(_ name: NetworkName) throws(NetworkError) -> (state: NetworkState, report: [String]) {
        let files = files(of: name)
        let before = NetworkState(of: files)
        if let process = process(of: name) {
            guard let before, before.namespace == NetworkState.currentNamespace else {
                throw .elsewhere(name, process: process)
            }
            return (before, [])
        }
        if let before, before.namespace != NetworkState.currentNamespace,
            NetworkState.isInUse(namespace: before.namespace)
        {
            throw .leftElsewhere(name)
        }
        let program = "/proc/self/exe"
        let result: (status: Int32?, text: String)
        do throws(SystemCallError) {
            result = try HelperProgram.run(program, ["swkvm", "network", "keep", name.text], patience: 60)
        } catch { throw .system(purpose: "start", path: program, error) }
        let lines = result.text.split(separator: "\n").map(String.init)
        guard result.status == 0, process(of: name) != nil, let state = NetworkState(of: files) else {
            removeEmpty(files)
            throw .host(lines.last ?? "the process of the network \(name) did not start")
        }
        let note = before.map { _ in "repaired the network \(name), whose process was killed" }
        return (state, (note.map { [$0] } ?? []) + lines)
    }
}

/// Keeps other processes from bringing up and taking down networks.
struct NetworksLock: ~Copyable {
    private let lock: FileLock

    /// Waits for it, up to a minute.
    /// - Throws: `busy`.
    init(_ directories: NetworkDirectories) throws(NetworkError) {
        for _ in 0..<12_000 {
            do throws(SystemCallError) {
                lock = try FileLock(
                    FileDescriptor.open(directories.lock, O_RDWR | O_CREAT | O_NOFOLLOW, mode: 0o600))
                return
            } catch {
                guard error.errno == EWOULDBLOCK else { throw .system(purpose: "lock", path: directories.lock, error) }
            }
            usleep(5_000)
        }
        throw .busy
    }
}
