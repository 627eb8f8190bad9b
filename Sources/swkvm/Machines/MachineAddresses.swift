// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import HostNetwork
internal import Inventory
internal import Linux
internal import Machine

/// The addresses that the guests of machines have from networks of this host.
final class MachineAddresses {
    private let networks = Networks()
    private let host = HostIdentity()
    /// Each network's, read once.
    private var leases: [NetworkName: [Lease]] = [:]

    /// The networks of a machine, with the Ethernet address that its guest has in each.
    func interfaces(of name: MachineName, _ definition: Definition) -> [(network: NetworkName, mac: MACAddress)] {
        let networks = definition.values(of: "net").compactMap { try? NetworkArgument(parsing: $0).network }
        var machine = Configuration(name: name.text, networks: networks)
        machine.isNamed = true
        return networks.enumerated().compactMap { index, network in
            guard case .nat(let name, _) = network.backend else { return nil }
            let identity = machine.identity(ofNetwork: index, interface: "")
            return (name, network.mac ?? host.address(ofMachine: machine.name, interface: identity))
        }
    }

    /// A machine's addresses, in the order of its interfaces.
    func all(of name: MachineName, _ definition: Definition) -> [IPv4Address] {
        interfaces(of: name, definition).flatMap { network, mac in
            leases(of: network).filter { $0.mac == mac }.map(\.address)
        }
    }

    private func leases(of name: NetworkName) -> [Lease] {
        if let known = leases[name] { return known }
        // What this user may not read is unknown.
        let read = (try? networks.leases(of: name)) ?? []
        leases[name] = read
        return read
    }
}

/// `swkvm ip`.
struct IPCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "ip",
        abstract: "Print the address of the guest of a running machine.",
        discussion: """
            The address is the one that the guest has from the DHCP server of its network (--net nat). A guest with several interfaces has a \
            line for each.

            \(MachineTool.exitStatuses)
            """)

    @Flag(
        help: "Print a JSON array with an object for each interface: network, MAC address, and address if it has one.")
    var json = false

    @Argument(help: "The machine.", completion: MachineCompletion.names)
    var name: String

    func run() throws {
        let (inventory, files) = try machine(self.name)
        let name = files.name
        let definition = try attempt { () throws(InventoryError) in
            guard try files.runningProcess() != nil else { throw .notRunning(name) }
            return try inventory.definition(of: name)
        }
        let addresses = MachineAddresses()
        let interfaces = addresses.interfaces(of: name, definition)
        guard !interfaces.isEmpty else {
            StandardError().say(
                "\(name) has no interface with an address from this host: --net nat gives it one (swkvm edit \(name))")
            throw ExitCode(MachineTool.failure)
        }
        let found = addresses.all(of: name, definition)
        if json { return print(JSON.array(addresses.json(of: interfaces))) }
        guard !found.isEmpty else {
            StandardError().say("\(name) has no address yet: its guest has not asked for one by DHCP")
            throw ExitCode(MachineTool.failure)
        }
        for address in found { print(address) }
    }
}

extension MachineAddresses {
    fileprivate func json(of interfaces: [(network: NetworkName, mac: MACAddress)]) -> [JSON] {
        interfaces.map { network, mac in
            let lease = leases(of: network).first { $0.mac == mac }
            return .object([
                ("network", .string("\(network)")), ("mac", .string("\(mac)")),
                ("address", lease.map { .string("\($0.address)") }),
                ("host", lease.flatMap { lease in lease.host.map { .string($0) } }),
            ])
        }
    }
}
