// SPDX-License-Identifier: Apache-2.0

/// The end of an Ethernet link at which a guest finds its metadata: an IPv4 address that answers ARP and HTTP on port
/// 80, and nothing else. Frames go in and come out of it; it has no socket and no thread. One thread uses it.
public struct MetadataEndpoint: ~Copyable {
    /// 169.254.169.254, the address that clouds use.
    public static let defaultAddress: UInt32 = 0xa9fe_a9fe
    /// The most connections at a time. A new one replaces one of which nothing was heard for ``idleTime``.
    public static let maximumConnections = 30
    /// Milliseconds.
    static let idleTime: UInt64 = 20_000
    /// Answers outside of connections that wait to be taken; more are dropped.
    private static let maximumReplies = 32
    private static let port: UInt16 = 80
    /// The endpoint's own Ethernet address, as Firecracker's has it.
    public static let hardware: UInt64 = 0x0601_2345_6701

    private let store: MetadataStore
    private let address: UInt32
    private var connections: [MetadataConnection] = []
    /// Where the next frame is looked for, so that all have their turn.
    private var turn = 0
    private var replies: [[UInt8]] = []

    /// - Parameter address: IPv4, the first byte the most significant.
    public init(_ store: MetadataStore, address: UInt32 = defaultAddress) {
        self.store = store
        self.address = address
    }

    /// Forgets all connections.
    public mutating func reset() {
        connections = []
        replies = []
    }

    /// Takes a frame of the guest's, from its destination's address on.
    /// - Parameter now: milliseconds of the monotonic clock.
    /// - Returns: whether it was understood.
    @discardableResult
    public mutating func receive(_ bytes: ArraySlice<UInt8>, now: UInt64) -> Bool {
        let frame = FrameBytes(bytes: bytes)
        if let request = ARPRequest(frame) {
            guard request.target == address else { return false }
            reply(request.reply(from: Self.hardware))
            return true
        }
        guard let segment = Segment(frame), segment.target == address else { return false }
        receive(segment, now)
        return true
    }

    private mutating func receive(_ segment: Segment, _ now: UInt64) {
        let peer = MetadataConnection.Peer(
            hardware: segment.hardware, address: segment.source, port: segment.sourcePort)
        if segment.targetPort == Self.port, let index = connections.firstIndex(where: { $0.peer == peer }) {
            let store = store
            let outcome = connections[index].receive(segment, now: now) { store.respond(to: $0, now: now) }
            return finish(index, outcome)
        }
        guard !segment.has(Segment.rst) else { return }
        guard segment.targetPort == Self.port, segment.has(Segment.syn), !segment.has(Segment.ack | Segment.fin),
            makeRoom(now)
        else { return refuse(segment, peer) }
        var generator = SystemRandomNumberGenerator()
        connections.append(MetadataConnection(segment, sequence: generator.next(), now: now))
    }

    /// A segment that belongs to no connection (RFC 9293 §3.10.7.1).
    private mutating func refuse(_ segment: Segment, _ peer: MetadataConnection.Peer) {
        let answer =
            segment.has(Segment.ack)
            ? ReplySegment(sequence: segment.acknowledgment, flags: Segment.rst)
            : ReplySegment(
                sequence: 0, acknowledgment: segment.sequence &+ segment.length, flags: Segment.rst | Segment.ack)
        reply(answer.frame(from: Self.hardware, to: peer, address: address, port: segment.targetPort))
    }

    private mutating func finish(_ index: Int, _ outcome: MetadataConnection.Outcome) {
        switch outcome {
        case .goesOn: return
        case .reset:
            let connection = connections[index]
            reply(
                connection.resetSegment.frame(
                    from: Self.hardware, to: connection.peer, address: address, port: Self.port))
        case .over: break
        }
        connections.remove(at: index)
    }

    private mutating func reply(_ frame: [UInt8]) {
        if replies.count < Self.maximumReplies { replies.append(frame) }
    }

    private mutating func makeRoom(_ now: UInt64) -> Bool {
        guard connections.count >= Self.maximumConnections else { return true }
        guard
            let oldest = connections.indices.min(by: { connections[$0].lastHeard < connections[$1].lastHeard }),
            now &- connections[oldest].lastHeard >= Self.idleTime
        else { return false }
        connections.remove(at: oldest)
        return true
    }

    // MARK: To the guest

    /// Indicates whether ``nextFrame(now:)`` has one.
    public var hasFrame: Bool { !replies.isEmpty || connections.contains(where: \.hasSegment) }

    /// The next frame for the guest, which counts as sent.
    public mutating func nextFrame(now: UInt64) -> [UInt8]? {
        if !replies.isEmpty { return replies.removeFirst() }
        for step in 0..<connections.count {
            let index = (turn + step) % connections.count
            guard connections[index].hasSegment else { continue }
            guard let segment = connections[index].nextSegment(now: now) else { continue }
            turn = index + 1
            let peer = connections[index].peer
            if connections[index].isFinished { connections.remove(at: index) }
            return segment.frame(from: Self.hardware, to: peer, address: address, port: Self.port)
        }
        return nil
    }

    /// When ``expire(now:)`` has something to do, in milliseconds of the monotonic clock; nil: not before a frame.
    public mutating func deadline(now: UInt64) -> UInt64? {
        var first: UInt64?
        for index in connections.indices {
            connections[index].arm(now: now)
            if let deadline = connections[index].deadline { first = min(first ?? deadline, deadline) }
        }
        return first
    }

    /// Prepares what was not acknowledged in time to be sent again.
    public mutating func expire(now: UInt64) {
        for index in connections.indices.reversed() { finish(index, connections[index].expire(now: now)) }
    }

    /// Connections that are open.
    public var connectionCount: Int { connections.count }
}
