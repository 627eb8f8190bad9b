// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux
internal import Synchronization

/// What was changed on the host, and how to change it back.
struct HostChanges: ~Copyable, Sendable {
    private enum Change {
        case master(Link), mtu(Link, former: Int), up(Link), created(Link)
    }

    private let netlink: RouteNetlink
    private let namespace: NetworkNamespace
    /// What to undo, in the order it was done.
    private var changes: [Change] = []
    private var bridge: InterfaceName?
    /// The index of the TAP, 0 before there is one.
    private(set) var tapIndex: Int32 = 0
    /// The TAP's MTU.
    private(set) var mtu = 0
    /// What a user is to know.
    private(set) var notes: [String] = []
    /// Another process changes it back.
    private let isDelegated = Atomic<Bool>(false)

    init(netlink: consuming RouteNetlink, namespace: consuming NetworkNamespace) {
        self.netlink = netlink
        self.namespace = namespace
    }

    mutating func attach(
        _ name: InterfaceName?, to port: NetworkBackend.BridgePort?, mtu wanted: Int?, queues: Int
    ) throws(HostNetworkError) -> TAPDevice {
        if let wanted, !NetworkBackend.possibleMTU.contains(wanted) { throw .badMTU(wanted) }
        // One machine at a time: no bridge is removed between another machine's finding it and becoming its port.
        try namespace.lock()
        defer { namespace.unlock() }

        let bridge = try findOrCreate(port)
        var found: Link?
        if let name { found = try netlink.link(named: name) }
        if let found, let bridge, found.master != 0, found.master != bridge.index {
            let current = try netlink.link(at: found.master)?.name ?? found.name
            throw .portOfAnother(tap: found.name, current: current, wanted: bridge.name)
        }
        let tap: TAPDevice
        if let found {
            tap = try TAPDevice.open(found, queues: queues)
        } else {
            tap = try TAPDevice.create(name, queues: queues)
        }
        guard let link = try netlink.link(named: tap.name) else {
            throw .refused(
                action: "looking for \(tap.name)", SystemCallError("RTM_GETLINK", errno: ENODEV), explanation: "")
        }
        tapIndex = link.index
        mtu = wanted ?? (found == nil ? bridge?.mtu : nil) ?? link.mtu
        if link.mtu != mtu {
            try netlink.set(link, mtu: mtu)
            note(.mtu(link, former: link.mtu), found)
        }
        if let bridge, link.master != bridge.index {
            try netlink.set(link, master: bridge)
            // Also for a created TAP: a child process that inherited its descriptor may keep it for a while, but not in
            // the bridge.
            changes.append(.master(link))
        }
        // A port's frames are the bridge's, and a TAP that is there already is its owner's.
        if found == nil, bridge == nil { notes += [HostIPv6.withoutRouters.apply(to: link.name)].compactMap { $0 } }
        if !link.isUp {
            try netlink.set(link, up: true)
            note(.up(link), found)
        }
        return tap
    }

    /// Creates a macvtap on another interface. It is off until ``start(with:)``.
    mutating func createMACVTAP(on parent: InterfaceName, queues: Int) throws(HostNetworkError) -> TAPDevice {
        guard let lower = try netlink.link(named: parent) else { throw .interfaceMissing(parent) }
        let link = try createLink(on: lower)
        changes.append(.created(link))
        tapIndex = link.index
        mtu = link.mtu
        return try TAPDevice.open(macvtap: link, queues: queues)
    }

    /// One with the first free name: the kernel would choose one, but not report it.
    ///
    /// The device files of all network namespaces are in one directory, and named after the interfaces' indices, of
    /// which the kernel gives each namespace the same small ones. So the index is one that hardly another one has.
    private func createLink(on lower: Link) throws(HostNetworkError) -> Link {
        for number in 0..<10_000 {
            let name = InterfaceName(fromKernel: "swmac\(number)")
            do throws(HostNetworkError) {
                try netlink.createMACVTAP(
                    name, on: lower, index: .random(in: 100_000..<100_000_000), address: .random())
            } catch {
                guard error.errno == EEXIST else { throw error }
                continue
            }
            if let link = try netlink.link(named: name) { return link }
        }
        throw .refused(
            action: "creating a macvtap on \(lower.name)", SystemCallError("RTM_NEWLINK", errno: EEXIST),
            explanation: "")
    }

    /// Switches a created macvtap on, with the guest's address: it gets the frames for that one only.
    func start(with address: MACAddress) throws(HostNetworkError) {
        for case .created(let link) in changes {
            try netlink.set(link, address: address)
            try netlink.startWithAllMulticast(link)
        }
    }

    /// Indicates whether a guest may leave checksums and segmentation to what is behind the TAP.
    func decide(_ wanted: Bool?) throws(HostNetworkError) -> OffloadDecision {
        try OffloadDecision.make(wanted, hasHeader: true, link: try netlink.link(at: tapIndex), netlink)
    }

    private mutating func findOrCreate(_ port: NetworkBackend.BridgePort?) throws(HostNetworkError) -> Link? {
        guard let port else { return nil }
        if port.create, try netlink.link(named: port.name) == nil {
            bridge = port.name
            let created = try Bridge.create(port.name, netlink)
            // It has no port yet.
            notes += [HostIPv6.withoutRouters.apply(to: port.name)].compactMap { $0 }
            return created
        }
        let found = try Bridge.find(port.name, netlink)
        bridge = port.name
        return found
    }

    /// Remembers a change of a TAP that was found; one that was created takes its changes with it.
    private mutating func note(_ change: Change, _ found: Link?) {
        if found != nil { changes.append(change) }
    }

    /// What it takes to change it back; empty when nothing was changed.
    var descriptors: [Int32] {
        changes.isEmpty && bridge == nil ? [] : [netlink.rawValue, namespace.descriptor.rawValue]
    }

    /// Leaves it to another process, which calls ``revert()``.
    func delegate() { isDelegated.store(true, ordering: .relaxed) }

    deinit {
        if !isDelegated.load(ordering: .relaxed) { revert() }
    }

    func revert() {
        // A failure is not reported: the interface was removed meanwhile, or the privilege to change it.
        for change in changes.reversed() {
            switch change {
            case .up(let link): try? netlink.set(link, up: false)
            case .master(let link): try? netlink.set(link, master: nil)
            case .mtu(let link, let former): try? netlink.set(link, mtu: former)
            case .created(let link): try? netlink.delete(link)
            }
        }
        guard let bridge, (try? namespace.lock()) != nil else { return }
        try? Bridge.removeIfUnused(bridge, except: tapIndex, netlink)
        namespace.unlock()
    }
}
