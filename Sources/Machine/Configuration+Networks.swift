// SPDX-License-Identifier: Apache-2.0

public import Devices
public import HostNetwork

extension Configuration {
    /// A network interface.
    public struct Network: Sendable {
        public var backend: NetworkBackend
        /// nil: derived from the host's machine-id, the machine's name and the TAP's
        /// (``identity(ofNetwork:interface:)``), so it stays the same from run to run (``HostIdentity``).
        public var mac: MACAddress?
        /// Indicates whether the guest is held to its address: it cannot change it, and frames from another are
        /// dropped.
        public var isMACLocked = false
        /// What it may move in a second.
        public var limits = NetworkLimits.none
        /// Indicates whether the guest may leave checksums and segmentation to the host; nil: decided by what is behind
        /// the interface.
        public var offload: Bool?
        /// Pairs of virtqueues, each with a thread and a queue of the TAP, 1 … ``TAPDevice/maximumQueues``; there are
        /// as many as descriptors that are passed on, and one of a stream.
        public var queues: Int
        /// The machine runs without it where the host does not provide it.
        public var isOptional = false
        /// The network namespace of the interface, by name; nil for the process's own.
        public var namespace: String?

        public init(_ backend: NetworkBackend, mac: MACAddress? = nil, offload: Bool? = nil, queues: Int = 1) {
            self.backend = backend
            self.mac = mac
            self.offload = offload
            self.queues = queues
        }
    }

    /// Refuses network interfaces that cannot be together in one machine.
    /// - Throws: `networks`.
    public func checkNetworks() throws(MachineError) {
        var taps: Set<[String]> = [], descriptors: Set<Int32> = [], addresses: Set<MACAddress> = []
        var ports: Set<[Int]> = []
        for network in networks {
            if metadata != nil, network.queues > 1 { throw .networks(.queuesWithMetadata(network.queues)) }
            switch network.backend {
            case .tap(let name?, _, _):
                guard taps.insert([network.namespace ?? "", name.text]).inserted else {
                    throw .networks(.sameTAP(name))
                }
            case .descriptors(let numbers):
                for number in numbers where !descriptors.insert(number).inserted {
                    throw .networks(.sameDescriptor(number))
                }
            case .user(let published, _):
                // passt accepts no port at two addresses.
                for port in published where !ports.insert([Int(port.port), port.isUDP ? 1 : 0]).inserted {
                    throw .networks(.samePort(port.port, isUDP: port.isUDP))
                }
            case .tap, .stream, .nat, .macvtap: break
            }
            if let address = network.mac, !addresses.insert(address).inserted { throw .networks(.sameAddress(address)) }
        }
    }

    /// The name of a machine that was given none.
    public static let usualName = "swkvm"

    /// Indicates whether the machine was given its name.
    public var hasOwnName: Bool { isNamed ?? (name != Self.usualName) }

    /// What a network interface's address is derived from: the TAP's name, or what cannot be the name of one.
    public func identity(ofNetwork index: Int, interface: String) -> String {
        switch networks[index].backend {
        case .descriptors, .tap(.some, _, _): return interface
        // Each of several machines without a name has an interface, and so an address, of its own.
        case .tap where !hasOwnName, .nat where !hasOwnName, .macvtap where !hasOwnName: return interface
        case .macvtap(let parent):
            let number = networks[..<index].count { if case .macvtap(parent) = $0.backend { true } else { false } }
            return "macvtap on \(parent) \(number)"
        case .tap(_, let port, _):
            let number = networks[..<index].count {
                if case .tap(nil, port, _) = $0.backend { true } else { false }
            }
            return "bridge \(port?.name.text ?? "") \(number)"
        case .nat(let name, _):
            let number = networks[..<index].count { if case .nat(name, _) = $0.backend { true } else { false } }
            return "network \(name) \(number)"
        case .stream(let path, _): return "stream \(path)"
        case .user:
            let number = networks[..<index].count { if case .user = $0.backend { true } else { false } }
            return "user network \(number)"
        }
    }

    /// The MAC address of an interface; nil where it follows from an interface of the host that is chosen at the start.
    public func address(ofNetwork index: Int) -> MACAddress? {
        let network = networks[index]
        if let mac = network.mac { return mac }
        let interface: String
        switch network.backend {
        case .tap(let name?, _, _): interface = name.text
        case .descriptors: return nil
        default: interface = ""
        }
        return HostIdentity().address(
            ofMachine: name, interface: identity(ofNetwork: index, interface: interface))
    }

    /// A conflict between the network interfaces of one machine.
    public enum NetworkProblem: Error, Equatable, Sendable, CustomStringConvertible {
        case sameTAP(InterfaceName)
        case sameDescriptor(Int32)
        case sameAddress(MACAddress)
        case samePort(UInt16, isUDP: Bool)
        case queuesWithMetadata(Int)

        public var description: String {
            switch self {
            case .queuesWithMetadata(let queues):
                "metadata is served with one pair of queues; queues=\(queues) was requested"
            case .sameTAP(let name): "two network interfaces use the TAP \(name): give each a TAP of its own"
            case .sameDescriptor(let number):
                "two network interfaces use the descriptor \(number): give each one of its own"
            case .samePort(let port, let isUDP):
                "port \(port) (\(isUDP ? "UDP" : "TCP")) is published twice: use each port of the host once"
            case .sameAddress(let address):
                "two network interfaces have the MAC address \(address): give each one of its own with mac="
            }
        }
    }
}
