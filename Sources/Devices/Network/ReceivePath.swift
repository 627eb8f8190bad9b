// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux
internal import Virtio

/// From the TAP to the guest: frames are read straight into the buffers of the receive queue (virtio 1.2 §5.1.6.3).
///
/// A frame stays in the TAP for as long as there is no buffer at all. One that turns out longer than the buffers there
/// are has its end in the spill, private memory, until the driver adds more. Frames of a ``FrameStream`` are copied out
/// of its reader's buffer.
struct ReceivePath: ~Copyable {
    /// Why a run ended.
    enum Outcome {
        /// The TAP has no more frames.
        case drained
        /// The driver has no more buffers, and will kick when it adds one.
        case starved
        /// Enough for now; there may be more.
        case paused
        /// The limits allow no more for now: the throttle's timer runs.
        case limited
        /// The TAP, or the stream, is no more.
        case gone
    }

    /// What the driver negotiated.
    struct Mode {
        var isMergeable = false
        var hasChecksum = false
        /// The longest frame to be expected, header included.
        var longestFrame: UInt64 = 0
        /// The longest frame that the driver may be given unless it is one to be segmented, or has a VLAN tag; header
        /// included.
        var longestPlainFrame = Int.max
    }

    /// A frame whose first `inBuffers` bytes are in the window and the rest in the spill.
    private struct Pending {
        var count: Int
        var inBuffers: Int
    }

    /// What happened since the counters were last written.
    private struct Tally {
        var frames: UInt64 = 0
        var bytes: UInt64 = 0
        var tooLong: UInt64 = 0
        var aboveMTU: UInt64 = 0
        var badBuffers: UInt64 = 0
    }

    /// The longest frame that Linux makes, with VLAN tag and header, fits; a read that fills it was cut.
    private static let spillSize = 128 << 10
    /// Frames, and buffers returned unused, in one run; the rest waits for the next turn.
    private static let budget = 256

    private let tap: Int32
    private let headerSize: Int
    /// nil for a TAP.
    private var reader: FrameReader?
    /// The length for which a stream's framing was lost, if it was.
    private(set) var impossibleLength: UInt32?
    private let counters: NetworkCounters
    private let moved: NetworkCounters.Pair
    private let events: DeviceEvents
    private let spill: Mapping
    private var queue: Virtqueue?
    private var interrupt: QueueInterrupt?
    private var coalescer: InterruptCoalescer
    private var window = BufferWindow()
    private var pending: Pending?
    private var tally = Tally()
    /// nil without limits.
    private var throttle: Throttle?
    /// nil without metadata.
    private let metadata: MetadataLink?
    var mode = Mode()

    /// - Parameters:
    ///   - reader: of a stream, which takes the place of the TAP; nil for a TAP.
    ///   - spill: from ``makeSpill()``.
    ///   - coalescer: of the receive queue.
    ///   - pair: whose frames are counted.
    ///   - throttle: nil without limits.
    ///   - metadata: nil without it.
    init(
        tap: Int32, headerSize: Int, reader: consuming FrameReader? = nil, spill: consuming Mapping,
        coalescer: consuming InterruptCoalescer, counters: NetworkCounters, pair: Int, events: DeviceEvents,
        throttle: consuming Throttle? = nil, metadata: MetadataLink? = nil
    ) {
        self.metadata = metadata
        limitTimer = throttle?.descriptor
        self.throttle = throttle
        self.events = events
        self.coalescer = coalescer
        self.tap = tap
        self.headerSize = headerSize
        self.reader = reader
        self.spill = spill
        self.counters = counters
        moved = counters.pairs[pair]
    }

    static func makeSpill() throws(SystemCallError) -> Mapping {
        try Mapping(size: spillSize, flags: MAP_PRIVATE | MAP_ANONYMOUS)
    }

    mutating func start(_ queue: consuming Virtqueue?, _ interrupt: QueueInterrupt) {
        self.queue = queue
        self.interrupt = interrupt
    }

    /// Indicates whether there is a queue to receive in.
    var isReady: Bool { queue != nil }

    /// Releases the queue; a frame that waits for buffers is dropped and counted.
    mutating func stop() {
        queue = nil
        _ = coalescer.flush()
        window.removeAll()
        dropPending()
    }

    /// Drops and counts a frame that waits for buffers, if there is one.
    mutating func dropPending() {
        if pending.take() != nil { noteWithoutDriver(1) }
    }

    // MARK: Working

    /// Moves frames until TAP or queue has no more, or for a while.
    mutating func run(_ activation: Activation) throws(VirtqueueError) -> Outcome {
        guard var queue = self.queue.take() else { return .starved }
        var budget = Self.budget
        reader?.begin()
        queue.disableNotifications()
        var outcome = try move(&queue, &budget)
        // Buffers that were added since the queue was last read come without a kick.
        while outcome == .starved, queue.enableNotifications() {
            queue.disableNotifications()
            outcome = try move(&queue, &budget)
        }
        // Before the driver sees the frames, so that no figure is behind what it knows.
        let frames = Int(tally.frames)
        count(activation.counters)
        if coalescer.isDue(after: frames, isWanted: queue.publish()) { interrupt?.signal() }
        self.queue = consume queue
        return outcome
    }

    /// For the thread's epoll instance; see ``expireTimer()``.
    var timer: Int32 { coalescer.timer.rawValue }

    /// The timer of the limits, and what is called when it is readable, before the next run.
    let limitTimer: Int32?
    mutating func expireLimit() { throttle?.expire() }

    /// The timer is readable: the delay of an interrupt is over.
    mutating func expireTimer() { if coalescer.expire() { interrupt?.signal() } }

    /// Signals an interrupt that is delayed.
    mutating func flushInterrupt() { if coalescer.flush() { interrupt?.signal() } }

    private mutating func move(_ queue: inout Virtqueue, _ budget: inout Int) throws(VirtqueueError) -> Outcome {
        while budget > 0 {
            if let waiting = pending {
                guard try complete(waiting, &queue, &budget) else { return budget > 0 ? .starved : .paused }
                continue
            }
            // One buffer is taken as it comes; of mergeable ones, as many as the longest frame may need, if they are
            // there.
            while mode.isMergeable ? window.byteCount < mode.longestFrame : window.isEmpty,
                window.makeRoom(for: Int(queue.size))
            {
                guard budget > 0, try grow(&queue, &budget) else { break }
            }
            guard !window.isEmpty else { return budget > 0 ? .starved : .paused }
            if throttle != nil, throttle?.mayStart() == false { return .limited }
            budget -= 1
            let count: Int
            if let packet = metadata?.nextPacket() {
                count = unsafe packet.withUnsafeBytes { unsafe take($0) }
                if throttle != nil { throttle?.charge(bytes: UInt64(max(0, count - Int(PacketHeader.size)))) }
                place(count, isInWindow: true, &queue)
                continue
            }
            if reader == nil {
                count = read()
                if count <= 0 {
                    if count < 0, errno == EINTR { continue }
                    return count < 0 && errno == EAGAIN ? .drained : .gone
                }
            } else {
                if let end = nextOfStream() { return end }
                count = takeFromStream()
            }
            if throttle != nil { throttle?.charge(bytes: UInt64(max(0, count - Int(PacketHeader.size)))) }
            place(count, isInWindow: headerSize != 0 || reader != nil, &queue)
        }
        return .paused
    }

    /// Reads a frame: into the window and then the spill; all of it into the spill, behind a header of zeros, when the
    /// TAP gives none.
    private func read() -> Int {
        // The spill is a mapping of spillSize bytes that lives as long as this value.
        guard headerSize == 0 else {
            return unsafe window.read(
                from: tap, spill: UnsafeMutableRawBufferPointer(start: spill.start, count: Self.spillSize))
        }
        let header = Int(PacketHeader.size)
        unsafe memset(spill.start, 0, header)
        let count = unsafe Glibc.read(tap, spill.start + header, Self.spillSize - header)
        return count > 0 ? count + header : count
    }

    /// Receives the next frame of a stream, into its reader.
    /// - Returns: why there is none; nil if there is one.
    private mutating func nextOfStream() -> Outcome? {
        switch reader?.next() {
        case .frame?: return nil
        case .lostFraming(let length)?:
            impossibleLength = length
            return .gone
        case .closed?: return .gone
        case FrameReader.Next.none?, nil: return .drained
        }
    }

    /// Copies that frame to where a TAP's would be read: into the window and then the spill.
    private mutating func takeFromStream() -> Int {
        guard reader != nil, let packet = unsafe reader?.packet else { return 0 }
        return unsafe take(packet)
    }

    /// Copies a packet, which is shorter than the spill, into the window and then the spill.
    private func take(_ packet: UnsafeRawBufferPointer) -> Int {
        let inBuffers = unsafe window.buffers.copy(from: packet)
        if inBuffers < packet.count, let first = packet.baseAddress {
            // The longest packet of a stream is shorter than the spill.
            unsafe memcpy(spill.start, first + inBuffers, min(packet.count - inBuffers, Self.spillSize))
        }
        return packet.count
    }

    /// Indicates whether there is a frame that the stream's descriptor may not be readable for.
    var hasBuffered: Bool {
        switch reader {
        case .some(let reader): reader.hasNext
        case .none: false
        }
    }

    /// Delivers a frame of `count` bytes that was just read, or keeps it until it can be.
    /// - Parameter isInWindow: as much of it as there is room for; otherwise all is in the spill.
    private mutating func place(_ count: Int, isInWindow: Bool, _ queue: inout Virtqueue) {
        let inBuffers = isInWindow ? Int(min(UInt64(count), window.byteCount)) : 0
        let spilled = count - inBuffers
        // A frame that fills the spill has lost its end.
        guard count >= Int(PacketHeader.size), spilled < Self.spillSize - Int(PacketHeader.size) else {
            return tally.tooLong += 1
        }
        if count > mode.longestPlainFrame, exceedsMTU(count, inBuffers) { return tally.aboveMTU += 1 }
        if spilled == 0 { return deliver(count, &queue) }
        pending = Pending(count: count, inBuffers: inBuffers)
    }

    /// Indicates whether a frame that was just read breaks the promise of the MTU (§5.1.4.1): it holds for frames that
    /// are whole, and a VLAN tag is
    /// part of the Ethernet header. A driver that changes the bytes meanwhile gets what it asks for.
    private func exceedsMTU(_ count: Int, _ inBuffers: Int) -> Bool {
        func byte(_ offset: Int) -> UInt8 {
            // The spill holds the bytes that are not in the buffers.
            offset < inBuffers
                ? window.buffers.load(at: UInt64(offset)) ?? 0
                : unsafe spill.start.load(fromByteOffset: offset - inBuffers, as: UInt8.self)
        }
        guard PacketHeader.isWhole(segmentation: byte(PacketHeader.segmentationOffset)) else { return false }
        let type = Int(PacketHeader.size) + 12
        let isTagged = (byte(type) == 0x81 || byte(type) == 0x88 && byte(type + 1) == 0xa8) && count >= type + 4
        return count > mode.longestPlainFrame + (isTagged ? 4 : 0)
    }

    /// Gets buffers for the rest of a frame and delivers it, or drops it if there never will be enough.
    /// - Returns: false when it continues waiting.
    private mutating func complete(
        _ frame: Pending, _ queue: inout Virtqueue, _ budget: inout Int
    ) throws(VirtqueueError) -> Bool {
        while window.byteCount < UInt64(frame.count) {
            // One buffer must be enough unless they are merged; and more than the whole queue there cannot be.
            let canGrow = window.isEmpty || mode.isMergeable && window.chainCount < Int(queue.size)
            guard canGrow, window.makeRoom(for: Int(queue.size)) else {
                tally.tooLong += 1
                pending = nil
                return true
            }
            guard budget > 0, try grow(&queue, &budget) else { return false }
        }
        // The spill holds the bytes that are not in the buffers; the window has room for all.
        let rest = unsafe UnsafeRawBufferPointer(start: spill.start, count: frame.count - frame.inBuffers)
        _ = unsafe window.buffers.copy(at: UInt64(frame.inBuffers), from: rest)
        pending = nil
        deliver(frame.count, &queue)
        return true
    }

    /// - Returns: false when the driver has no more buffers. A buffer that is of no use uses up some of the budget.
    private mutating func grow(_ queue: inout Virtqueue, _ budget: inout Int) throws(VirtqueueError) -> Bool {
        switch try window.grow(from: &queue) {
        case .grown: break
        case .refused:
            tally.badBuffers += 1
            budget -= 1
        case .none: return false
        }
        return true
    }

    private mutating func deliver(_ count: Int, _ queue: inout Virtqueue) {
        window.deliver(count, to: &queue, clearsFlags: !mode.hasChecksum)
        tally.frames += 1
        tally.bytes += UInt64(count) - PacketHeader.size
    }

    /// Reads and drops frames until the TAP has no more, at most as many as a TAP's queue usually holds a few times
    /// over.
    /// - Parameter withoutDriver: they are from before the driver; otherwise the link is down.
    mutating func discard(withoutDriver: Bool) -> Outcome {
        var dropped: UInt64 = 0
        defer { if withoutDriver { noteWithoutDriver(dropped) } else { noteLinkDown(dropped) } }
        reader?.begin()
        for _ in 0..<4096 {
            if reader != nil {
                if let end = nextOfStream() { return end }
                dropped += 1
                continue
            }
            // Into the spill's own memory, as long as it is.
            let count = unsafe Glibc.read(tap, spill.start, Self.spillSize)
            if count > 0 {
                dropped += 1
            } else if count == 0 || errno != EINTR {
                return count < 0 && errno == EAGAIN ? .drained : .gone
            }
        }
        return .paused
    }

    private func noteWithoutDriver(_ count: UInt64) {
        counters.receiveWithoutDriver.add(count)
        events.report(
            .lostFrames(NetworkCounters.Loss.receiveWithoutDriver), .info, count: count,
            "a frame for the guest was dropped: no driver was there to receive it")
    }

    private func noteLinkDown(_ count: UInt64) {
        counters.receiveLinkDown.add(count)
        events.report(
            .lostFrames(NetworkCounters.Loss.receiveLinkDown), .info, count: count,
            "a frame for the guest was dropped: the link is down")
    }

    private mutating func count(_ all: DeviceCounters) {
        if tally.frames > 0 {
            all.requests.add(tally.frames)
            moved.receivedFrames.add(tally.frames)
            moved.receivedBytes.add(tally.bytes)
        }
        if tally.tooLong > 0 {
            counters.receiveTooLong.add(tally.tooLong)
            events.report(
                .lostFrames(NetworkCounters.Loss.receiveTooLong), .warning, count: tally.tooLong,
                "a frame for the guest was dropped: it is longer than the guest's receive buffers")
        }
        if tally.aboveMTU > 0 {
            counters.receiveAboveMTU.add(tally.aboveMTU)
            events.report(
                .lostFrames(NetworkCounters.Loss.receiveAboveMTU), .warning, count: tally.aboveMTU,
                "a frame for the guest was dropped: it exceeds the MTU that the guest has negotiated")
        }
        if tally.badBuffers > 0 {
            counters.badReceiveBuffers.add(tally.badBuffers)
            events.report(
                .lostFrames(NetworkCounters.Loss.badReceiveBuffers), .warning, count: tally.badBuffers,
                "a receive buffer was returned unused: it is not writable, or too short for a header")
        }
        tally = Tally()
    }
}
