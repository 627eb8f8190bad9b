// SPDX-License-Identifier: Apache-2.0

internal import HostNetwork
internal import Inventory

/// Ports of the host that lead to guests.
enum MachinePorts {
    /// Of the first machine's guest; the next one has the next port.
    private static let first: UInt16 = 2222
    /// How many are tried.
    private static let count: UInt16 = 2000
    private static let ssh: UInt16 = 22

    /// Those of all machines, whether they run or not.
    static func used(in inventory: Inventory) -> Set<UInt16> {
        let definitions = ((try? inventory.names()) ?? []).compactMap { try? inventory.definition(of: $0) }
        return Set(definitions.flatMap(PublishedPort.all).map(\.port))
    }

    /// A definition whose published ports are free ones, where they were those of another machine.
    static func renumbered(_ definition: Definition, used: Set<UInt16>, _ report: inout [String]) -> Definition {
        var used = used
        return Definition(
            definition.options.map { option in
                guard option.name == "net", let value = option.value else { return option }
                let words = OptionList(value).items.map { key, value in
                    guard key == "publish", let value, let port = try? PublishedPort(parsing: value) else {
                        return key.commaDoubled + (value.map { "=" + $0.commaDoubled } ?? "")
                    }
                    let new = next(after: port, &used)
                    report.append(
                        new.port == port.port
                            ? "no port above \(port.port) is free for its port \(port.guestPort)"
                            : "port \(new.port) of \(new.address) leads to its port \(new.guestPort)")
                    return "publish=\(new)"
                }
                return Definition.Option("net", words.joined(separator: ","))
            })
    }

    /// The next port of the same address that is free, and that no machine has; the same one if there is none.
    private static func next(after port: PublishedPort, _ used: inout Set<UInt16>) -> PublishedPort {
        for number in (Int(port.port) + 1)...max(Int(port.port) + 1, Int(port.port) + Int(count)) {
            guard let candidate = port.moved(to: number), !used.contains(candidate.port), candidate.isFree else {
                continue
            }
            used.insert(candidate.port)
            return candidate
        }
        return port
    }

    /// Gives a machine of root a network of the host, if that has the programs for it, and otherwise the network of its
    /// user, with a port for ssh, if the host has the program for it.
    static func addNetwork(to definition: inout Definition, used: Set<UInt16>, _ report: inout [String]) {
        if Networks.areAvailable {
            definition.options.append(Definition.Option("net", "nat"))
            report.append("network default of this host (--net nat), where `swkvm ip` shows its address")
            return
        }
        guard Passt.find() != nil else {
            report.append("no network: passt is not installed (apt install passt); --net gives it another one")
            return
        }
        let candidates = (first..<first + count).lazy.filter { !used.contains($0) }
            .compactMap { try? PublishedPort(parsing: "\($0):\(ssh)") }
        guard let port = candidates.first(where: \.isFree) else {
            definition.options.append(Definition.Option("net", "user"))
            report.append("no port from \(first) to \(first + count - 1) is free for ssh")
            return
        }
        definition.options.append(Definition.Option("net", "user,publish=\(port.port):\(ssh)"))
        report.append("port \(port.port) of \(PublishedPort.usualAddress) leads to its port \(ssh)")
    }
}
