// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import HostNetwork
internal import Linux

/// `swkvm network`.
struct NetworkCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "network",
        abstract: "Networks for machines: a bridge of the host with DHCP, DNS and address translation.",
        discussion: """
            A machine with --net nat is connected to the network default, one with --net nat=NAME to the network NAME. The first machine \
            brings its network up, and the last one takes it down, however it ends; `start` brings one up that stays. Networks need root, \
            dnsmasq (Debian package dnsmasq-base) and nft (nftables). The network default need not be defined: its bridge is swkvm0, and \
            its addresses are a range that nothing on the host uses.

            EXAMPLES
              swkvm network list
              swkvm network define lab --subnet 10.20.30.0/24
              swkvm create web debian-12.qcow2 --net nat=lab

            \(MachineTool.exitStatuses(of: "a network"))
            """,
        subcommands: [
            List.self, Info.self, Define.self, Start.self, Stop.self, Leases.self, Delete.self, Keep.self,
        ])

    struct List: NetworkVerb {
        static let configuration = CommandConfiguration(
            commandName: "list", abstract: "List the networks, and which of them are up.")

        @Flag(help: "Print a JSON array with an object for each network.")
        var json = false

        @Flag(help: "Print only the names.")
        var names = false

        func run() throws {
            let networks = networks(), all = networks.names()
            if names { return all.forEach { print($0) } }
            var states: [Networks.Status] = []
            var failure: (any Error)?
            for name in all {
                // An error with one is reported, and the others are shown.
                do { states.append(try attempt { () throws(NetworkError) in try networks.status(of: name) }) } catch {
                    failure = failure ?? error
                }
            }
            show(states)
            if let failure { throw failure }
        }

        private func show(_ states: [Networks.Status]) {
            if json { return print(JSON.array(states.map(\.json))) }
            let rows = states.map { status in
                [
                    "\(status.name)", status.word, "\(status.bridge)",
                    status.subnet.map { "\($0)" } ?? "-", status.state == nil ? "-" : "\(status.ports.count)",
                ]
            }
            for line in HelpTable.columns([["NAME", "STATE", "BRIDGE", "ADDRESSES", "PORTS"]] + rows) { print(line) }
        }
    }

    struct Info: NetworkVerb {
        static let configuration = CommandConfiguration(
            commandName: "info", abstract: "Show the definition and state of a network.")

        @Flag(help: "Print JSON, as `swkvm network list --json` has it.")
        var json = false

        @Argument(help: "The network. (default: default)", completion: NetworkCompletion.names)
        var name: String?

        func run() throws {
            let networks = networks(), name = try networkName(name)
            let status = try attempt { () throws(NetworkError) in try networks.status(of: name) }
            if json { return print(status.json) }
            let rows = [
                ("name", "\(name)"), ("state", status.word), ("bridge", "\(status.bridge)"),
                ("addresses", status.subnet.map { "\($0)" } ?? "chosen at the start"),
                ("host", status.state.map { "\($0.gateway)" }), ("process", status.process.map { "\($0)" }),
                ("forwarding", status.state.map { $0.hasSetForwarding ? "switched on by this network" : "was on" }),
                ("ports", status.state.map { _ in status.ports.map(\.text).joined(separator: " ") }),
            ]
            for line in HelpTable.columns(rows.compactMap { head, value in value.map { [head + ":", $0] } }) {
                print(line)
            }
        }
    }

    struct Define: NetworkVerb {
        static let configuration = CommandConfiguration(
            commandName: "define", abstract: "Define a network.",
            discussion: "Its first address is the host's, which is also the guests' gateway and name server.")

        @Option(
            help: ArgumentHelp(
                "Addresses of the network, with 8 to 29 bits of prefix. Default: a /24 that is free when the network starts.",
                valueName: "address/bits"))
        var subnet: String?

        @Option(help: ArgumentHelp("Name of its bridge. Default: the next free swkvmN.", valueName: "name"))
        var bridge: String?

        @Argument(help: "The network.")
        var name: String

        func run() throws {
            let networks = networks(), name = try networkName(name)
            var range: Subnet?
            if let subnet {
                range = Subnet(subnet)
                if range == nil { try attempt { () throws(NetworkError) in throw .badSubnet(subnet) } }
            }
            let interface: InterfaceName?
            do { interface = try bridge.map { try InterfaceName($0) } } catch { throw ValidationError("\(error)") }
            let definition = try attempt { () throws(NetworkError) in
                try networks.define(name, bridge: interface, subnet: range)
            }
            print(
                "\(name): defined; bridge \(definition.bridge), "
                    + (definition.subnet.map { "addresses \($0)" } ?? "addresses that are free when it starts"))
        }
    }

    struct Start: NetworkVerb {
        static let configuration = CommandConfiguration(
            commandName: "start", abstract: "Bring a network up, to stay up without machines.")

        @Argument(help: "The network. (default: default)", completion: NetworkCompletion.names)
        var name: String?

        func run() throws {
            let networks = networks(), name = try networkName(name)
            for line in try attempt({ () throws(NetworkError) in try networks.start(name) }) { print(line) }
        }
    }

    struct Stop: NetworkVerb {
        static let configuration = CommandConfiguration(
            commandName: "stop", abstract: "Take a network down that no machine uses.")

        @Argument(help: "The network. (default: default)", completion: NetworkCompletion.names)
        var name: String?

        func run() throws {
            let networks = networks(), name = try networkName(name)
            try attempt { () throws(NetworkError) in try networks.stop(name) }
            print("\(name): down")
        }
    }

    struct Leases: NetworkVerb {
        static let configuration = CommandConfiguration(
            commandName: "leases", abstract: "List the addresses that guests have from a network.")

        @Flag(help: "Print a JSON array with an object for each address; end is in seconds since 1970.")
        var json = false

        @Argument(help: "The network. (default: default)", completion: NetworkCompletion.names)
        var name: String?

        func run() throws {
            let networks = networks(), name = try networkName(name)
            let leases = try attempt { () throws(NetworkError) in
                _ = try networks.definition(of: name)
                return try networks.leases(of: name)
            }
            if json { return print(JSON.array(leases.map(\.json))) }
            let rows = leases.map { ["\($0.address)", "\($0.mac)", $0.host?.printable ?? "-"] }
            for line in HelpTable.columns([["ADDRESS", "MAC", "HOST"]] + rows) { print(line) }
        }
    }

    struct Delete: NetworkVerb {
        static let configuration = CommandConfiguration(
            commandName: "delete", abstract: "Delete a network that is down, with its leases.")

        @Argument(help: "The network.", completion: NetworkCompletion.names)
        var name: String

        func run() throws {
            let networks = networks(), name = try networkName(name)
            try attempt { () throws(NetworkError) in try networks.delete(name) }
            print("\(name): deleted")
        }
    }

    /// The process of a network that is up; not for users.
    struct Keep: ParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "keep", abstract: "Be the process of a network.", shouldDisplay: false)

        @Argument(help: "The network.")
        var name: String

        func run() throws {
            guard let name = try? NetworkName(name) else { throw ExitCode(MachineTool.failure) }
            throw ExitCode(NetworkKeeper.main(name))
        }
    }
}

/// A verb on networks.
protocol NetworkVerb: ParsableCommand {}

extension NetworkVerb {
    /// The host's networks, after those whose process was killed have been repaired.
    func networks() -> Networks {
        let networks = Networks()
        for line in networks.repair() { StandardError().say(line) }
        return networks
    }

    func networkName(_ text: String?) throws -> NetworkName {
        guard let text else { return .standard }
        return try attempt { () throws(NetworkError) in try NetworkName(text) }
    }

    /// Calls networks; an error is reported in one line, and ends the program.
    @discardableResult func attempt<Answer>(_ body: () throws(NetworkError) -> Answer) throws -> Answer {
        do throws(NetworkError) { return try body() } catch {
            StandardError().say(error.description)
            throw error.isUsage ? ExitCode.validationFailure : ExitCode(MachineTool.failure)
        }
    }
}

enum NetworkCompletion {
    /// The names of the networks that are there.
    static let names = CompletionKind.shellCommand("swkvm network list --names 2>/dev/null")
}

extension Networks.Status {
    var word: String { state == nil ? "down" : isKept ? "up, kept" : "up" }

    /// The addresses in use, or those that it is defined with.
    var subnet: Subnet? { state?.subnet ?? definition.subnet }

    var json: JSON {
        .object([
            ("name", .string("\(name)")), ("state", .string(state == nil ? "down" : "up")), ("kept", .bool(isKept)),
            ("bridge", .string("\(bridge)")), ("subnet", subnet.map { .string("\($0)") }),
            ("host", state.map { .string("\($0.gateway)") }), ("process", process.map { .number(UInt64($0)) }),
            ("set-forwarding", state.map { .bool($0.hasSetForwarding) }),
            ("ports", .array(ports.map { .string($0.text) })),
        ])
    }
}

extension Lease {
    var json: JSON {
        .object([
            ("address", .string("\(address)")), ("mac", .string("\(mac)")), ("host", host.map { .string($0) }),
            ("end", end.map { .number($0) }),
        ])
    }
}
