// SPDX-License-Identifier: Apache-2.0

/// A pair of queues of a network device, with a buffer for each descriptor.
final class QueuePair {
    static let bufferSize: UInt64 = 2048
    private static let queueSize: UInt32 = 256

    fileprivate var receive: Virtqueue
    fileprivate var transmit: Virtqueue
    private let receiveBuffers: Address
    fileprivate let transmitBuffers: Address
    /// Frames that came and went by these queues.
    fileprivate(set) var received: UInt64 = 0
    fileprivate(set) var sent: UInt64 = 0

    private static var bufferPages: UInt64 { UInt64(queueSize) * bufferSize / PageAllocator.pageSize }

    fileprivate init(_ device: VirtioMMIO, number: UInt32, _ features: Features) throws(Failure) {
        guard let receiveBuffers = unsafe pages.allocate(pages: Self.bufferPages),
            let transmitBuffers = unsafe pages.allocate(pages: Self.bufferPages)
        else { throw Failure("no memory for a network device") }
        self.receiveBuffers = receiveBuffers
        self.transmitBuffers = transmitBuffers
        receive = try Self.queue(device, 2 * number, features)
        transmit = try Self.queue(device, 2 * number + 1, features)
    }

    private static func queue(_ device: VirtioMMIO, _ index: UInt32, _ features: Features) throws(Failure) -> Virtqueue
    {
        try Virtqueue(device, index: index, wanted: queueSize, features: features)
    }

    /// Sets the queues up again after a reset of the device.
    fileprivate func restart(_ device: VirtioMMIO, _ features: Features) throws(Failure) {
        receive = try Self.queue(device, receive.index, features)
        transmit = try Self.queue(device, transmit.index, features)
    }

    fileprivate func begin() {
        for _ in 0..<receive.size { offerBuffer() }
        receive.notify()
        _ = receive.enableInterrupt()
        transmit.disableInterrupt()  // used buffers are collected before the next frame is sent
    }

    private func offerBuffer() {
        guard let slot = receive.upcomingSingle else { return }
        _ = receive.add(Segment(address: buffer(slot), length: UInt32(Self.bufferSize)), readable: 0)
    }

    fileprivate func buffer(_ slot: UInt16) -> Address { receiveBuffers + UInt64(slot) * Self.bufferSize }

    fileprivate func offer(again slot: UInt16) {
        receive.release(slot)
        offerBuffer()
    }

    /// Frees the buffers of frames that were sent.
    fileprivate func reclaim() {
        while let (slot, _) = transmit.next() { transmit.release(slot) }
    }
}

/// A virtio network device (virtio 1.2 §5.1) with a pair of queues, or two where the device has several.
final class NetworkDevice {
    private static let headerSize: UInt64 = 12
    /// The maximum length of a frame without offloads.
    private static let longestFrame = 65_550

    let name: Text
    let device: VirtioMMIO
    private(set) var features: Features = []
    private(set) var mac: [UInt8] = []
    private(set) var mtu: UInt16 = 1500
    private(set) var pairs: [QueuePair] = []
    /// The pair that sends the next frame: they take turns.
    private var turn = 0

    /// Called with each frame that arrives.
    var deliver: (([UInt8]) -> Void)?

    private(set) var received: UInt64 = 0
    private(set) var sent: UInt64 = 0
    private(set) var receivedBytes: UInt64 = 0
    /// Frames that did not fit in the transmit queue, or arrived damaged.
    private(set) var dropped: UInt64 = 0

    init(_ device: VirtioMMIO, index: Int) throws(Failure) {
        self.device = device
        name = "eth\(index)"
        // Before there are buffers: an edge on an unconnected line is lost.
        device.handleInterrupts { [self] in serve() }  // a driver lives as long as the kernel
        try bringUp()
    }

    private func bringUp() throws(Failure) {
        features = try device.negotiate([
            .checksum, .mtu, .macAddress, .mergeableBuffers, .linkStatus, .controlQueue, .queuePairs, .ring,
        ])
        if pairs.isEmpty {
            for number in 0..<(features.contains(.queuePairs) ? UInt32(2) : 1) {
                pairs.append(try QueuePair(device, number: number, features))
            }
        } else {
            for pair in pairs { try pair.restart(device, features) }
        }
        // Behind all pairs that the device has (§5.1.2).
        let control =
            try features.contains(.queuePairs)
            ? Virtqueue(device, index: 2 * UInt32(device.config16(8)), wanted: 4, features: features) : nil
        device.setDriverOK()
        mac = []
        for place in UInt64(0)..<6 {
            let hashed: UInt8 = place == 0 ? 0x52 : UInt8(truncatingIfNeeded: device.registers.value >> (12 + place))
            mac.append(features.contains(.macAddress) ? device.config8(place) : hashed)
        }
        mtu = features.contains(.mtu) ? max(device.config16(10), 68) : 1500
        for pair in pairs { pair.begin() }
        if let control { try usePairs(control) }
    }

    /// Has the device use all pairs that have queues (VQ_PAIRS_SET, §5.1.6.5.5).
    private func usePairs(_ control: Virtqueue) throws(Failure) {
        guard let page = unsafe pages.allocate(pages: 1) else { throw Failure("no memory for a command") }
        defer { unsafe pages.release(page, pages: 1) }
        page.store(UInt8(4))
        page.store(UInt8(0), 1)
        page.store(UInt16(pairs.count), 2)
        page.store(UInt8(0xff), 4)
        control.disableInterrupt()
        _ = control.add(Segment(address: page, length: 4), Segment(address: page + 4, length: 1), readable: 1)
        control.notify()
        let end = clock.now + 5 * seconds
        while control.next() == nil {
            guard clock.now < end else { throw Failure("\(name): no answer to VQ_PAIRS_SET") }
            spinPause()
        }
        guard page.load(4) as UInt8 == 0 else { throw Failure("\(name): the device refuses two pairs of queues") }
    }

    /// Initializes a device again that something else has used, or that needs a reset.
    func restart() throws(Failure) { try bringUp() }

    var linkIsUp: Bool { !features.contains(.linkStatus) || device.config16(6) & 1 != 0 }

    private func serve() {
        _ = device.acknowledgeInterrupt()
        for pair in pairs {
            repeat {
                while let frame = nextFrame(pair) {
                    received += 1
                    pair.received += 1
                    receivedBytes += UInt64(frame.count)
                    deliver?(frame)
                }
                pair.receive.notify()
            } while !pair.receive.enableInterrupt()
        }
    }

    /// The next frame, from as many buffers as the device used (§5.1.6.3.2).
    private func nextFrame(_ pair: QueuePair) -> [UInt8]? {
        guard let (slot, length) = pair.receive.next() else { return nil }
        let first = pair.buffer(slot)
        var buffers = features.contains(.mergeableBuffers) ? Int(first.load(10) as UInt16) : 1
        var frame = take(first, skipping: Self.headerSize, length)
        pair.offer(again: slot)
        while buffers > 1, frame.count < Self.longestFrame, let (slot, length) = pair.receive.next() {
            frame += take(pair.buffer(slot), skipping: 0, length)
            pair.offer(again: slot)
            buffers -= 1
        }
        return frame
    }

    private func take(_ buffer: Address, skipping skipped: UInt64, _ length: UInt32) -> [UInt8] {
        let length = min(UInt64(length), QueuePair.bufferSize)
        guard length > skipped else {
            dropped += 1
            return []
        }
        return (buffer + skipped).bytes(Int(length - skipped))
    }

    /// Adds a frame to the queue. False if it is too long or the queue is full. Without `notify`, `flush` submits it.
    /// - Parameter checksum: where the checksummed part begins, and the checksum's offset from there (§5.1.6.2).
    @discardableResult
    func send(_ frame: [UInt8], checksum: (start: Int, offset: Int)? = nil, notify: Bool = true) -> Bool {
        let pair = pairs[turn]
        pair.reclaim()
        let length = UInt64(frame.count) + Self.headerSize
        guard length <= QueuePair.bufferSize, let slot = pair.transmit.upcomingSingle else {
            dropped += 1
            return false
        }
        let buffer = pair.transmitBuffers + UInt64(slot) * QueuePair.bufferSize
        buffer.fill(count: Self.headerSize)
        if let checksum {
            buffer.store(UInt8(1))  // VIRTIO_NET_HDR_F_NEEDS_CSUM
            buffer.store(UInt16(checksum.start), 6)
            buffer.store(UInt16(checksum.offset), 8)
        }
        (buffer + Self.headerSize).write(frame)
        _ = pair.transmit.add(Segment(address: buffer, length: UInt32(length)), readable: 1)
        sent += 1
        pair.sent += 1
        if notify { pair.transmit.notify() }
        turn = turn + 1 < pairs.count ? turn + 1 : 0
        return true
    }

    /// Sends a frame and waits until the device has used it. False after five seconds.
    func sendAndWait(_ frame: [UInt8]) -> Bool {
        guard send(frame) else { return false }
        let end = clock.now + 5 * seconds
        while true {
            var inFlight = 0
            for pair in pairs { inFlight += pair.transmit.inFlight }
            if inFlight == 0 { return true }
            interrupts.dispatch()
            for pair in pairs { pair.reclaim() }
            guard clock.now < end else { return false }
            spinPause()
        }
    }

    /// Notifies the device of the frames that were added without `notify`.
    func flush() { for pair in pairs { pair.transmit.notify() } }
}
