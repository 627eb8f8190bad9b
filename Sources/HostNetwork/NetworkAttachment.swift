// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The host side of a machine's network device, as given by `--net`.
public enum NetworkBackend: Equatable, Sendable {
    /// A TAP of this name (nil: the kernel chooses `swtapN`), used if it is there, created if it is not.
    /// - Parameters:
    ///   - mtu: set on the TAP if given, in bytes; nil leaves a found TAP as it is and gives a created one its
    ///     bridge's.
    case tap(InterfaceName?, bridge: BridgePort? = nil, mtu: Int? = nil)
    /// Descriptors from the starting process, at least one: the queues of a TAP or macvtap.
    case descriptors([Int32])
    /// passt, which gives the guest the network of the user who starts the machine.
    /// - Parameters:
    ///   - publish: ports of the host that lead to the guest.
    ///   - mtu: in bytes, one of ``FrameStream/possibleMTU``; nil for passt's own.
    case user(publish: [PublishedPort] = [], mtu: Int? = nil)
    /// A UNIX socket that a program listens on which carries frames.
    /// - Parameter mtu: as for passt; nil for Ethernet's own.
    case stream(path: String, mtu: Int? = nil)
    /// A TAP that is a port of a network's bridge, which is brought up if it is down.
    /// - Parameter mtu: in bytes; nil for the bridge's.
    case nat(NetworkName, mtu: Int? = nil)
    /// A macvtap that is created on this interface, and removed at the end.
    case macvtap(on: InterfaceName)

    /// A descriptor of an interface with one queue.
    public static func descriptor(_ number: Int32) -> NetworkBackend { .descriptors([number]) }

    /// The MTUs that Linux accepts for a TAP, in bytes.
    public static let possibleMTU = 68...65521

    /// The bridge whose port the TAP becomes.
    public struct BridgePort: Equatable, Sendable {
        public var name: InterfaceName
        /// Create the bridge if it is not there.
        public var create: Bool

        public init(_ name: InterfaceName, create: Bool = false) {
            self.name = name
            self.create = create
        }
    }
}

/// Frames that an interface of the host has dropped.
public struct HostDrops: Equatable, Sendable {
    /// Frames for the guest, mostly because it was too slow.
    public var receive: UInt64
    /// Frames of the guest, after they were accepted.
    public var send: UInt64

    public static let none = HostDrops(0, 0)

    public init(_ receive: UInt64, _ send: UInt64) {
        self.receive = receive
        self.send = send
    }

    /// Those since others; an interface that was replaced by another one begins anew.
    public func since(_ before: HostDrops) -> HostDrops {
        func grown(_ now: UInt64, _ before: UInt64) -> UInt64 { now < before ? now : now - before }
        return HostDrops(grown(receive, before.receive), grown(send, before.send))
    }
}

/// A TAP, or a stream, that is ready for a machine. What was changed on the host for it is changed back when the value
/// ends, last change first; also when its making fails half-way.
///
/// A created TAP vanishes, also by `kill -9`. A found one gets its bridge, MTU and state of before. A marked bridge
/// is removed when its last port leaves (``Bridge/mark``).
public struct NetworkAttachment: ~Copyable, Sendable {
    private enum Carrier: ~Copyable, Sendable {
        case tap(TAPDevice)
        case stream(FrameStream)
    }

    /// The interface's name; what a stream is connected to.
    public let name: String
    private let carrier: Carrier
    /// The largest frame without its Ethernet header, in bytes, as it was found or set at first.
    public let mtu: Int
    /// Indicates whether a guest may leave checksums and segmentation to the host.
    public let offloads: OffloadDecision
    /// The interface's index in the namespace where it was looked up; 0 if it was not found there, and for a stream.
    private let index: Int32
    /// A macvtap's own directions are the guest's, those of a TAP the host's.
    private let isMACVTAP: Bool
    private let changes: HostChanges?
    /// For the interface's counters, on any thread: no socket is opened later.
    private let netlink: Guarded<RouteNetlink?>
    /// What a user is to know of the changes on the host.
    public let notes: [String]
    /// The interface is in the namespace of the process.
    private var isWatched = true

    /// Sets up what `backend` says, in the calling thread's network namespace.
    /// - Parameters:
    ///   - queues: of a TAP that is named, 1 … ``TAPDevice/maximumQueues``; there are as many as descriptors that are
    ///     passed on.
    ///   - offload: whether checksums and segmentation may be left to the host; nil: decided by what is behind
    ///     the TAP.
    ///   - isInterrupted: polled several times a second while a program of the host starts; true cancels that.
    public init(
        _ backend: NetworkBackend, queues: Int = 1, offload: Bool? = nil, isInterrupted: () -> Bool = { false }
    ) throws(HostNetworkError) {
        switch backend {
        case .descriptors(let numbers):
            let tap = try TAPDevice.inherit(numbers)
            if offload == true, tap.headerSize == 0 { throw .badDescriptor(numbers.first ?? -1, .noHeader) }
            // The interface may be in a namespace of which we see nothing; Ethernet's own MTU is then the guess.
            let netlink = try RouteNetlink()
            let link = try netlink.link(named: tap.name)
            let decision = try OffloadDecision.make(offload, hasHeader: tap.headerSize != 0, link: link, netlink)
            self.init(
                tap: tap, mtu: link?.mtu ?? 1500, index: link?.index ?? 0, offloads: decision,
                isMACVTAP: link.map { $0.tun == nil } ?? false, changes: nil)
        case .user(let ports, let mtu):
            let mtu = try Self.checked(mtu) ?? Passt.usualMTU
            self.init(stream: try Passt.start(publishing: ports, mtu: mtu, isInterrupted: isInterrupted), mtu: mtu)
        case .stream(let path, let mtu):
            let mtu = try Self.checked(mtu) ?? FrameStream.usualMTU
            self.init(stream: try FrameStream.connect(to: path), mtu: mtu)
        case .tap(let name, let port, let mtu):
            try self.init(tap: name, port, mtu: mtu, queues: queues, offload: offload)
        case .macvtap(let parent):
            var changes = HostChanges(netlink: try RouteNetlink(), namespace: try NetworkNamespace.current())
            let tap = try changes.createMACVTAP(on: parent, queues: queues)
            let given = changes.mtu, index = changes.tapIndex
            let decision = try changes.decide(offload)
            self.init(tap: tap, mtu: given, index: index, offloads: decision, isMACVTAP: true, changes: changes)
        case .nat(let network, let mtu):
            let membership: Networks.Membership
            do throws(NetworkError) { membership = try Networks().join(network) } catch { throw .nat(error) }
            let port = NetworkBackend.BridgePort(membership.state.bridge)
            try self.init(tap: nil, port, mtu: mtu, queues: queues, offload: offload, notes: membership.report)
            _ = consume membership
        }
    }

    private init(
        tap name: InterfaceName?, _ port: NetworkBackend.BridgePort?, mtu: Int?, queues: Int, offload: Bool?,
        notes: [String] = []
    ) throws(HostNetworkError) {
        var changes = HostChanges(netlink: try RouteNetlink(), namespace: try NetworkNamespace.current())
        let tap = try changes.attach(name, to: port, mtu: mtu, queues: queues)
        let given = changes.mtu, index = changes.tapIndex, notes = notes + changes.notes
        let decision = try changes.decide(offload)
        self.init(
            tap: tap, mtu: given, index: index, offloads: decision, isMACVTAP: false, changes: changes, notes: notes)
    }

    /// Sets up what `backend` says in a network namespace by its name (ip-netns(8)). The link's state cannot be watched
    /// from outside of it.
    public static func inNamespace(
        _ name: String, _ backend: NetworkBackend, queues: Int, offload: Bool?
    ) throws(HostNetworkError) -> NetworkAttachment {
        let own = try NetworkNamespace.current(), other = try NetworkNamespace.named(name)
        try other.enter()
        var attachment: NetworkAttachment
        do throws(HostNetworkError) {
            attachment = try NetworkAttachment(backend, queues: queues, offload: offload)
        } catch {
            try own.enter()
            throw error
        }
        // A machine must not go on in the wrong one: a failure ends its start.
        try own.enter()
        attachment.isWatched = false
        return attachment
    }

    /// Tells the host the guest's address, where it has to know that.
    public func start(with address: MACAddress) throws(HostNetworkError) {
        switch changes {
        case .some(let changes): try changes.start(with: address)
        case .none: break
        }
    }

    private static func checked(_ mtu: Int?) throws(HostNetworkError) -> Int? {
        if let mtu, !FrameStream.possibleMTU.contains(mtu) { throw .badMTU(mtu, possible: FrameStream.possibleMTU) }
        return mtu
    }

    /// For tests and benchmarks: a TAP that is not changed.
    package init(tap: consuming TAPDevice, mtu: Int = 1500) {
        let decision = OffloadDecision(isOn: true, reason: "as requested")
        self.init(tap: tap, mtu: mtu, index: 0, offloads: decision, isMACVTAP: false, changes: nil)
    }

    private init(
        tap: consuming TAPDevice, mtu: Int, index: Int32, offloads: OffloadDecision, isMACVTAP: Bool,
        changes: consuming HostChanges?, notes: [String] = []
    ) {
        self.notes = notes
        name = tap.name.text
        carrier = .tap(tap)
        self.mtu = mtu
        self.index = index
        self.offloads = offloads
        self.isMACVTAP = isMACVTAP
        self.changes = changes
        netlink = Guarded(index == 0 ? nil : try? RouteNetlink())
    }

    package init(stream: consuming FrameStream, mtu: Int = FrameStream.usualMTU) {
        name = stream.name
        carrier = .stream(stream)
        self.mtu = mtu
        index = 0
        offloads = OffloadDecision(isOn: false, reason: "its peer takes complete frames only")
        isMACVTAP = false
        changes = nil
        notes = []
        netlink = Guarded(nil)
    }

    // MARK: Frames

    /// Indicates whether frames are in a byte stream, each behind its length.
    public var isStream: Bool {
        switch carrier {
        case .tap: false
        case .stream: true
        }
    }

    /// Pairs of queues that it can serve.
    public var queueCount: Int {
        switch carrier {
        case .tap(let tap): tap.queues.count
        case .stream: 1
        }
    }

    /// Bytes of the virtio header before each frame, or 0.
    public var headerSize: Int {
        switch carrier {
        case .tap(let tap): tap.headerSize
        case .stream: 0
        }
    }

    /// The number for `epoll` and for reads and writes, valid while this value lives.
    public func descriptor(ofQueue index: Int) -> Int32 {
        switch carrier {
        case .tap(let tap): tap.queues[index].number
        case .stream(let stream): stream.descriptor
        }
    }

    /// A queue of a TAP; nil for a stream.
    public func queue(_ index: Int) -> TAPQueue? {
        switch carrier {
        case .tap(let tap): tap.queues[index]
        case .stream: nil
        }
    }

    /// Sets what the host may leave undone (``TAPDevice/setOffloads(_:)``); for a stream, that is nothing.
    @discardableResult
    public func setOffloads(_ offloads: TAPOffloads) -> Bool {
        switch carrier {
        case .tap(let tap): tap.setOffloads(offloads)
        case .stream: offloads.isEmpty
        }
    }

    /// Closes the connection of a stream, for its peer and for reads and writes here.
    public func endStream() {
        switch carrier {
        case .tap: break
        case .stream(let stream): stream.end()
        }
    }

    // MARK: The host

    /// What another process needs to restore the host's state (``restoreHost()``); empty when nothing was changed.
    public var restoringDescriptors: [Int32] {
        switch changes {
        case .some(let changes): changes.descriptors
        case .none: []
        }
    }

    /// Leaves it to that process to restore the host's state.
    public func delegateRestoring() {
        switch changes {
        case .some(let changes): changes.delegate()
        case .none: break
        }
    }

    /// Restores the host's state; in that process only.
    public func restoreHost() {
        switch changes {
        case .some(let changes): changes.revert()
        case .none: break
        }
    }

    /// Begins to listen to the interface's being switched off and on; nil when it cannot be seen from here, or the
    /// kernel gives no socket.
    public func watchLink() -> LinkWatcher? { index == 0 || !isWatched ? nil : try? LinkWatcher(index: index) }

    /// The numbers of frames that the interface has dropped since it exists; nil if it is not visible from here.
    public var hostDrops: HostDrops? {
        link.map {
            isMACVTAP ? HostDrops($0.receiveDrops, $0.transmitDrops) : HostDrops($0.transmitDrops, $0.receiveDrops)
        }
    }

    private var link: Link? {
        netlink.withLock { try? $0?.link(at: index) }
    }
}
