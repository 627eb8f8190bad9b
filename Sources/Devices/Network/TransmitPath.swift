// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import HostNetwork
internal import Linux
internal import Virtio

/// From the guest to the TAP: each chain of the transmit queue is a header and a frame (virtio 1.2 §5.1.6.2), which
/// goes to the TAP straight from guest RAM.
struct TransmitPath: ~Copyable {
    /// Why a run ended.
    enum Outcome {
        /// The driver has no more frames, and will kick when it adds one.
        case drained
        /// The TAP takes no more for now.
        case blocked
        /// Enough for now; there may be more.
        case paused
        /// The limits allow no more for now: the throttle's timer runs.
        case limited
    }

    /// What happened since the counters were last written.
    private struct Tally {
        var frames: UInt64 = 0
        var bytes: UInt64 = 0
        var malformed: UInt64 = 0
        var linkDown: UInt64 = 0
        var noMemory: UInt64 = 0
        var foreignSource: UInt64 = 0
    }

    /// An Ethernet header at least; at most the largest segment that Linux makes, with Ethernet header and VLAN tag.
    private static let possibleFrame: ClosedRange<UInt64> = 14...(65536 + 18)
    /// Frames in one run; the rest waits for the next turn.
    private static let budget = 256

    private let tap: Int32
    private let headerSize: Int
    /// nil for a TAP.
    private var writer: FrameWriter?
    private let counters: NetworkCounters
    private let moved: NetworkCounters.Pair
    private let events: DeviceEvents
    private let pool: IOVectorPool
    private var queue: Virtqueue?
    private var interrupt: QueueInterrupt?
    private var coalescer: InterruptCoalescer
    private var tally = Tally()
    /// The only source that frames may have; nil: any.
    private let lockedSource: MACAddress?
    /// nil without limits.
    private var throttle: Throttle?
    /// nil without metadata.
    private let metadata: MetadataLink?
    /// What the driver negotiated.
    var features: FeatureSet = []

    /// - Parameters:
    ///   - writer: of a stream, which takes the place of the TAP; nil for a TAP.
    ///   - coalescer: of the transmit queue.
    ///   - pair: whose frames are counted.
    ///   - lockedSource: the only source that frames may have; nil: any.
    ///   - throttle: nil without limits.
    ///   - metadata: nil without it.
    init(
        tap: Int32, headerSize: Int, writer: consuming FrameWriter? = nil, queueSize: UInt16,
        coalescer: consuming InterruptCoalescer, counters: NetworkCounters, pair: Int, events: DeviceEvents,
        lockedSource: MACAddress? = nil, throttle: consuming Throttle? = nil, metadata: MetadataLink? = nil
    ) {
        self.metadata = metadata
        limitTimer = throttle?.descriptor
        self.throttle = throttle
        self.lockedSource = lockedSource
        self.events = events
        self.coalescer = coalescer
        self.tap = tap
        self.headerSize = headerSize
        self.writer = writer
        self.counters = counters
        moved = counters.pairs[pair]
        pool = IOVectorPool(slots: 1, capacity: Self.firstEntry + Int(queueSize))
    }

    /// The entries before the chain's are for the header, and for an Ethernet header that was checked.
    private static let firstEntry = 2

    mutating func start(_ queue: consuming Virtqueue?, _ interrupt: QueueInterrupt) {
        self.queue = queue
        self.interrupt = interrupt
    }

    mutating func stop() {
        queue = nil
        _ = coalescer.flush()
    }

    /// Indicates whether a part of a frame waits for the stream to be writable; also without a driver, and in a pause.
    var hasTail: Bool {
        switch writer {
        case .some(let writer): writer.hasTail
        case .none: false
        }
    }

    /// Sends that part, as far as the stream takes it.
    mutating func flushTail() { _ = writer?.flush() }

    /// There is nobody to complete the frame for.
    mutating func discardTail() { writer?.discardTail() }

    /// For the thread's epoll instance; see ``expireTimer()``.
    var timer: Int32 { coalescer.timer.rawValue }

    /// The timer of the limits, and what is called when it is readable, before the next run.
    let limitTimer: Int32?
    mutating func expireLimit() { throttle?.expire() }

    /// The timer is readable: the delay of an interrupt is over.
    mutating func expireTimer() { if coalescer.expire() { interrupt?.signal() } }

    /// Signals an interrupt that is delayed.
    mutating func flushInterrupt() { if coalescer.flush() { interrupt?.signal() } }

    /// Moves frames until queue or TAP takes no more, or for a while.
    /// - Parameter isLinkUp: frames are dropped when it is not.
    mutating func run(_ activation: Activation, isLinkUp: Bool) throws(VirtqueueError) -> Outcome {
        guard var queue = self.queue.take() else { return .drained }
        var budget = Self.budget
        var outcome: Outcome
        repeat {
            queue.disableNotifications()
            outcome = try move(&queue, &budget, isLinkUp: isLinkUp)
        } while outcome == .drained && queue.enableNotifications()
        // Before the driver sees that they are done, so that no figure is behind what it knows.
        count(activation.counters)
        if coalescer.isDue(after: Self.budget - budget, isWanted: queue.publish()) { interrupt?.signal() }
        self.queue = consume queue
        return outcome
    }

    private mutating func move(
        _ queue: inout Virtqueue, _ budget: inout Int, isLinkUp: Bool
    ) throws(VirtqueueError) -> Outcome {
        while budget > 0 {
            if throttle != nil, try queue.hasAvailable(), throttle?.mayStart() == false { return .limited }
            guard let chain = try queue.pop(into: pool[0], from: Self.firstEntry) else { return .drained }
            budget -= 1
            guard send(chain.readable, isLinkUp: isLinkUp) else {
                // It is taken again, from its descriptors on, when the TAP has room.
                queue.rewind()
                counters.sendWaits.add()
                return .blocked
            }
            // Also what was dropped: it was work.
            if throttle != nil { throttle?.charge(bytes: chain.readable.byteCount) }
            queue.push(chain.head, written: 0)
        }
        return .paused
    }

    /// Gives a frame to the TAP, or drops and counts it.
    /// - Returns: false when the TAP wants to be waited for.
    private mutating func send(_ packet: IOVectors, isLinkUp: Bool) -> Bool {
        guard packet.byteCount >= PacketHeader.size, Self.possibleFrame.contains(packet.byteCount - PacketHeader.size),
            var header = PacketHeader(from: packet, features: features), headerSize != 0 || header.isPlain
        else {
            tally.malformed += 1
            return true
        }
        guard isLinkUp else {
            tally.linkDown += 1
            return true
        }
        var frame = packet
        frame.removeFirst(PacketHeader.size)
        let length = frame.byteCount
        if let metadata, metadata.takes(frame) {
            tally.frames += 1
            tally.bytes += length
            return true
        }
        var ethernet: EthernetHeader?
        if let lockedSource {
            guard let own = EthernetHeader(removedFrom: &frame), own.source == lockedSource.rawValue else {
                tally.foreignSource += 1
                return true
            }
            ethernet = own
        }
        while true {
            let sent: Int
            if writer != nil {
                sent = writeToStream(ethernet, frame, length: Int(length))
            } else if var own = ethernet {
                sent = write(&header, &own, frame)
            } else {
                sent = headerSize == 0 ? unsafe writev(tap, frame.base, Int32(frame.count)) : write(&header, frame)
            }
            if sent >= 0 {
                tally.frames += 1
                tally.bytes += length
                return true
            }
            switch errno {
            case EINTR: continue
            case EAGAIN: return false
            // An interface that is down, and one that was removed.
            case EIO, EBADFD, ENXIO, ENODEV, ENETDOWN, EPIPE, ECONNREFUSED, ECONNRESET: tally.linkDown += 1
            case ENOBUFS, ENOMEM: tally.noMemory += 1
            default: tally.malformed += 1
            }
            return true
        }
    }

    /// Writes our copy of the header and the guest's frame in one call.
    private func write(_ header: inout PacketHeader, _ frame: IOVectors) -> Int {
        unsafe withUnsafeMutableBytes(of: &header) { bytes in
            // There are entries before the chain's in the list. The header's bytes are its first 12; the structure has
            // padding behind them.
            let entries = unsafe frame.base - 1
            unsafe entries.pointee = iovec(iov_base: bytes.baseAddress, iov_len: Int(PacketHeader.size))
            return unsafe writev(tap, entries, Int32(frame.count + 1))
        }
    }

    /// The same with our copy of the Ethernet header, which the guest cannot change after the check; without the first
    /// header if the TAP takes none.
    private func write(_ header: inout PacketHeader, _ ethernet: inout EthernetHeader, _ rest: IOVectors) -> Int {
        unsafe withUnsafeMutableBytes(of: &header) { headerBytes in
            unsafe withUnsafeMutableBytes(of: &ethernet) { ethernetBytes in
                // As above; the list has ``firstEntry`` entries before the chain's.
                let entries = unsafe rest.base - Self.firstEntry
                unsafe entries[0] = iovec(iov_base: headerBytes.baseAddress, iov_len: Int(PacketHeader.size))
                unsafe entries[1] = iovec(iov_base: ethernetBytes.baseAddress, iov_len: Int(EthernetHeader.size))
                let skipped = headerSize == 0 ? 1 : 0
                return unsafe writev(tap, entries + skipped, Int32(rest.count + Self.firstEntry - skipped))
            }
        }
    }

    /// The same for a stream, with a length in the place of the first header.
    private mutating func writeToStream(_ ethernet: EthernetHeader?, _ rest: IOVectors, length: Int) -> Int {
        guard var own = ethernet else {
            // The list has ``firstEntry`` entries before the chain's.
            return unsafe writer?.write(rest.base - 1, count: rest.count + 1, length: length) ?? -1
        }
        return unsafe withUnsafeMutableBytes(of: &own) { bytes in
            let entries = unsafe rest.base - Self.firstEntry
            unsafe entries[1] = iovec(iov_base: bytes.baseAddress, iov_len: Int(EthernetHeader.size))
            return unsafe writer?.write(entries, count: rest.count + Self.firstEntry, length: length) ?? -1
        }
    }

    private mutating func count(_ all: DeviceCounters) {
        if tally.frames > 0 {
            all.requests.add(tally.frames)
            moved.sentFrames.add(tally.frames)
            moved.sentBytes.add(tally.bytes)
        }
        if tally.malformed > 0 {
            all.errors.add(tally.malformed)
            counters.sendMalformed.add(tally.malformed)
            events.report(
                .lostFrames(NetworkCounters.Loss.sendMalformed), .warning, count: tally.malformed,
                "a malformed frame of the guest was dropped")
        }
        if tally.linkDown > 0 {
            counters.sendLinkDown.add(tally.linkDown)
            events.report(
                .lostFrames(NetworkCounters.Loss.sendLinkDown), .info, count: tally.linkDown,
                "a frame of the guest was dropped: the link is down")
        }
        if tally.foreignSource > 0 {
            all.errors.add(tally.foreignSource)
            counters.sendForeignSource.add(tally.foreignSource)
            events.report(
                .lostFrames(NetworkCounters.Loss.sendForeignSource), .warning, count: tally.foreignSource,
                "a frame of the guest was dropped: its source MAC is not the interface's (mac-lock=on)")
        }
        if tally.noMemory > 0 {
            counters.sendNoMemory.add(tally.noMemory)
            events.report(
                .lostFrames(NetworkCounters.Loss.sendNoMemory), .warning, count: tally.noMemory,
                "a frame of the guest was dropped: the host has no memory for it")
        }
        tally = Tally()
    }
}
