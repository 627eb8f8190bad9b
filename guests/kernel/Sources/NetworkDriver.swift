// SPDX-License-Identifier: Apache-2.0

/// A virtio network device (virtio 1.2 §5.1) with one pair of queues.
final class NetworkDevice {
    private static let headerSize: UInt64 = 12
    private static let bufferSize: UInt64 = 2048
    private static let queueSize: UInt32 = 256
    private static let receiveQueue: UInt32 = 0
    private static let transmitQueue: UInt32 = 1
    /// The maximum length of a frame without offloads.
    private static let longestFrame = 65_550

    let name: Text
    let device: VirtioMMIO
    private(set) var features: Features = []
    private(set) var mac: [UInt8] = []
    private(set) var mtu: UInt16 = 1500
    private var receive: Virtqueue
    private var transmit: Virtqueue
    private let receiveBuffers: Address
    private let transmitBuffers: Address

    /// Called with each frame that arrives.
    var deliver: (([UInt8]) -> Void)?

    private(set) var received: UInt64 = 0
    private(set) var sent: UInt64 = 0
    private(set) var receivedBytes: UInt64 = 0
    /// Frames that did not fit in the transmit queue, or arrived damaged.
    private(set) var dropped: UInt64 = 0

    private static var bufferPages: UInt64 { UInt64(queueSize) * bufferSize / PageAllocator.pageSize }

    init(_ device: VirtioMMIO, index: Int) throws(Failure) {
        self.device = device
        name = "eth\(index)"
        guard let receiveBuffers = unsafe pages.allocate(pages: Self.bufferPages),
            let transmitBuffers = unsafe pages.allocate(pages: Self.bufferPages)
        else { throw Failure("no memory for a network device") }
        self.receiveBuffers = receiveBuffers
        self.transmitBuffers = transmitBuffers
        (features, receive, transmit) = try Self.bringUp(device)
        // Before there are buffers: an edge on an unconnected line is lost.
        device.handleInterrupts { [self] in serve() }  // a driver lives as long as the kernel
        begin()
    }

    private static func bringUp(_ device: VirtioMMIO) throws(Failure) -> (Features, Virtqueue, Virtqueue) {
        let features = try device.negotiate([.checksum, .mtu, .macAddress, .mergeableBuffers, .linkStatus, .ring])
        let receive = try Virtqueue(device, index: receiveQueue, wanted: queueSize, features: features)
        let transmit = try Virtqueue(device, index: transmitQueue, wanted: queueSize, features: features)
        device.setDriverOK()
        return (features, receive, transmit)
    }

    private func begin() {
        mac = []
        for place in UInt64(0)..<6 {
            let hashed: UInt8 = place == 0 ? 0x52 : UInt8(truncatingIfNeeded: device.registers.value >> (12 + place))
            mac.append(features.contains(.macAddress) ? device.config8(place) : hashed)
        }
        mtu = features.contains(.mtu) ? max(device.config16(10), 68) : 1500
        for _ in 0..<receive.size { offerBuffer() }
        receive.notify()
        _ = receive.enableInterrupt()
        transmit.disableInterrupt()  // used buffers are collected before the next frame is sent
    }

    /// Initializes a device again that something else has used, or that needs a reset.
    func restart() throws(Failure) {
        (features, receive, transmit) = try Self.bringUp(device)
        begin()
    }

    var linkIsUp: Bool { !features.contains(.linkStatus) || device.config16(6) & 1 != 0 }

    private func offerBuffer() {
        guard let slot = receive.upcomingSingle else { return }
        let buffer = receiveBuffers + UInt64(slot) * Self.bufferSize
        _ = receive.add(Segment(address: buffer, length: UInt32(Self.bufferSize)), readable: 0)
    }

    private func offer(again slot: UInt16) {
        receive.release(slot)
        offerBuffer()
    }

    private func serve() {
        _ = device.acknowledgeInterrupt()
        repeat {
            while let frame = nextFrame() {
                received += 1
                receivedBytes += UInt64(frame.count)
                deliver?(frame)
            }
            receive.notify()
        } while !receive.enableInterrupt()
    }

    /// The next frame, from as many buffers as the device used (§5.1.6.3.2).
    private func nextFrame() -> [UInt8]? {
        guard let (slot, length) = receive.next() else { return nil }
        let first = receiveBuffers + UInt64(slot) * Self.bufferSize
        var buffers = features.contains(.mergeableBuffers) ? Int(first.load(10) as UInt16) : 1
        var frame = take(first, skipping: Self.headerSize, length)
        offer(again: slot)
        while buffers > 1, frame.count < Self.longestFrame, let (slot, length) = receive.next() {
            frame += take(receiveBuffers + UInt64(slot) * Self.bufferSize, skipping: 0, length)
            offer(again: slot)
            buffers -= 1
        }
        return frame
    }

    private func take(_ buffer: Address, skipping skipped: UInt64, _ length: UInt32) -> [UInt8] {
        let length = min(UInt64(length), Self.bufferSize)
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
        reclaim()
        let length = UInt64(frame.count) + Self.headerSize
        guard length <= Self.bufferSize, let slot = transmit.upcomingSingle else {
            dropped += 1
            return false
        }
        let buffer = transmitBuffers + UInt64(slot) * Self.bufferSize
        buffer.fill(count: Self.headerSize)
        if let checksum {
            buffer.store(UInt8(1))  // VIRTIO_NET_HDR_F_NEEDS_CSUM
            buffer.store(UInt16(checksum.start), 6)
            buffer.store(UInt16(checksum.offset), 8)
        }
        (buffer + Self.headerSize).write(frame)
        _ = transmit.add(Segment(address: buffer, length: UInt32(length)), readable: 1)
        sent += 1
        if notify { transmit.notify() }
        return true
    }

    /// Frees the buffers of frames that were sent.
    private func reclaim() {
        while let (slot, _) = transmit.next() { transmit.release(slot) }
    }

    /// Sends a frame and waits until the device has used it. False after five seconds.
    func sendAndWait(_ frame: [UInt8]) -> Bool {
        guard send(frame) else { return false }
        let end = clock.now + 5 * seconds
        while transmit.inFlight > 0 {
            interrupts.dispatch()
            reclaim()
            guard clock.now < end else { return false }
            spinPause()
        }
        return true
    }

    /// Notifies the device of the frames that were added without `notify`.
    func flush() { transmit.notify() }
}
