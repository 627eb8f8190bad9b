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
    /// What was there before IPv4 forwarding was switched on; nil if it was on.
    var forwarding: Forwarding.Settings?

    /// IPv4 forwarding was off before.
    public var hasSetForwarding: Bool { forwarding != nil }

    init(bridge: InterfaceName, subnet: Subnet, namespace: UInt64, forwarding: Forwarding.Settings? = nil) {
        self.bridge = bridge
        self.subnet = subnet
        self.namespace = namespace
        self.forwarding = forwarding
    }

    var text: String {
        var text = "bridge \(bridge)\nsubnet \(subnet)\nnamespace \(namespace)\n"
        if let forwarding {
            text += "redirects \(forwarding.acceptsRedirects ? 1 : 0)\n"
            for interface in forwarding.interfaces { text += "forwards \(interface)\n" }
        }
        return text
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
            case "redirects": forwarding = Forwarding.Settings(acceptsRedirects: words[1] == "1", interfaces: [])
            case "forwards":
                guard let name = try? InterfaceName(String(words[1])) else { return nil }
                forwarding?.interfaces.append(name)
            default: return nil
            }
        }
        guard let bridge, let subnet, NetworkDefinition.isUsable(subnet), let namespace else { return nil }
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

    /// Whether something that this process sees is in the network namespace with an inode: a process, or a name
    /// (ip-netns(8)).
    static func isInUse(namespace: UInt64) -> Bool {
        let processes = directoryNames("/proc").filter { Int32($0) != nil }.map { "/proc/\($0)/ns/net" }
        let named = directoryNames("/run/netns").map { "/run/netns/\($0)" }
        return (processes + named).contains { fileStatus(ofPath: $0).map { UInt64($0.st_ino) } == namespace }
    }

    /// The host's address.
    public var gateway: IPv4Address { subnet.address(1) }
}

/// IPv4 forwarding of the whole network namespace.
enum Forwarding {
    /// What the kernel changes besides, when forwarding is switched on and off (Linux, `ip-sysctl`, ip_forward).
    struct Settings: Equatable, Sendable {
        /// `conf/all/accept_redirects`.
        var acceptsRedirects: Bool
        /// Those that forward although forwarding is off for others.
        var interfaces: [InterfaceName]
    }

    private static let directory = "/proc/sys/net/ipv4"
    private static let file = directory + "/ip_forward"

    private static func isOn(_ file: String) -> Bool { (try? readFile(file, limit: 64))?.first == UInt8(ascii: "1") }

    static var isOn: Bool { isOn(file) }

    private static func path(_ interface: InterfaceName) -> String { "\(directory)/conf/\(interface)/forwarding" }

    static var settings: Settings {
        Settings(
            acceptsRedirects: isOn(directory + "/conf/all/accept_redirects"),
            interfaces: directoryNames(directory + "/conf").filter { $0 != "all" && $0 != "default" }
                .map { InterfaceName(fromKernel: $0) }.filter { isOn(path($0)) })
    }

    static func switchOn() throws(NetworkError) { try write(file, true) }

    /// Switches it off, and brings back what was there before.
    static func switchOff(restoring settings: Settings) {
        // What is not there any more needs nothing.
        guard (try? write(file, false)) != nil else { return }
        try? write(directory + "/conf/all/accept_redirects", settings.acceptsRedirects)
        for interface in settings.interfaces { try? write(path(interface), true) }
    }

    private static func write(_ file: String, _ on: Bool) throws(NetworkError) {
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
