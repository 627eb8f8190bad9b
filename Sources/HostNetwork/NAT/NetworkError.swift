// SPDX-License-Identifier: Apache-2.0

public import Linux

/// Why something could not be done with a network of machines.
public enum NetworkError: Error, Equatable, CustomStringConvertible {
    case badName(String)
    case notDefined(NetworkName)
    case alreadyDefined(NetworkName)
    /// Two networks with one bridge.
    case bridgeOfAnother(InterfaceName, NetworkName)
    case badDefinition(path: String)
    case badSubnet(String)
    case badBridge(InterfaceName)
    case notPermitted(NetworkName?)
    /// A program that is not installed, and the Debian package that has it.
    case programMissing(String, package: String)
    /// The last line that a program printed.
    case programFailed(String, String)
    /// A given range, and what uses a part of it.
    case rangeInUse(NetworkName, Subnet, by: Subnet, interface: String)
    case noRangeFree
    /// An interface of the bridge's name that is no bridge of this network.
    case bridgeTaken(NetworkName, InterfaceName)
    /// Up in a network namespace that this process does not see.
    case elsewhere(NetworkName, process: Int32)
    /// What a killed process has left is in a network namespace that this process is not in.
    case leftElsewhere(NetworkName)
    /// A machine's name that dnsmasq takes for something else.
    case notAHostName(String)
    case inUse(NetworkName, ports: [InterfaceName])
    case isUp(NetworkName)
    case notUp(NetworkName)
    /// Another process holds the lock of the networks.
    case busy
    case unsafeDirectory(String)
    case system(purpose: String, path: String, SystemCallError)
    /// Setting up the bridge failed.
    case host(String)

    public var description: String {
        switch self {
        case .badName(let text):
            "'\(text.printable)' is not a network's name; expected up to \(NetworkName.maximumLength) lower-case letters, digits and '-', of which the first is a letter"
        case .notDefined(let name):
            "there is no network \(name); `swkvm network list` shows all, `swkvm network define \(name)` makes it"
        case .alreadyDefined(let name):
            "there is a network \(name) already: choose another name, or delete it with `swkvm network delete \(name)`"
        case .bridgeOfAnother(let bridge, let name):
            "the network \(name) has the bridge \(bridge): choose another one with --bridge"
        case .badDefinition(let path):
            "\(path.printable) is no definition of a network: expected the lines bridge = \"NAME\" and, if wanted, subnet = \"ADDRESS/BITS\""
        case .badSubnet(let text):
            "'\(text.printable)' is not a range of addresses for hosts; expected an IPv4 address and \(NetworkDefinition.possibleLengths.lowerBound) to \(NetworkDefinition.possibleLengths.upperBound) bits, such as 10.20.30.0/24"
        case .badBridge(let name):
            "'\(name)' cannot be the bridge of a network: use letters, digits, '-', '_' and '.'"
        case .notPermitted(let name):
            "\(name.map { "the network \($0)" } ?? "a network of machines") needs root: run as root, or give --net user"
        case .programMissing(let program, let package):
            "\(program) is not installed, which --net nat needs: apt install \(package)"
        case .programFailed(let program, let line): "\(program) reports: \(line.printable)"
        case .rangeInUse(let name, let wanted, let used, let interface):
            "the addresses \(wanted) of the network \(name) are in use: \(interface) has \(used); choose others with `swkvm network delete \(name)` and `swkvm network define \(name) --subnet`"
        case .noRangeFree:
            "no range of private addresses is free on this host: choose one with `swkvm network define NAME --subnet ADDRESS/BITS`"
        case .bridgeTaken(let name, let bridge):
            "the interface \(bridge) is there and does not belong to the network \(name): remove it with `ip link del \(bridge)`, or define a network with another --bridge"
        case .elsewhere(let name, let process):
            "the network \(name) is up in another network namespace (process \(process)): stop it there first"
        case .leftElsewhere(let name):
            "the process of the network \(name) was killed in another network namespace: run `swkvm network list` there, which repairs it or removes what is left"
        case .notAHostName(let name):
            "the guest of \(name.printable) has no name in its network: dnsmasq takes it for an instruction; rename the machine to have one"
        case .inUse(let name, let ports):
            "the network \(name) is in use (\(ports.map(\.text).joined(separator: ", "))): stop its machines first; `swkvm list` shows them"
        case .isUp(let name): "the network \(name) is up; `swkvm network stop \(name)` takes it down"
        case .notUp(let name): "the network \(name) is not up"
        case .busy: "another swkvm process is changing networks of this host; try again"
        case .unsafeDirectory(let path):
            "\(path.printable) is not a directory of this user that others cannot write to"
        case .system(let purpose, let path, let error):
            "could not \(purpose) \(path.printable): \(error.reason) (\(error.call))"
        case .host(let sentence): sentence
        }
    }

    /// Indicates whether the command line asked for something impossible, and not the host.
    public var isUsage: Bool {
        switch self {
        case .badName, .notDefined, .alreadyDefined, .badSubnet, .badBridge, .bridgeOfAnother: true
        default: false
        }
    }
}
