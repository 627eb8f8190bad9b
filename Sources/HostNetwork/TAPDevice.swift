// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
public import Linux

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
    /// The header's size as it was found, in bytes.
    let foundHeaderSize: Int
    /// The descriptor for `readv`, `writev` and `epoll`.
    public let descriptor: FileDescriptor

    /// The virtio 1.x header, which always has `num_buffers` (virtio 1.2 §5.1.6).
    public static let virtioHeaderSize = 12

    /// Creates a TAP.
    /// - Parameter name: nil lets the kernel choose `swtapN`.
    /// - Throws: `tunMissing`, `tunDenied`, `tapCreationDenied`; `tapBusy` when the name is taken in the meantime.
    public static func create(_ name: InterfaceName?) throws(HostNetworkError) -> TAPDevice {
        let descriptor = try openDriver()
        do {
            // TUN_EXCL: a TAP that somebody else made since we looked is not ours.
            let given = try attach(descriptor, to: name?.text ?? "swtap%d", UInt32(IFF_TUN_EXCL))
            return try TAPDevice(descriptor, name: given)
        } catch {
            switch (error.errno, name) {
            case (EPERM, _): throw .tapCreationDenied(name)
            case (EBUSY, let name?): throw .tapBusy(name)
            default: throw error
            }
        }
    }

    /// Attaches to a TAP that is there.
    /// - Throws: `notATAP`, `tapBusy`, `tapDenied`, `tunMissing`, `tunDenied`.
    public static func open(_ link: Link) throws(HostNetworkError) -> TAPDevice {
        guard let tun = link.tun, tun.isTAP else { throw .notATAP(link.name, kind: link.kindInWords) }
        // A multi-queue TAP would take a second process and share the frames out between the two.
        guard tun.queues == 0 else { throw .tapBusy(link.name) }
        let descriptor = try openDriver()
        do {
            let name = try attach(descriptor, to: link.name.text, tun.isMultiQueue ? UInt32(IFF_MULTI_QUEUE) : 0)
            return try TAPDevice(descriptor, name: name)
        } catch {
            switch error.errno {
            case EPERM: throw .tapDenied(link.name)
            case EBUSY: throw .tapBusy(link.name)
            default: throw error
            }
        }
    }

    /// Takes over a descriptor that the starting process passed on: a TAP's, or a macvtap's.
    ///
    /// One that is not what is wanted (`badDescriptor`) is left open, as it was found. From then on it belongs to this
    /// process: when the kernel does not let it be prepared (`refused`), it is closed.
    /// - Throws: `badDescriptor`, `refused`.
    public static func inherit(_ number: Int32) throws(HostNetworkError) -> TAPDevice {
        let descriptorFlags = number < 0 ? -1 : clinux_fcntl_value(number, F_GETFD, 0)
        guard descriptorFlags >= 0 else { throw .badDescriptor(number, .notOpen) }
        // What was passed on has come through an exec; all that this process opens, or has taken over before, would
        // not.
        guard descriptorFlags & FD_CLOEXEC == 0 else { throw .badDescriptor(number, .notInherited) }
        var name = [CChar](repeating: 0, count: Int(IFNAMSIZ))
        var flags: UInt32 = 0
        // The buffer has IFNAMSIZ bytes, as the helper asks.
        guard unsafe clinux_tun_describe(number, &name, &flags) >= 0 else { throw .badDescriptor(number, .notATAP) }
        guard flags & UInt32(IFF_TAP) != 0 else { throw .badDescriptor(number, .isTUN) }
        let interface = InterfaceName(fromKernel: text(name))
        // TUNGETIFF gives IFF_NO_PI's bit to IFF_NOFILTER too, so netlink is asked, which tells if the interface is in
        // this namespace.
        if try RouteNetlink().link(named: interface)?.tun?.hasPacketInformation == true {
            throw .badDescriptor(number, .packetInformation)
        }
        _ = clinux_fcntl_value(number, F_SETFD, Int(FD_CLOEXEC))
        return try TAPDevice(
            FileDescriptor(owning: number), name: interface, hasHeader: flags & UInt32(IFF_VNET_HDR) != 0)
    }

    private init(
        _ descriptor: consuming FileDescriptor, name: InterfaceName, hasHeader: Bool = true
    ) throws(HostNetworkError) {
        do {
            try descriptor.setNonBlocking(true)
            var size: Int32 = 0
            if hasHeader {
                try descriptor.ioctl(CLINUX_TUNGETVNETHDRSZ, &size, named: "TUNGETVNETHDRSZ")
                var wanted = Int32(Self.virtioHeaderSize)
                try descriptor.ioctl(CLINUX_TUNSETVNETHDRSZ, &wanted, named: "TUNSETVNETHDRSZ")
            }
            foundHeaderSize = Int(size)
        } catch {
            throw .refused(action: "preparing the TAP \(name)", error, explanation: "")
        }
        self.name = name
        headerSize = hasHeader ? Self.virtioHeaderSize : 0
        self.descriptor = descriptor
    }

    /// For tests and benchmarks: any non-blocking descriptor that keeps frames apart, such as one of a socket pair.
    package init(_ descriptor: consuming FileDescriptor, name: InterfaceName, headerSize: Int) {
        self.name = name
        self.headerSize = headerSize
        foundHeaderSize = headerSize
        self.descriptor = descriptor
    }

    /// Tells the host what it may leave undone in frames that are read from here on; an empty set is the state at the
    /// start.
    /// - Returns: whether the kernel took it; false for a set that it does not know, with nothing changed.
    @discardableResult
    public func setOffloads(_ offloads: TAPOffloads) -> Bool {
        clinux_ioctl_value(descriptor.rawValue, CLINUX_TUNSETOFFLOAD, UInt(offloads.rawValue)) == 0
    }

    /// Makes the interface stay when its last descriptor is closed, or not.
    package func setPersistent(_ on: Bool) throws(HostNetworkError) {
        do { try descriptor.ioctl(CLINUX_TUNSETPERSIST, on ? 1 : 0, named: "TUNSETPERSIST") } catch {
            throw .refused(action: "making the TAP \(name) \(on ? "" : "not ")persistent", error, explanation: "")
        }
    }

    deinit {
        // Both outlive the descriptor of a persistent TAP: they are put back as they were found.
        setOffloads([])
        if headerSize != foundHeaderSize {
            var size = Int32(foundHeaderSize)
            _ = try? descriptor.ioctl(CLINUX_TUNSETVNETHDRSZ, &size, named: "TUNSETVNETHDRSZ")
        }
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
