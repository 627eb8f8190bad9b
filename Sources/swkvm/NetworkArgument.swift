// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import Devices
internal import HostNetwork
internal import Inventory
internal import Machine

/// `--net user,…`, `--net nat,…`, `--net bridge=NAME,…`, `--net tap=NAME,…`, `--net fd=N,…`, `--net stream=PATH,…`
/// or `--net none`.
struct NetworkArgument {
    static let completion = ValueCompletion.list([
        "user%tap/fd/stream/none/bridge/create/offload/queues/nat/macvtap/netns",
        "+publish=%tap/fd/stream/none/nat/macvtap/netns",
        "nat%tap/fd/stream/none/user/publish/bridge/create/macvtap/netns",
        "macvtap=%tap/fd/stream/none/user/publish/bridge/create/mtu/nat/netns",
        "tap=@tap%fd/user/stream/none/nat/macvtap", "bridge=@bridge%fd/user/stream/none/nat/macvtap",
        "create%fd/user/stream/none/nat/macvtap", "netns=%fd/user/stream/none/nat/macvtap",
        "mac=%none", "mac-lock=on/off%none", "mtu=%fd/none/macvtap", "offload=on/off%user/stream/none",
        "queues=%fd/user/stream/none", "rx-bps=%none", "rx-bps-burst=%none", "rx-pps=%none", "rx-pps-burst=%none",
        "tx-bps=%none", "tx-bps-burst=%none", "tx-pps=%none", "tx-pps-burst=%none",
        "fd=%tap/bridge/create/mtu/queues/user/stream/none/publish/nat/macvtap/netns",
        "stream=@file%tap/fd/user/none/bridge/create/offload/queues/publish/nat/macvtap/netns",
        "none%user/publish/tap/bridge/create/mac/mac-lock/mtu/offload/queues/fd/stream/nat/macvtap/netns",
    ])

    /// nil for `none`.
    private(set) var network: Configuration.Network?

    init(parsing argument: String) throws {
        let items = try OptionList(argument).unique(except: ["publish"])
        if items.contains(where: { $0.key == "none" && $0.value == nil }) {
            guard items.count == 1 else { throw ArgumentProblem("none cannot be combined with other words") }
            return
        }
        var words = Words()
        for (key, value) in items { try words.take(key, value) }
        var network = Configuration.Network(
            try words.backend(), mac: words.mac, offload: words.offload, queues: words.queueCount)
        network.isMACLocked = words.isMACLocked
        network.namespace = words.namespace
        network.limits.receive = try words.receive.limit()
        network.limits.transmit = try words.transmit.limit()
        self.network = network
    }

    /// For an IMAGE that boots by itself: a network of the host where root can have one, or else that of the user.
    static var usual: Configuration.Network {
        var network = Configuration.Network(Networks.areAvailable ? .nat(.standard) : .user())
        network.isOptional = true
        return network
    }

    /// The words of an argument, each valid by itself.
    private struct Words {
        var isUser = false
        var network: NetworkName?
        var macvtap: InterfaceName?
        var namespace: String?
        var publish: [PublishedPort] = []
        var stream: String?
        var tap: InterfaceName?
        var bridge: InterfaceName?
        var create = false
        var mac: MACAddress?
        var isMACLocked = false
        var mtu: Int?
        /// Checked when the kind of network is known.
        var statedMTU: String?
        var descriptors: [Int32]?
        var queues: Int?
        var offload: Bool?
        var receive = LimitWords(prefix: "rx-", operations: "pps")
        var transmit = LimitWords(prefix: "tx-", operations: "pps")

        var queueCount: Int { descriptors?.count ?? queues ?? 1 }

        mutating func take(_ key: String, _ value: String?) throws {
            if try receive.take(key, value) || transmit.take(key, value) { return }
            switch (key, value) {
            case ("user", nil): isUser = true
            case ("nat", let value): network = try value.map { try NetworkName($0) } ?? .standard
            case ("publish", let value?): publish.append(try PublishedPort(parsing: value))
            case ("stream", let value?):
                guard !value.isEmpty else { throw ArgumentProblem("stream= needs the path of a socket") }
                stream = value
            case ("tap", let value?): tap = try InterfaceName(value)
            case ("macvtap", let value?): macvtap = try InterfaceName(value)
            case ("netns", let value?): namespace = value
            case ("bridge", let value?): bridge = try InterfaceName(value)
            case ("create", nil): create = true
            case ("mac", let value?): mac = try MACAddress(parsing: value)
            case ("mac-lock", let value): isMACLocked = try onOrOff(key, value)
            case ("mtu", let value?): statedMTU = value
            case ("offload", let value): offload = try onOrOff(key, value)
            case ("queues", let value?):
                guard let number = Int(value), NetworkArgument.possibleQueues.contains(number) else {
                    throw ArgumentProblem(
                        "queues=\(value) is not valid; expected a number from 1 to \(TAPDevice.maximumQueues)")
                }
                queues = number
            case ("fd", let value?): descriptors = try NetworkArgument.descriptors(value)
            default:
                throw ArgumentProblem(
                    "'\(key)\(value.map { "=" + $0 } ?? "")' is not recognized; expected user, publish=, nat, macvtap=, tap=, bridge=, create, netns=, mac=, mac-lock=on|off, mtu=, offload=on|off, queues=, rx-bps=, rx-bps-burst=, rx-pps=, rx-pps-burst=, tx-bps=, tx-bps-burst=, tx-pps=, tx-pps-burst=, fd=, stream= or none"
                )
            }
        }

        mutating func backend() throws(ArgumentProblem) -> NetworkBackend {
            if let statedMTU {
                let possible = isUser || stream != nil ? FrameStream.possibleMTU : NetworkBackend.possibleMTU
                guard let number = Int(statedMTU), possible.contains(number) else {
                    throw ArgumentProblem(
                        "mtu=\(statedMTU) is not a valid MTU; expected \(possible.lowerBound) to \(possible.upperBound)"
                    )
                }
                mtu = number
            }
            if namespace != nil, tap == nil, bridge == nil {
                throw ArgumentProblem("netns= requires tap= or bridge=, which are in that namespace then")
            }
            if let network {
                try checkIsAlone("nat")
                return .nat(network, mtu: mtu)
            }
            if let macvtap {
                try checkIsAlone("macvtap=")
                guard mtu == nil else { throw ArgumentProblem("a macvtap has the MTU of its interface: omit mtu=") }
                return .macvtap(on: macvtap)
            }
            if isUser || stream != nil { return try streamBackend() }
            guard publish.isEmpty else {
                throw ArgumentProblem("publish= requires user: use user,publish=PORT:GUESTPORT")
            }
            if let descriptors {
                guard tap == nil, bridge == nil, !create, mtu == nil else {
                    throw ArgumentProblem(
                        "fd= passes a TAP that is already configured: it cannot be combined with tap=, bridge=, create or mtu="
                    )
                }
                guard queues == nil || queues == descriptors.count else {
                    throw ArgumentProblem(
                        "queues=\(queues ?? 0) needs as many descriptors; fd= has \(descriptors.count). Give one for each queue: fd=3:4"
                    )
                }
                return .descriptors(descriptors)
            }
            guard tap != nil || bridge != nil && !create else {
                throw ArgumentProblem(
                    bridge == nil
                        ? "a network interface needs user, nat, macvtap=NAME, bridge=NAME, tap=NAME, fd=N or stream=PATH"
                        : "create requires tap=NAME")
            }
            guard bridge != nil || !create else { throw ArgumentProblem("create requires bridge=NAME") }
            return .tap(tap, bridge: bridge.map { NetworkBackend.BridgePort($0, create: create) }, mtu: mtu)
        }

        /// Refuses what is of other kinds of networks.
        private func checkIsAlone(_ word: String) throws(ArgumentProblem) {
            let others: [(String, Bool)] = [
                ("user", isUser), ("stream=", stream != nil), ("tap=", tap != nil), ("fd=", descriptors != nil),
                ("bridge=", bridge != nil), ("create", create), ("publish=", !publish.isEmpty),
                ("macvtap=", network != nil && macvtap != nil),
            ]
            if let other = others.first(where: \.1) {
                throw ArgumentProblem(
                    "\(word) cannot be combined with \(other.0): give each interface a --net of its own")
            }
        }

        private func streamBackend() throws(ArgumentProblem) -> NetworkBackend {
            let word = isUser ? "user" : "stream="
            let others: [(String, Bool)] = [
                ("stream=", isUser && stream != nil), ("tap=", tap != nil), ("fd=", descriptors != nil),
                ("bridge=", bridge != nil), ("create", create), ("offload=", offload != nil),
                ("queues=", queues != nil), ("publish=", !isUser && !publish.isEmpty),
            ]
            if let other = others.first(where: \.1) {
                let isInterface = ["stream=", "tap=", "fd="].contains(other.0)
                throw ArgumentProblem(
                    "\(word) cannot be combined with \(other.0)"
                        + (isInterface ? ": give each interface a --net of its own" : ", which is for other networks"))
            }
            return stream.map { .stream(path: $0, mtu: mtu) } ?? .user(publish: publish, mtu: mtu)
        }
    }

    fileprivate static let possibleQueues = 1...TAPDevice.maximumQueues

    /// `7`, or `7:8:9`, one for each queue.
    fileprivate static func descriptors(_ text: String) throws -> [Int32] {
        let descriptors = try text.split(separator: ":", omittingEmptySubsequences: false).map { part in
            guard let number = Int32(part), number >= 0 else {
                throw ArgumentProblem(
                    "fd=\(text) is not a file descriptor number; expected one such as 3, or several with colons between them"
                )
            }
            guard number > 2 else {
                throw ArgumentProblem("fd=\(text) is a standard stream; expected the descriptor of a TAP, 3 or higher")
            }
            return number
        }
        guard possibleQueues.contains(descriptors.count) else {
            throw ArgumentProblem(
                "fd= has \(descriptors.count) descriptors; expected 1 to \(TAPDevice.maximumQueues), one for each queue"
            )
        }
        return descriptors
    }
}
