// SPDX-License-Identifier: Apache-2.0

internal import HostNetwork
public import Virtio

/// Features of a network device (virtio 1.2 §5.1.3). GUEST is what the driver takes, HOST what the device takes.
extension FeatureSet {
    /// VIRTIO_NET_F_CSUM: the device takes packets whose checksum is still to be computed.
    public static let checksum = FeatureSet(bit: 0)
    public static let guestChecksum = FeatureSet(bit: 1)
    /// VIRTIO_NET_F_CTRL_GUEST_OFFLOADS: the driver changes its offloads while it runs.
    public static let controlGuestOffloads = FeatureSet(bit: 2)
    /// VIRTIO_NET_F_MTU: the configuration space names the MTU.
    public static let mtu = FeatureSet(bit: 3)
    /// VIRTIO_NET_F_MAC: the configuration space names the address.
    public static let mac = FeatureSet(bit: 5)
    public static let guestTSO4 = FeatureSet(bit: 7)
    public static let guestTSO6 = FeatureSet(bit: 8)
    public static let guestECN = FeatureSet(bit: 9)
    public static let guestUFO = FeatureSet(bit: 10)
    public static let hostTSO4 = FeatureSet(bit: 11)
    public static let hostTSO6 = FeatureSet(bit: 12)
    public static let hostECN = FeatureSet(bit: 13)
    public static let hostUFO = FeatureSet(bit: 14)
    /// VIRTIO_NET_F_MRG_RXBUF: a packet may be spread over several receive buffers.
    public static let mergeableBuffers = FeatureSet(bit: 15)
    /// VIRTIO_NET_F_STATUS: the configuration space shows whether the link is up.
    public static let linkStatus = FeatureSet(bit: 16)
    /// VIRTIO_NET_F_CTRL_VQ: there is a control queue.
    public static let controlQueue = FeatureSet(bit: 17)
    public static let controlReceiveMode = FeatureSet(bit: 18)
    /// VIRTIO_NET_F_MQ: there are several pairs of queues, and the driver chooses how many it uses.
    public static let networkMultiqueue = FeatureSet(bit: 22)
    public static let controlMACAddress = FeatureSet(bit: 23)
    /// VIRTIO_NET_F_VQ_NOTF_COAL (virtio 1.3): the driver says for each queue how its interrupts are coalesced.
    public static let queueCoalescing = FeatureSet(bit: 52)
    /// VIRTIO_NET_F_NOTF_COAL: the same for all receive, and for all transmit queues.
    public static let typeCoalescing = FeatureSet(bit: 53)
    static let coalescing: FeatureSet = [.queueCoalescing, .typeCoalescing]

    /// What a driver may take from the device; CTRL_GUEST_OFFLOADS uses the same bits (§5.1.6.5.6).
    static let guestOffloads: FeatureSet = [.guestChecksum, .guestTSO4, .guestTSO6, .guestECN, .guestUFO]
    /// The guest's offloads that make packets larger than the MTU.
    static let largeGuestPackets: FeatureSet = [.guestTSO4, .guestTSO6, .guestUFO]
    private static let hostSegmentation: FeatureSet = [.hostTSO4, .hostTSO6, .hostUFO]

    /// Indicates whether each feature comes with those that it requires (§5.1.3.1).
    var isConsistentForNetwork: Bool {
        func requires(_ some: FeatureSet, anyOf needed: FeatureSet) -> Bool {
            isDisjoint(with: some) || !isDisjoint(with: needed)
        }
        return requires(Self.largeGuestPackets, anyOf: .guestChecksum)
            && requires(.guestECN, anyOf: [.guestTSO4, .guestTSO6])
            && requires(Self.hostSegmentation, anyOf: .checksum)
            && requires(.hostECN, anyOf: [.hostTSO4, .hostTSO6])
            && requires(
                [
                    .controlReceiveMode, .controlMACAddress, .controlGuestOffloads, .networkMultiqueue,
                    .queueCoalescing, .typeCoalescing,
                ],
                anyOf: .controlQueue)
    }

    /// What the TAP may leave undone for a driver with these guest offloads.
    var tapOffloads: TAPOffloads {
        var offloads: TAPOffloads = []
        if contains(.guestChecksum) { offloads.insert(.checksum) }
        if contains(.guestTSO4) { offloads.insert(.segmentation4) }
        if contains(.guestTSO6) { offloads.insert(.segmentation6) }
        if contains(.guestECN) { offloads.insert(.congestionNotification) }
        if contains(.guestUFO) { offloads.insert(.fragmentation) }
        return offloads
    }

    /// What can be offered in front of a TAP or a stream.
    /// - Parameter withOffloads: whether what is behind it finishes what a driver leaves undone.
    static func offered(before host: borrowing NetworkAttachment, withOffloads: Bool) -> FeatureSet {
        var features: FeatureSet = [
            .mac, .linkStatus, .mtu, .mergeableBuffers, .controlQueue, .controlReceiveMode, .controlMACAddress,
            .queueCoalescing, .typeCoalescing,
        ]
        if host.queueCount > 1 { features.insert(.networkMultiqueue) }
        // Without a header, unfinished offloads cannot be described.
        guard withOffloads, host.headerSize == TAPDevice.virtioHeaderSize else { return features }
        let offloads: FeatureSet = [.guestChecksum, .guestTSO4, .guestTSO6, .guestECN]
        if host.setOffloads(offloads.tapOffloads) {
            features.formUnion(offloads)
            features.formUnion([.checksum, .hostTSO4, .hostTSO6, .hostECN, .controlGuestOffloads])
        }
        if host.setOffloads(offloads.union(.guestUFO).tapOffloads) { features.formUnion([.guestUFO, .hostUFO]) }
        host.setOffloads([])
        return features
    }
}
