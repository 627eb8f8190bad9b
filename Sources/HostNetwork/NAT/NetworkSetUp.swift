// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The changes on the host for a network, from the bridge to the server.
struct NetworkSetUp {
    let state: NetworkState
    let bridgeIndex: Int32
    let server: pid_t
    /// What a user is to know.
    let report: [String]
    private let files: NetworkFiles

    /// Seconds that nft and the start of dnsmasq may take.
    private static let patience = 20

    /// The alias of a network's bridge.
    static func alias(of name: NetworkName) -> String { "swkvm: network \(name)" }

    /// Makes all changes, or none. Of a network that machines use, what is there stays when a change fails.
    init(_ files: NetworkFiles, _ definition: NetworkDefinition) throws(NetworkError) {
        self.files = files
        Self.stopServer(files)
        let start: Start
        do throws(HostNetworkError) { start = try Start(files, definition) } catch {
            if case .nat(let error) = error { throw error }
            throw .host(error.description)
        }
        var state = start.state
        var report = [
            "the network \(files.name) is up: bridge \(state.bridge), address \(state.gateway), guests in \(state.subnet)"
        ]
        do throws(NetworkError) {
            try Self.write(state.text, to: files.state)
            let bridge: Link
            (bridge, report) = try start.makeBridge(files, report)
            bridgeIndex = bridge.index
            try Self.applyRules(FirewallRules(name: files.name, bridge: state.bridge, subnet: state.subnet), files)
            report += Self.droppers(state.bridge)
            let user = DNSMasq.user(in: (try? readFile("/etc/passwd", limit: 1 << 20)) ?? [])
            try Self.write(
                DNSMasq.configuration(files, bridge: state.bridge, subnet: state.subnet, user: user),
                to: files.dnsmasqConfiguration)
            server = try Self.startServer(files)
            // Last: what fails before changes nothing of the whole host.
            if !Forwarding.isOn {
                // First the note, then the change: a process killed in between leaves what is harmless.
                state.forwarding = Forwarding.settings
                try Self.write(state.text, to: files.state)
                try Forwarding.switchOn()
                report.append("IPv4 forwarding of the host was switched on")
            }
        } catch {
            if !start.isInUse { Self.takeDown(files, state) }
            throw error
        }
        if definition.subnet == nil { try? Self.write("\(state.subnet)\n", to: files.chosenSubnet) }
        (self.state, self.report) = (state, report)
    }

    /// What a start finds on the host.
    private struct Start {
        /// The bridge, if a killed process has left it.
        let found: Link?
        /// Machines are its ports.
        let isInUse: Bool
        let state: NetworkState

        init(_ files: NetworkFiles, _ definition: NetworkDefinition) throws(HostNetworkError) {
            let netlink = try RouteNetlink()
            // What a killed process has left is used again, as machines may be there; also after a change of the
            // definition.
            let previous = NetworkState(of: files).flatMap {
                $0.namespace == NetworkState.currentNamespace ? $0 : nil
            }
            let bridge = previous?.bridge ?? definition.bridge
            found = try netlink.link(named: bridge)
            if let found { isInUse = try !netlink.ports(of: found.index).isEmpty } else { isInUse = false }
            if let found, found.kind != "bridge" || found.alias != NetworkSetUp.alias(of: files.name) {
                // A process that was killed between creating and marking it has left one without a port.
                guard previous != nil, found.kind == "bridge", found.alias.isEmpty, !isInUse else {
                    throw .nat(.bridgeTaken(files.name, bridge))
                }
            }
            let subnet: Subnet
            if found != nil, let previous {
                subnet = previous.subnet
            } else {
                do throws(NetworkError) {
                    subnet = try NetworkSetUp.subnet(files, definition, netlink, own: found)
                } catch { throw .nat(error) }
            }
            state = NetworkState(
                bridge: bridge, subnet: subnet, namespace: NetworkState.currentNamespace,
                forwarding: previous?.forwarding)
        }

        /// - Parameter report: what a user is to know so far.
        func makeBridge(_ files: NetworkFiles, _ report: [String]) throws(NetworkError) -> (Link, [String]) {
            do throws(HostNetworkError) {
                let (link, note) = try NetworkSetUp.makeBridge(found, state, files, RouteNetlink())
                return (link, report + [note].compactMap { $0 })
            } catch { throw .host(error.description) }
        }
    }

    func revert() { Self.takeDown(files, state) }

    // MARK: The bridge

    private static func subnet(
        _ files: NetworkFiles, _ definition: NetworkDefinition, _ netlink: borrowing RouteNetlink, own: Link?
    ) throws(NetworkError) -> Subnet {
        let used: [UsedRange], links: [Link]
        do throws(HostNetworkError) {
            used = try netlink.usedRanges().filter { $0.interface != own?.index || own == nil }
            links = try netlink.links()
        } catch { throw .host(error.description) }
        if let wanted = definition.subnet {
            guard let other = AddressChoice.collision(of: wanted, with: used) else { return wanted }
            let name = links.first { $0.index == other.interface }?.name.text ?? "a route"
            throw .rangeInUse(files.name, wanted, by: other.subnet, interface: name)
        }
        let last = (try? readFile(files.chosenSubnet, limit: 64)).flatMap {
            Subnet(String(decoding: $0.prefix { $0 != UInt8(ascii: "\n") }, as: UTF8.self))
        }.flatMap { NetworkDefinition.isUsable($0) ? $0 : nil }
        let servers = Passt.nameServers(
            of: String(decoding: (try? readFile("/etc/resolv.conf", limit: 64 << 10)) ?? [], as: UTF8.self))
        return try AddressChoice.choose(after: last, used, servers: servers.compactMap { IPv4Address($0) })
    }

    private static func makeBridge(
        _ found: Link?, _ state: NetworkState, _ files: NetworkFiles, _ netlink: borrowing RouteNetlink
    ) throws(HostNetworkError) -> (Link, note: String?) {
        if found == nil { try netlink.createLink(state.bridge, kind: "bridge", address: .random()) }
        guard let link = try netlink.link(named: state.bridge) else { throw .bridgeMissing(state.bridge) }
        if link.alias.isEmpty { try netlink.set(link, alias: alias(of: files.name)) }
        // The network has no IPv6, and so no rules for it.
        let note = HostIPv6.off.apply(to: state.bridge)
        let bytes = state.gateway.bytes
        do throws(HostNetworkError) {
            try netlink.add(
                to: link, address: (bytes[0], bytes[1], bytes[2], bytes[3]),
                prefixLength: UInt8(clamping: state.subnet.length))
        } catch { guard found != nil, error.errno == EEXIST else { throw error } }
        try netlink.set(link, up: true)
        return (link, note)
    }

    // MARK: nft

    private static func applyRules(_ rules: FirewallRules, _ files: NetworkFiles) throws(NetworkError) {
        try write(rules.text, to: files.rules)
        try nft(files.rules)
    }

    private static func nft(_ file: String) throws(NetworkError) {
        guard let program = HelperProgram.find("nft") else { throw .programMissing("nft", package: "nftables") }
        let (status, text) = try result(program, ["nft", "-f", file])
        guard status != 0 else { return }
        let line = text.split(separator: "\n").first.map(String.init) ?? "an error without a message"
        throw .programFailed("nft", line)
    }

    /// Sentences about chains of the host that drop what guests send.
    private static func droppers(_ bridge: InterfaceName) -> [String] {
        guard let program = HelperProgram.find("nft") else { return [] }
        // What a program prints is read from its standard error.
        let words = ["sh", "-c", "exec \"$0\" list chains >&2", program]
        guard let (status, text) = try? result("/bin/sh", words), status == 0 else { return [] }
        return [
            FirewallRules.dropper(in: text, at: .forward).map { chain in
                "the firewall of this host drops what is forwarded by default (\(chain)): accept packets from and to \(bridge) there, or guests reach the host only"
            },
            FirewallRules.dropper(in: text, at: .input).map { chain in
                "the firewall of this host drops what comes in by default (\(chain)): accept UDP ports 67 and 53 and TCP port 53 from \(bridge) there, or guests get no address"
            },
        ].compactMap { $0 }
    }

    private static func result(
        _ program: String, _ arguments: [String]
    ) throws(NetworkError) -> (status: Int32?, text: String) {
        do throws(SystemCallError) { return try HelperProgram.run(program, arguments, patience: patience) } catch {
            throw .system(purpose: "start", path: program, error)
        }
    }

    // MARK: dnsmasq

    /// - Returns: its process, a child of this one, when it serves.
    static func startServer(_ files: NetworkFiles) throws(NetworkError) -> pid_t {
        guard let program = DNSMasq.find() else { throw .programMissing("dnsmasq", package: DNSMasq.package) }
        removeName(files.dnsmasqProcess)
        let process: pid_t
        do throws(SystemCallError) {
            let errors = try FileDescriptor.open(files.dnsmasqErrors, O_WRONLY | O_CREAT | O_TRUNC, mode: 0o600)
            let nothing = try FileDescriptor.open("/dev/null", O_RDWR)
            process = try HelperProgram.spawn(
                program, ["dnsmasq", "--keep-in-foreground", configurationWord(files)], socket: nothing, errors: errors)
        } catch { throw .system(purpose: "start", path: program, error) }
        // It writes its number when it has opened its sockets.
        let deadline = TimerFD.now + UInt64(patience) * 1000
        while TimerFD.now < deadline {
            if serverNumber(files) == process { return process }
            if waitpid(process, nil, WNOHANG) == process {
                let text = String(decoding: (try? readFile(files.dnsmasqErrors, limit: 4096)) ?? [], as: UTF8.self)
                let line = text.split(separator: "\n").last.map(String.init) ?? "an error without a message"
                throw .programFailed("dnsmasq", line.replacing(first: "dnsmasq: ", with: ""))
            }
            usleep(2_000)
        }
        kill(process, SIGKILL)
        _ = waitpid(process, nil, 0)
        throw .programFailed("dnsmasq", "it did not start within \(patience) seconds")
    }

    private static func configurationWord(_ files: NetworkFiles) -> String {
        "--conf-file=\(files.dnsmasqConfiguration)"
    }

    private static func serverNumber(_ files: NetworkFiles) -> pid_t? {
        guard let bytes = try? readFile(files.dnsmasqProcess, limit: 64) else { return nil }
        return pid_t(String(decoding: bytes.prefix { $0 != UInt8(ascii: "\n") }, as: UTF8.self))
    }

    /// Ends the network's dnsmasq. Of one that another process has started, the number is in its file, which may be
    /// another process's by now, so its command line counts.
    /// - Parameter child: the one that this process has started; 0 if there is none.
    static func stopServer(_ files: NetworkFiles, child: pid_t = 0) {
        guard let number = child > 0 ? child : serverNumber(files), number > 1 else { return }
        let descriptor = clinux_pidfd_open(number)
        guard descriptor >= 0 else { return }
        let process = FileDescriptor(owning: descriptor)
        let words = ((try? readFile("/proc/\(number)/cmdline", limit: 64 << 10)) ?? []).split(separator: 0)
        guard words.contains(where: { $0.elementsEqual(configurationWord(files).utf8) }) else { return }
        for signal in [SIGTERM, SIGKILL] {
            guard clinux_pidfd_send_signal(process.rawValue, signal) == 0 else { break }
            var entry = pollfd(fd: process.rawValue, events: Int16(POLLIN), revents: 0)
            // One entry.
            if unsafe poll(&entry, 1, 5_000) > 0 { break }
        }
        // If it is a child of this process.
        _ = waitpid(number, nil, child > 0 ? 0 : WNOHANG)
    }

    // MARK: The end

    /// Reverts everything. Failures are not reported: what is not there is removed already.
    /// - Parameter server: the dnsmasq that this process has started; 0 if there is none.
    /// - Returns: what a user is to know.
    @discardableResult static func takeDown(
        _ files: NetworkFiles, _ state: NetworkState, server: pid_t = 0
    ) -> [String] {
        var report: [String] = []
        stopServer(files, child: server)
        let isHere = state.namespace == NetworkState.currentNamespace
        if isHere {
            if (try? write(FirewallRules.removal(of: files.name), to: files.rules)) != nil { try? nft(files.rules) }
            if let netlink = try? RouteNetlink() {
                if let bridge = try? netlink.link(named: state.bridge), isOurs(bridge, files, netlink) {
                    try? netlink.delete(bridge)
                }
                if let forwarding = state.forwarding, let links = try? netlink.links(),
                    !isAnotherUp(files, taking: forwarding)
                {
                    if Forwarding.mayBeNeeded(links, besides: state.bridge) {
                        report.append("IPv4 forwarding stays on: other interfaces may need it")
                    } else {
                        Forwarding.switchOff(restoring: forwarding)
                    }
                }
            }
        }
        removeFiles(files)
        return report
    }

    /// Whether a bridge that a state names is the network's: it is marked, or its maker was killed before that.
    private static func isOurs(_ bridge: Link, _ files: NetworkFiles, _ netlink: borrowing RouteNetlink) -> Bool {
        if bridge.alias == alias(of: files.name) { return true }
        return bridge.kind == "bridge" && bridge.alias.isEmpty
            && (try? netlink.ports(of: bridge.index))?.isEmpty == true
    }

    /// Removes what is in a network's run-time directory but the process file, the state last.
    static func removeFiles(_ files: NetworkFiles) {
        for host in directoryNames(files.hosts) { removeName(files.hosts + "/" + host) }
        _ = files.hosts.withRawCString { unsafe rmdir($0) }
        let others = directoryNames(files.runtime).map { files.runtime + "/" + $0 }
        for file in others where file != files.process && file != files.state { removeName(file) }
        removeName(files.state)
    }

    /// Whether another network needs what this one has switched on; it takes that over.
    private static func isAnotherUp(_ files: NetworkFiles, taking forwarding: Forwarding.Settings) -> Bool {
        for name in directoryNames(files.directories.runtime) where name != files.name.text {
            guard let name = try? NetworkName(name) else { continue }
            let other = NetworkFiles(name: name, directories: files.directories)
            guard var state = NetworkState(of: other), state.namespace == NetworkState.currentNamespace else {
                continue
            }
            state.forwarding = state.forwarding ?? forwarding
            if (try? write(state.text, to: other.state)) != nil { return true }
        }
        return false
    }

    /// Writes a file beside its place, then puts it there.
    /// - Parameter place: where it is written first, in the same file system; nil: beside it.
    static func write(_ text: String, to path: String, place: String? = nil) throws(NetworkError) {
        let new = place ?? path + ".new"
        do throws(SystemCallError) {
            removeName(new)
            let file = try FileDescriptor.open(new, O_WRONLY | O_CREAT | O_EXCL, mode: 0o644)
            // Whatever the mask of modes is: dnsmasq's user reads some.
            guard fchmod(file.rawValue, 0o644) == 0 else { throw .last("fchmod") }
            try file.writeAll(Array(text.utf8))
            let status = new.withRawCString { from in path.withRawCString { unsafe rename(from, $0) } }
            guard status == 0 else { throw .last("rename") }
        } catch {
            removeName(new)
            throw .system(purpose: "write", path: path, error)
        }
    }
}
