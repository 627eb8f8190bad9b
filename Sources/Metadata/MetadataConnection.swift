// SPDX-License-Identifier: Apache-2.0

/// A TCP connection that a guest has opened for HTTP (RFC 9293): what it receives is taken in order, what it sends is
/// kept until the guest has acknowledged it. There is no window scaling, and no congestion control: nothing is between
/// both ends but a queue.
struct MetadataConnection {
    /// The other end.
    struct Peer: Hashable {
        var hardware: UInt64
        var address: UInt32
        var port: UInt16

        /// Another hardware address does not make it another one.
        static func == (left: Peer, right: Peer) -> Bool { left.address == right.address && left.port == right.port }
        func hash(into hasher: inout Hasher) {
            hasher.combine(address)
            hasher.combine(port)
        }
    }

    /// What became of a segment, or of time.
    enum Outcome: Equatable {
        case goesOn
        /// It is over, and nothing more is sent.
        case over
        /// It is over, which the peer is told.
        case reset
    }

    /// The most bytes of a request, and the receive window.
    static let inputSize = 8192
    /// The largest segment that is sent and, without IPv4's and TCP's headers, that an Ethernet frame has room for.
    static let largestSegment = 1460
    private static let defaultSegment = 536
    /// Milliseconds to the first repetition, which doubles for each further one.
    static let firstTimeout: UInt64 = 500
    private static let longestTimeout: UInt64 = 8000
    static let maximumRepetitions = 8

    let peer: Peer
    private let segmentSize: Int
    /// Whether the guest has acknowledged our SYN.
    private var isEstablished = false
    private let initialReceived: UInt32
    /// The next sequence number of the guest's.
    private var expected: UInt32
    /// The first byte that the guest has not acknowledged, the next one to send, and what is beyond all that was sent.
    private var unacknowledged: UInt32
    private var next: UInt32
    private var furthest: UInt32
    private var window: UInt16
    private var input: [UInt8] = []
    /// What is sent; its first bytes up to ``acknowledged`` have arrived.
    private var output: [UInt8] = []
    private var acknowledged = 0
    /// Nothing comes behind the output but FIN.
    private var isClosing = false
    private var peerHasClosed = false
    private var owesSYN = true
    private var owesACK = false
    private var repeats = 0
    private var probes = false
    /// When what was sent is repeated; nil while nothing is under way.
    private(set) var deadline: UInt64?
    private(set) var lastHeard: UInt64

    /// - Parameters:
    ///   - segment: with SYN.
    ///   - sequence: the first sequence number of ours.
    init(_ segment: Segment, sequence: UInt32, now: UInt64) {
        peer = Peer(hardware: segment.hardware, address: segment.source, port: segment.sourcePort)
        segmentSize = min(max(Int(segment.maximumSegment ?? UInt16(Self.defaultSegment)), 64), Self.largestSegment)
        initialReceived = segment.sequence
        expected = segment.sequence &+ 1
        (unacknowledged, next, furthest) = (sequence, sequence, sequence)
        window = segment.window
        lastHeard = now
    }

    /// Bytes that are waiting or under way.
    private var pendingBytes: Int { output.count - acknowledged }
    /// The sequence number of FIN.
    private var finSequence: UInt32 { unacknowledged &+ UInt32(pendingBytes) }
    private var hasSentFIN: Bool { isClosing && Self.distance(finSequence, furthest) > 0 }

    /// How far the second number is behind the first, at most half of all numbers, or the negative of how far ahead.
    private static func distance(_ from: UInt32, _ to: UInt32) -> Int32 { Int32(bitPattern: to &- from) }

    // MARK: Receiving

    /// - Parameter respond: answers a request.
    mutating func receive(
        _ segment: Segment, now: UInt64, respond: (MetadataRequest) -> MetadataResponse
    ) -> Outcome {
        let room = UInt32(Self.inputSize - input.count)
        if segment.has(Segment.rst) {
            // In sequence, or to a SYN of ours (§3.10.7.4, RFC 5961).
            if segment.sequence == expected { return .over }
            if Self.distance(expected, segment.sequence) > 0, segment.sequence &- expected < room { owesACK = true }
            return .goesOn
        }
        lastHeard = now
        if segment.has(Segment.syn) {
            if !isEstablished, segment.sequence == initialReceived { owesSYN = true } else { owesACK = true }
            return .goesOn
        }
        guard segment.has(Segment.ack) else { return .goesOn }
        guard isEstablished || segment.acknowledgment == furthest && furthest != unacknowledged else { return .reset }
        if !takeAcknowledgment(segment, now: now) { return isOver ? .over : .goesOn }
        takeData(segment)
        let outcome = serve(respond)
        return outcome == .goesOn && isOver ? .over : outcome
    }

    /// Both sides have closed, and know it of each other.
    private var isOver: Bool { isClosing && peerHasClosed && !owesACK && pendingBytes == 0 && isFINAcknowledged }
    private var isFINAcknowledged = false

    /// - Returns: false if it acknowledges what was never sent.
    private mutating func takeAcknowledgment(_ segment: Segment, now: UInt64) -> Bool {
        guard Self.distance(segment.acknowledgment, furthest) >= 0 else {
            owesACK = true
            return false
        }
        let gained = Self.distance(unacknowledged, segment.acknowledgment)
        guard gained >= 0 else { return true }
        window = segment.window
        guard gained > 0 else { return true }
        var count = Int(gained)
        if !isEstablished {
            isEstablished = true
            count -= 1
            unacknowledged &+= 1
        }
        if hasSentFIN, count > pendingBytes {
            isFINAcknowledged = true
            count -= 1
        }
        count = min(count, pendingBytes)
        acknowledged += count
        unacknowledged &+= UInt32(count)
        if isFINAcknowledged { unacknowledged = segment.acknowledgment }
        if Self.distance(next, unacknowledged) > 0 { next = unacknowledged }
        if pendingBytes == 0 {
            output = []
            acknowledged = 0
        }
        repeats = 0
        deadline = next == unacknowledged ? nil : now &+ Self.firstTimeout
        return true
    }

    private mutating func takeData(_ segment: Segment) {
        guard segment.length > 0 else { return }
        owesACK = true
        // What came before is cut off; what would leave a gap is sent again.
        let known = Self.distance(segment.sequence, expected)
        guard known >= 0, !peerHasClosed, Int(known) <= segment.payload.count else { return }
        let new = segment.payload.dropFirst(Int(known))
        let taken = new.prefix(Self.inputSize - input.count)
        input += taken
        expected &+= UInt32(taken.count)
        if segment.has(Segment.fin), taken.count == new.count {
            expected &+= 1
            peerHasClosed = true
        }
    }

    /// Answers the requests that have come, one after the other has been sent.
    private mutating func serve(_ respond: (MetadataRequest) -> MetadataResponse) -> Outcome {
        while pendingBytes == 0, !isClosing {
            switch MetadataRequest.read(input) {
            case .request(let request, let length):
                input.removeFirst(length)
                isClosing = request.closes
                output = respond(request).bytes(isHTTP10: request.isHTTP10, closes: request.closes)
                acknowledged = 0
            case .invalid(let reason):
                input = []
                isClosing = true
                output = MetadataResponse(400, reason).bytes(isHTTP10: false, closes: true)
                acknowledged = 0
            case .incomplete:
                // It will never be complete.
                if input.count == Self.inputSize { return .reset }
                if peerHasClosed { isClosing = true }
                return .goesOn
            }
        }
        return .goesOn
    }

    // MARK: Sending

    /// Indicates whether ``nextSegment(now:)`` has one.
    var hasSegment: Bool { owesSYN || owesACK || probes || sendableBytes > 0 || mustSendFIN }

    private var sendableBytes: Int {
        guard isEstablished else { return 0 }
        let sent = Int(Self.distance(unacknowledged, next))
        return max(0, min(pendingBytes, Int(window)) - sent)
    }

    private var mustSendFIN: Bool { isEstablished && isClosing && next == finSequence && !isFINAcknowledged }

    /// The next segment to send; the connection counts it as sent.
    mutating func nextSegment(now: UInt64) -> ReplySegment? {
        let room = UInt16(Self.inputSize - input.count)
        if owesSYN {
            owesSYN = false
            next = unacknowledged &+ 1
            furthest = next
            startTimer(now)
            return ReplySegment(
                sequence: unacknowledged, acknowledgment: expected, flags: Segment.syn | Segment.ack, window: room,
                maximumSegment: UInt16(Self.largestSegment))
        }
        guard isEstablished, hasSegment else {
            owesACK = false
            return nil
        }
        var count = min(sendableBytes, segmentSize)
        // A byte that the guest has no room for has it say how much room there is now.
        if probes, count == 0, pendingBytes > Int(Self.distance(unacknowledged, next)) { count = 1 }
        probes = false
        let start = acknowledged + Int(Self.distance(unacknowledged, next))
        let end = min(start + count, output.count)
        var reply = ReplySegment(
            sequence: next, acknowledgment: expected, flags: Segment.ack, window: room,
            payload: start < end ? output[start..<end] : [])
        next &+= UInt32(reply.payload.count)
        if !reply.payload.isEmpty, end == output.count { reply.flags |= Segment.push }
        if mustSendFIN {
            reply.flags |= Segment.fin
            next &+= 1
        }
        if Self.distance(furthest, next) > 0 { furthest = next }
        owesACK = false
        if next != unacknowledged { startTimer(now) }
        return reply
    }

    private mutating func startTimer(_ now: UInt64) {
        if deadline == nil { deadline = now &+ min(Self.firstTimeout << UInt64(repeats), Self.longestTimeout) }
    }

    /// Whether all that was to be sent has been, and the guest has said that it is done: the last acknowledgment was
    /// given.
    var isFinished: Bool { isOver }

    /// Waits for room at the guest: then a probe is sent from time to time.
    private var isStuck: Bool { isEstablished && pendingBytes > 0 && next == unacknowledged && window == 0 }

    /// Sets what is to be waited for, after all that can be sent was.
    mutating func arm(now: UInt64) { if isStuck { startTimer(now) } }

    /// Repeats what was not acknowledged in time.
    mutating func expire(now: UInt64) -> Outcome {
        guard let deadline, now >= deadline else { return .goesOn }
        self.deadline = nil
        repeats += 1
        guard repeats <= Self.maximumRepetitions else { return .reset }
        if !isEstablished {
            owesSYN = true
        } else if isStuck {
            probes = true
        } else {
            next = unacknowledged
        }
        return .goesOn
    }

    /// A segment that ends it.
    var resetSegment: ReplySegment {
        ReplySegment(sequence: next, acknowledgment: expected, flags: Segment.rst | Segment.ack)
    }
}
