// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// What a network has changed on the host. It is in a file from before the first change until after the last has been
/// reverted, so that what a killed process has left is known.
public struct NetworkState: Equatable, Sendable {
    public let bridge: InterfaceName
    public let subnet: Subnet
    /// The inode of the network namespace.
    let namespace: UInt64
    /// IPv4 forwarding was off before.
    public internal(set) var hasSetForwarding = false

    public init(bridge: InterfaceName, subnet: Subnet, namespace: UInt64, hasSetForwarding: Bool = false) {
        self.bridge = bridge
        self.subnet = subnet
        self.namespace = namespace
        self.hasSetForwarding = hasSetForwarding
    }

    var text: String {
        "bridge \(bridge)\nsubnet \(subnet)\nnamespace \(namespace)\n" + (hasSetForwarding ? "forwarding set\n" : "")
    }

    /// - Returns: nil for a text that no state has.
    init?(text: String) {
        var bridge: InterfaceName?, subnet: Subnet?, namespace: UInt64?
        for line in text.split(separator: "\n") {
            let words = line.split(separator: " ")
            guard words.count == 2 else { return nil }
            switch words[0] {
            case "bridge": bridge = try? InterfaceName(String(words[1]))
            case "subnet": subnet = Subnet(words[1])
            case "namespace": namespace = UInt64(words[1])
            case "forwarding": hasSetForwarding = true
            default: return nil
            }
        }
        guard let bridge, let subnet, let namespace else { return nil }
        (self.bridge, self.subnet, self.namespace) = (bridge, subnet, namespace)
    }

    /// The state that a network's file has; nil if there is none.
    init?(of files: NetworkFiles) {
        guard let bytes = try? readFile(files.state, limit: 4096),
            let state = NetworkState(text: String(decoding: bytes, as: UTF8.self))
        else { return nil }
        self = state
    }

    /// The inode of this process's network namespace.
    static var currentNamespace: UInt64 { fileStatus(ofPath: "/proc/self/ns/net").map { UInt64($0.st_ino) } ?? 0 }

    /// The host's address.
    public var gateway: IPv4Address { subnet.address(1) }
}

/// IPv4 forwarding of the whole network namespace.
enum Forwarding {
    private static let file = "/proc/sys/net/ipv4/ip_forward"

    static var isOn: Bool { (try? readFile(file, limit: 64))?.first == UInt8(ascii: "1") }

    static func set(_ on: Bool) throws(NetworkError) {
        do throws(SystemCallError) {
            try FileDescriptor.open(file, O_WRONLY).writeAll([UInt8(ascii: on ? "1" : "0")])
        } catch { throw .system(purpose: "write", path: file, error) }
    }

    /// Kinds of interfaces between which a host forwards.
    private static let kinds: Set<String> = ["bridge", "veth", "tun", "wireguard", "macvlan", "ipvlan", "vxlan", "gre"]

    /// Indicates whether the host has an interface besides a network's bridge that may need forwarding: of containers,
    /// of other machines, of a VPN.
    static func mayBeNeeded(_ links: [Link], besides bridge: InterfaceName) -> Bool {
        links.contains { $0.name != bridge && kinds.contains($0.kind) }
    }
}
