// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
package import Linux
internal import Synchronization

/// The offloads that the reader of a TAP supports (virtio 1.2 §5.1.3; `TUN_F_*`).
public struct TAPOffloads: OptionSet, Sendable {
    public let rawValue: UInt32
    public init(rawValue: UInt32) { self.rawValue = rawValue }
    /// Packets whose checksum is still to be computed.
    public static let checksum = TAPOffloads(rawValue: UInt32(TUN_F_CSUM))
    /// TCP segments larger than the MTU, over IPv4; needs ``checksum``.
    public static let segmentation4 = TAPOffloads(rawValue: UInt32(TUN_F_TSO4))
    /// The same over IPv6.
    public static let segmentation6 = TAPOffloads(rawValue: UInt32(TUN_F_TSO6))
    /// Such segments with the ECN bit set.
    public static let congestionNotification = TAPOffloads(rawValue: UInt32(TUN_F_TSO_ECN))
    /// UDP datagrams larger than the MTU.
    public static let fragmentation = TAPOffloads(rawValue: UInt32(TUN_F_UFO))
}

/// The user-space end of a TAP (or macvtap) interface: each read takes one Ethernet frame that the host sent,
/// each write gives it one. Non-blocking.
///
/// A TAP that this created is not persistent: it vanishes with its descriptor, however the process ends.
public struct TAPDevice: ~Copyable, Sendable {
    /// The interface's name.
    public let name: InterfaceName
    /// Bytes of `struct virtio_net_hdr_mrg_rxbuf` before each frame: 12; or 0 for an inherited descriptor without
    /// IFF_VNET_HDR.
    public let headerSize: Int
    /// At least one, the first attached, the others not.
    public let queues: [TAPQueue]

    /// The first queue's descriptor, which also serves for what concerns the whole interface.
    public var descriptor: Int32 { queues[0].number }

    /// The virtio 1.x header, which always has `num_buffers` (virtio 1.2 §5.1.6).
    public static let virtioHeaderSize = 12
    /// The most queues of an interface here; Linux has up to 256.
    public static let maximumQueues = 8

    /// Creates a TAP.
    /// - Parameters:
    ///   - name: nil lets the kernel choose `swtapN`.
    ///   - queues: 1 … ``maximumQueues``; more than one makes it a multi-queue interface.
    /// - Throws: `tunMissing`, `tunDenied`, `tapCreationDenied`; `tapBusy` when the name is taken in the meantime.
    public static func create(_ name: InterfaceName?, queues: Int = 1) throws(HostNetworkError) -> TAPDevice {
        let descriptor = try openDriver()
        do {
            let kind = queues > 1 ? UInt32(IFF_MULTI_QUEUE) : 0
            // TUN_EXCL: a TAP that another process has created meanwhile is not ours.
            let given = try attach(descriptor, to: name?.text ?? "swtap%d", UInt32(IFF_TUN_EXCL) | kind)
            return try TAPDevice(descriptor, more: queues - 1, name: given)
        } catch {
            switch (error.errno, name) {
            case (EPERM, _): throw .tapCreationDenied(name)
            case (EBUSY, let name?): throw .tapBusy(name)
            default: throw error
            }
        }
    }

    /// Attaches to a TAP that is there.
    /// - Parameter queues: as ``create(_:queues:)`` has it.
    /// - Throws: `notATAP`, `tapBusy`, `tapDenied`, `oneQueueOnly`, `tunMissing`, `tunDenied`.
    public static func open(_ link: Link, queues: Int = 1) throws(HostNetworkError) -> TAPDevice {
        guard let tun = link.tun, tun.isTAP else { throw .notATAP(link.name, kind: link.kindInWords) }
        // A multi-queue TAP would take a second process and share the frames out between the two.
        guard tun.queues == 0 else { throw .tapBusy(link.name) }
        guard queues == 1 || tun.isMultiQueue else { throw .oneQueueOnly(link.name, wanted: queues) }
        let descriptor = try openDriver()
        do {
            let name = try attach(descriptor, to: link.name.text, tun.isMultiQueue ? UInt32(IFF_MULTI_QUEUE) : 0)
            return try TAPDevice(descriptor, more: queues - 1, name: name)
        } catch {
            switch error.errno {
            case EPERM: throw .tapDenied(link.name)
            case EBUSY: throw .tapBusy(link.name)
            default: throw error
            }
        }
    }

    /// Opens a macvtap that this process has created.
    /// - Throws: `nodeMissing`, `refused`.
    static func open(macvtap link: Link, queues: Int) throws(HostNetworkError) -> TAPDevice {
        var all: [TAPQueue] = []
        for _ in 0..<max(1, queues) {
            let node = try openNode(of: link)
            // The file may be that of another namespace's interface, which may have the same name, too.
            guard address(of: node) == link.address else { throw .nodeMissing(link.name, index: link.index) }
            all.append(try TAPQueue(node, of: link.name, hasHeader: true))
        }
        for queue in all.dropFirst() {
            guard queue.setAttached(false) else {
                throw .refused(action: "detaching a queue of \(link.name)", .last("TUNSETQUEUE"), explanation: "")
            }
        }
        return TAPDevice(all, name: link.name, headerSize: virtioHeaderSize)
    }

    /// The Ethernet address of a macvtap.
    private static func address(of node: borrowing FileDescriptor) -> MACAddress? {
        var bytes = [UInt8](repeating: 0, count: 6)
        // As many bytes as the helper writes.
        guard unsafe clinux_tap_address(node.rawValue, &bytes) >= 0 else { return nil }
        return try? MACAddress(rawValue: bytes.reduce(0) { $0 << 8 | UInt64($1) })
    }

    /// The device file appears with the interface, or a moment later, by udev.
    private static func openNode(of link: Link) throws(HostNetworkError) -> FileDescriptor {
        for _ in 0..<1000 {
            do { return try FileDescriptor.open("/dev/tap\(link.index)", O_RDWR) } catch {
                guard error.errno == ENOENT || error.errno == EACCES else {
                    throw .refused(action: "opening /dev/tap\(link.index)", error, explanation: "")
                }
            }
            usleep(2_000)
        }
        throw .nodeMissing(link.name, index: link.index)
    }

    /// Takes over a descriptor that the starting process passed on: a TAP's, or a macvtap's.
    /// - Throws: as ``inherit(_:)-([Int32])``.
    public static func inherit(_ number: Int32) throws(HostNetworkError) -> TAPDevice { try inherit([number]) }

    /// Takes over descriptors that the starting process passed on, at least one: the queues of one TAP, or of one
    /// macvtap.
    ///
    /// While one of them is not what is wanted (`badDescriptor`), all are left open, as they were found. From then on
    /// they belong to this process: when the kernel does not let them be prepared (`refused`, or `badDescriptor` with
    /// `oneQueue`), they are closed.
    /// - Throws: `badDescriptor`, `refused`.
    public static func inherit(_ numbers: [Int32]) throws(HostNetworkError) -> TAPDevice {
        var first: Passed?
        for number in numbers {
            let passed = try examine(number)
            if let first, first.name != passed.name { throw .badDescriptor(number, .otherInterface(first.name)) }
            if let first, first.hasHeader != passed.hasHeader { throw .badDescriptor(number, .noHeader) }
            first = first ?? passed
        }
        guard let first else { throw .badDescriptor(-1, .notOpen) }
        var queues: [TAPQueue] = []
        for number in numbers {
            _ = clinux_fcntl_value(number, F_SETFD, Int(FD_CLOEXEC))
            queues.append(try TAPQueue(FileDescriptor(owning: number), of: first.name, hasHeader: first.hasHeader))
        }
        for queue in queues.dropFirst() {
            guard queue.setAttached(false) else { throw .badDescriptor(queue.number, .oneQueue(first.name)) }
        }
        guard queues[0].setAttached(true), queues.count == 1 || queues[0].isAttachedInKernel else {
            throw .badDescriptor(queues[0].number, .oneQueue(first.name))
        }
        return TAPDevice(queues, name: first.name, headerSize: first.hasHeader ? virtioHeaderSize : 0)
    }

    /// What a descriptor that was passed on belongs to.
    private struct Passed {
        let name: InterfaceName
        let hasHeader: Bool
    }

    private static func examine(_ number: Int32) throws(HostNetworkError) -> Passed {
        let descriptorFlags = number < 0 ? -1 : clinux_fcntl_value(number, F_GETFD, 0)
        guard descriptorFlags >= 0 else { throw .badDescriptor(number, .notOpen) }
        // What was passed on has come through an exec; all that this process opens, or has taken over before, would
        // not.
        guard descriptorFlags & FD_CLOEXEC == 0 else { throw .badDescriptor(number, .notInherited) }
        guard let (name, flags) = describe(number) else { throw .badDescriptor(number, .notATAP) }
        guard flags & UInt32(IFF_TAP) != 0 else { throw .badDescriptor(number, .isTUN) }
        // TUNGETIFF gives IFF_NO_PI's bit to IFF_NOFILTER too, so netlink is used, which reports it if the interface is
        // in this namespace.
        if try RouteNetlink().link(named: name)?.tun?.hasPacketInformation == true {
            throw .badDescriptor(number, .packetInformation)
        }
        return Passed(name: name, hasHeader: flags & UInt32(IFF_VNET_HDR) != 0)
    }

    /// The interface of a descriptor, and its IFF_* flags; nil for one of something else.
    fileprivate static func describe(_ number: Int32) -> (name: InterfaceName, flags: UInt32)? {
        var name = [CChar](repeating: 0, count: Int(IFNAMSIZ))
        var flags: UInt32 = 0
        // The buffer has IFNAMSIZ bytes, as the helper asks.
        guard unsafe clinux_tun_describe(number, &name, &flags) >= 0 else { return nil }
        return (InterfaceName(fromKernel: text(name)), flags)
    }

    /// - Parameter more: queues besides that of `descriptor`.
    private init(_ descriptor: consuming FileDescriptor, more: Int, name: InterfaceName) throws(HostNetworkError) {
        var queues = [try TAPQueue(descriptor, of: name, hasHeader: true)]
        for _ in 0..<max(0, more) {
            let another = try Self.openDriver()
            _ = try Self.attach(another, to: name.text, UInt32(IFF_MULTI_QUEUE))
            let queue = try TAPQueue(another, of: name, hasHeader: true)
            guard queue.setAttached(false) else {
                throw .refused(action: "detaching a queue of the TAP \(name)", .last("TUNSETQUEUE"), explanation: "")
            }
            queues.append(queue)
        }
        self.init(queues, name: name, headerSize: Self.virtioHeaderSize)
    }

    /// For tests and benchmarks: any non-blocking descriptor that keeps frames apart, such as one of a socket pair.
    package init(_ descriptor: consuming FileDescriptor, name: InterfaceName, headerSize: Int) {
        self.init([TAPQueue(standIn: descriptor)], name: name, headerSize: headerSize)
    }

    /// The same with several, one for each queue.
    package init(_ queues: [TAPQueue], name: InterfaceName, headerSize: Int) {
        self.name = name
        self.headerSize = headerSize
        self.queues = queues
    }

    /// Sets the offloads that the host may leave undone in frames that are read from here on; initially, the set is
    /// empty.
    /// - Returns: whether the kernel accepted it; false for an unknown set, and nothing has changed.
    @discardableResult
    public func setOffloads(_ offloads: TAPOffloads) -> Bool {
        clinux_ioctl_value(descriptor, CLINUX_TUNSETOFFLOAD, UInt(offloads.rawValue)) == 0
    }

    deinit {
        // They outlive the descriptor of a persistent TAP, like the header's size: they are put back as they were
        // found.
        setOffloads([])
    }

    // MARK: Helpers

    private static func openDriver() throws(HostNetworkError) -> FileDescriptor {
        do { return try FileDescriptor.open("/dev/net/tun", O_RDWR) } catch {
            switch error.errno {
            case EPERM, EACCES: throw .tunDenied(error)
            case ENOENT, ENODEV, ENXIO: throw .tunMissing(error)
            default: throw .refused(action: "opening /dev/net/tun", error, explanation: "")
            }
        }
    }

    /// - Returns: the interface's name.
    private static func attach(
        _ descriptor: borrowing FileDescriptor, to name: String, _ more: UInt32
    ) throws(HostNetworkError) -> InterfaceName {
        var buffer = [CChar](repeating: 0, count: Int(IFNAMSIZ))
        for (index, byte) in name.utf8.prefix(buffer.count - 1).enumerated() { buffer[index] = CChar(bitPattern: byte) }
        let flags = UInt32(IFF_TAP) | UInt32(IFF_NO_PI) | UInt32(IFF_VNET_HDR) | more
        // The buffer has IFNAMSIZ bytes, as the helper asks.
        guard unsafe clinux_tun_attach(descriptor.rawValue, &buffer, flags) >= 0 else {
            throw .refused(action: "attaching to the TAP \(name)", .last("TUNSETIFF"), explanation: "")
        }
        return InterfaceName(fromKernel: text(buffer))
    }

    private static func text(_ name: [CChar]) -> String {
        String(decoding: name.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }
}

/// A queue of a TAP, or of a macvtap: a descriptor of its own.
///
/// The host gives frames to attached queues only. A detached one still takes frames for the host.
public final class TAPQueue: Sendable {
    /// For `readv`, `writev` and `epoll`.
    let descriptor: FileDescriptor
    /// The header's size as it was found, in bytes.
    private let foundHeaderSize: Int
    private let hasHeader: Bool
    private let isAttached: Atomic<Bool>
    /// The kernel knows of it.
    private let isReal: Bool

    /// The descriptor's number, valid while the queue lives.
    public var number: Int32 { descriptor.rawValue }

    fileprivate init(
        _ descriptor: consuming FileDescriptor, of name: InterfaceName, hasHeader: Bool
    ) throws(HostNetworkError) {
        do {
            try descriptor.setNonBlocking(true)
            var size: Int32 = 0
            if hasHeader {
                try descriptor.ioctl(CLINUX_TUNGETVNETHDRSZ, &size, named: "TUNGETVNETHDRSZ")
                var wanted = Int32(TAPDevice.virtioHeaderSize)
                try descriptor.ioctl(CLINUX_TUNSETVNETHDRSZ, &wanted, named: "TUNSETVNETHDRSZ")
            }
            foundHeaderSize = Int(size)
        } catch {
            throw .refused(action: "preparing the TAP \(name)", error, explanation: "")
        }
        self.hasHeader = hasHeader
        isAttached = Atomic(Self.isDetached(descriptor.rawValue) == false)
        isReal = true
        self.descriptor = descriptor
    }

    /// For tests and benchmarks: what is attached and detached by this object alone.
    package init(standIn descriptor: consuming FileDescriptor) {
        foundHeaderSize = 0
        hasHeader = false
        isAttached = Atomic(true)
        isReal = false
        self.descriptor = descriptor
    }

    /// Has the host give frames to this queue, or not. What it held for a queue that is detached is lost.
    /// - Returns: whether it is as wanted now; false with `errno` when the kernel refuses, as it does for an interface
    ///   with one queue.
    public func setAttached(_ on: Bool) -> Bool {
        if isAttached.load(ordering: .relaxed) == on { return true }
        guard !isReal || clinux_tun_use_queue(number, on ? 1 : 0) == 0 else { return false }
        isAttached.store(on, ordering: .relaxed)
        return true
    }

    /// Asks the kernel: two descriptors may be one queue.
    fileprivate var isAttachedInKernel: Bool { !isReal || !Self.isDetached(number) }

    /// Only a TUN's descriptor reports it; a macvtap's begins attached.
    private static func isDetached(_ number: Int32) -> Bool {
        TAPDevice.describe(number).map { $0.flags & UInt32(IFF_DETACH_QUEUE) != 0 } ?? false
    }

    deinit {
        guard hasHeader, foundHeaderSize != TAPDevice.virtioHeaderSize else { return }
        var size = Int32(foundHeaderSize)
        _ = try? descriptor.ioctl(CLINUX_TUNSETVNETHDRSZ, &size, named: "TUNSETVNETHDRSZ")
    }
}
