/// Where a machine's network device gets its frames: what `--net` says about the host's side.
public enum NetworkBackend: Equatable, Sendable {
    /// A TAP of this name (nil: the kernel chooses `swtapN`), used if it is there, created if it is not.
    /// - Parameters:
    ///   - mtu: set on the TAP if given, in bytes; nil leaves a found TAP as it is and gives a created one its bridge's.
    case tap(InterfaceName?, bridge: BridgePort? = nil, mtu: Int? = nil)
    /// A TAP's or macvtap's descriptor from the starting process.
    case descriptor(Int32)

    /// What Linux takes as a TAP's MTU, in bytes.
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

/// A TAP that is ready for a machine. What was changed on the host for it is changed back when the value ends,
/// last change first; also when its making fails half-way.
///
/// A created TAP vanishes, also by `kill -9`. A found one gets its bridge, MTU and state of before. A marked bridge
/// is removed when its last port leaves (``Bridge/mark``).
public struct NetworkAttachment: ~Copyable, Sendable {
    public let tap: TAPDevice
    /// The largest frame without its Ethernet header, in bytes; what the guest should be told.
    public let mtu: Int
    private let changes: HostChanges?

    /// Sets up what `backend` says, in the calling thread's network namespace.
    public init(_ backend: NetworkBackend) throws(HostNetworkError) {
        switch backend {
        case .descriptor(let number):
            let tap = try TAPDevice.inherit(number)
            // The interface may be in a namespace of which we see nothing; Ethernet's own MTU is then the guess.
            let mtu = try RouteNetlink().link(named: tap.name)?.mtu ?? 1500
            self.init(tap: tap, mtu: mtu, changes: nil)
        case .tap(let name, let port, let mtu):
            var changes = HostChanges(netlink: try RouteNetlink(), namespace: try NetworkNamespace.current())
            let tap = try changes.attach(name, to: port, mtu: mtu)
            let given = changes.mtu
            self.init(tap: tap, mtu: given, changes: changes)
        }
    }

    /// For tests and benchmarks: a TAP on which nothing is to be changed.
    package init(tap: consuming TAPDevice, mtu: Int = 1500) {
        self.init(tap: tap, mtu: mtu, changes: nil)
    }

    private init(tap: consuming TAPDevice, mtu: Int, changes: consuming HostChanges?) {
        self.tap = tap
        self.mtu = mtu
        self.changes = changes
    }

    /// How many frames the host dropped because the guest took them too slowly (the TAP's `tx_dropped`); nil when the
    /// interface cannot be seen from here.
    public var hostDrops: UInt64? {
        guard let netlink = try? RouteNetlink() else { return nil }
        return (try? netlink.link(named: tap.name))?.transmitDrops
    }
}
