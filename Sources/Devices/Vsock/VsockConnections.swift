// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux
internal import Virtio

/// The connections of a ``VsockDevice``: their sockets, credit and what they have for the guest. It knows no queues.
///
/// Its size is fixed. Memory for what a socket does not take is there for every connection, and touched as it is
/// needed. Nothing here allocates or waits.
struct VsockConnections: ~Copyable {
    /// A credit update is sent on its own once the guest does not know of this many bytes of room.
    static let updateStep: UInt32 = 64 << 10
    /// The ports of clients of the host count up from here.
    static let firstHostPort: UInt32 = 1 << 30
    /// Milliseconds between attempts to connect to a listener whose backlog is full, and how many there are: as long as
    /// Linux waits for an answer.
    static let retryPeriod = 10
    private static let maximumAttempts = 200
    /// VMADDR_CID_HOST (§5.10.4).
    static let hostCID: UInt64 = 2

    /// Resets that wait for receive buffers; with half of them no new ones are caused.
    private static let resetCapacity = 2 * VsockTable.capacity

    /// A packet that needs no connection: RST.
    private struct Reset: BitwiseCopyable {
        var source: UInt64 = 0
        var hostPort: UInt32 = 0
        var guestPort: UInt32 = 0
    }

    let guestCID: UInt64
    private var address: VsockAddress
    let counters: VsockCounters
    let events: DeviceEvents

    var table: VsockTable
    private var resets = [Reset](repeating: Reset(), count: Self.resetCapacity)
    private var firstReset = 0
    private(set) var resetCount = 0
    var nextHostPort = Self.firstHostPort
    /// Connections in state `connecting`.
    private var connectingCount = 0

    init(guestCID: UInt64, path: String, counters: VsockCounters, events: DeviceEvents) throws(SystemCallError) {
        table = try VsockTable()
        self.guestCID = guestCID
        address = VsockAddress(path: path)
        self.counters = counters
        self.events = events
    }

    // MARK: State

    /// Indicates whether another packet of the guest, or client of the host, may be taken: what it causes has room.
    var hasRoomForResets: Bool { resetCount < Self.resetCapacity / 2 }
    /// Indicates whether a client of the host may be accepted.
    var hasRoom: Bool { table.freeCount > 0 && hasRoomForResets }
    /// Indicates whether a listener's backlog is waited for.
    var isConnecting: Bool { connectingCount > 0 }
    /// Indicates whether there is something for the guest.
    var hasPackets: Bool { resetCount > 0 || table.first >= 0 }
    /// Connections of any state.
    var count: Int { VsockTable.capacity - table.freeCount }

    /// Closes all sockets, and forgets what was for the guest.
    mutating func removeAll() {
        for index in table.indices where table[index].state != .free { remove(index) }
        (firstReset, resetCount) = (0, 0)
    }

    // MARK: Packets of the guest

    /// Takes a packet of the guest. There is room for a reset.
    /// - Parameter payload: the bytes behind the header, at least `header.length`.
    mutating func take(_ header: VsockHeader, _ payload: IOVectors, _ epoll: borrowing Epoll) {
        let operation = VsockHeader.Operation(rawValue: header.operation)
        guard header.type == VsockHeader.stream, header.source == guestCID, header.destination == Self.hostCID else {
            counters.badPackets.add()
            if operation != .reset { refuse(header) }
            return
        }
        guard let index = table.find(hostPort: header.destinationPort, guestPort: header.sourcePort) else {
            switch operation {
            case .request: connect(header, epoll)
            case .reset: break
            default: refuse(header)
            }
            return
        }
        if operation == .reset {
            if table[index].state == .requested { counters.hostRefusals.add() }
            return remove(index)
        }
        guard table[index].update(bufferSize: header.bufferSize, forwarded: header.forwarded) else {
            counters.creditViolations.add()
            return fail(index, bad: true)
        }
        switch (operation, table[index].state) {
        case (.response, .requested): accepted(index)
        case (.data, .established) where !table[index].wasShutDown.contains(.send):
            var data = payload
            data.removeLast(data.byteCount - UInt64(header.length))
            receive(index, data, epoll)
        case (.shutdown, .connecting): fail(index, bad: false)
        case (.shutdown, .established):
            table[index].wasShutDown.formUnion(VsockHeader.Shutdown(rawValue: header.flags & 3))
            applyShutdown(index)
        case (.creditUpdate, .established): table.refresh(index)
        case (.creditRequest, .established):
            table[index].owed.insert(.creditUpdate)
            table.refresh(index)
        default: fail(index, bad: true)
        }
    }

    /// A packet that is longer than its buffers, or has data that it may not have.
    mutating func takeMalformed(_ header: VsockHeader) {
        counters.badPackets.add()
        if let index = table.find(hostPort: header.destinationPort, guestPort: header.sourcePort),
            header.source == guestCID, header.destination == Self.hostCID
        {
            fail(index, bad: false)
        } else {
            refuse(header)
        }
    }

    /// The guest asks for a connection to a port of the host's.
    mutating func connect(_ header: VsockHeader, _ epoll: borrowing Epoll) {
        guard let index = table.allocate() else {
            counters.guestRefusals.add()
            return refuse(header)
        }
        let socket = VsockSocket.make()
        guard socket >= 0 else {
            table.release(index)
            report(.createSocket, -socket)
            counters.guestRefusals.add()
            return refuse(header)
        }
        table[index].socket = socket
        table[index].hostPort = header.destinationPort
        table[index].guestPort = header.sourcePort
        _ = table[index].update(bufferSize: header.bufferSize, forwarded: header.forwarded)
        table[index].state = .connecting
        connectingCount += 1
        table.link(index)
        attempt(index, epoll)
    }

    /// Tries to connect once; a listener whose backlog is full is tried again (``retry(_:)``).
    mutating func attempt(_ index: Int32, _ epoll: borrowing Epoll) {
        let (socket, port) = (table[index].socket, table[index].hostPort)
        let error = address.connect(socket, toPort: port)
        table[index].attempts += 1
        if error == EAGAIN, table[index].attempts < Self.maximumAttempts { return }
        guard error == 0, watch(index, epoll) else {
            // That nobody listens is what a guest may want to find out.
            if error != 0, error != ENOENT, error != ECONNREFUSED { report(.connect, error) }
            counters.guestRefusals.add()
            return fail(index, bad: false)
        }
        connectingCount -= 1
        table[index].state = .established
        table[index].owed.insert(.response)
        counters.guestConnections.add()
        table.refresh(index)
    }

    /// The period of the attempts is over.
    mutating func retry(_ epoll: borrowing Epoll) {
        guard isConnecting else { return }
        for index in table.indices where table[index].state == .connecting {
            guard hasRoomForResets else { return }
            attempt(index, epoll)
        }
    }

    /// The guest has accepted a client of the host.
    mutating func accepted(_ index: Int32) {
        table[index].state = .established
        counters.hostConnections.add()
        var text = InlineArray<16, UInt8>(repeating: 0)
        var length = 0
        for byte in "OK \(table[index].hostPort)\n".utf8 where length < text.count {
            text[length] = byte
            length += 1
        }
        let socket = table[index].socket
        // As many bytes as were stored; a new socket has room for them.
        let moved = unsafe withUnsafeBytes(of: &text) { bytes in
            unsafe VsockSocket.send(socket, UnsafeRawBufferPointer(rebasing: bytes[..<length]))
        }
        guard case .bytes(length) = moved else { return fail(index, bad: false) }
        table.refresh(index)
    }

    /// Data of the guest: to the socket, and what that does not take to the buffer.
    mutating func receive(_ index: Int32, _ data: IOVectors, _ epoll: borrowing Epoll) {
        let buffered = table[index].buffered
        guard data.byteCount <= UInt64(VsockTable.bufferSize - buffered) else {
            counters.creditViolations.add()
            return fail(index, bad: true)
        }
        counters.sentBytes.add(data.byteCount)
        var taken = 0
        if buffered == 0 {
            switch VsockSocket.send(table[index].socket, data) {
            case .bytes(let count): taken = count
            case .none: break
            case .end, .lost: return fail(index, bad: false)
            }
        }
        if taken < Int(data.byteCount) {
            keep(index, data, from: taken)
            watchRoom(index, true, epoll)
        }
        table[index].forwarded &+= UInt32(truncatingIfNeeded: taken)
        announceRoom(index)
    }

    /// Puts the rest of data into the buffer, which has room for it.
    mutating func keep(_ index: Int32, _ data: IOVectors, from offset: Int) {
        table[index].hasUsedBuffer = true
        var done = offset
        while done < Int(data.byteCount) {
            let connection = table[index]
            let end = (connection.bufferStart + connection.buffered) % VsockTable.bufferSize
            let count = min(
                Int(data.byteCount) - done, VsockTable.bufferSize - end, VsockTable.bufferSize - connection.buffered)
            guard count > 0 else { return }
            // As many bytes as there is room for.
            unsafe data.copy(at: UInt64(done), to: table.buffer(index, end..<end + count))
            table[index].buffered += count
            done += count
        }
    }

    /// Sends what the buffer holds, as far as the socket takes it.
    mutating func flush(_ index: Int32, _ epoll: borrowing Epoll) {
        while table[index].buffered > 0 {
            let connection = table[index]
            let count = min(connection.buffered, VsockTable.bufferSize - connection.bufferStart)
            // Bytes that ``keep`` has put there.
            let bytes = unsafe table.buffer(index, connection.bufferStart..<connection.bufferStart + count)
            switch unsafe VsockSocket.send(connection.socket, UnsafeRawBufferPointer(bytes)) {
            case .bytes(let sent):
                table[index].buffered -= sent
                table[index].bufferStart = (connection.bufferStart + sent) % VsockTable.bufferSize
                table[index].forwarded &+= UInt32(truncatingIfNeeded: sent)
            case .none: return announceRoom(index)
            case .end, .lost: return fail(index, bad: false)
            }
        }
        table[index].bufferStart = 0
        watchRoom(index, false, epoll)
        announceRoom(index)
        applyShutdown(index)
    }

    /// Has the guest be told of room that it does not know of.
    mutating func announceRoom(_ index: Int32) {
        let connection = table[index]
        if connection.forwarded &- connection.announcedForwarded >= Self.updateStep {
            table[index].owed.insert(.creditUpdate)
        }
        table.refresh(index)
    }

    /// Does what the guest has shut down, as soon as the socket has everything that came before.
    mutating func applyShutdown(_ index: Int32) {
        let connection = table[index]
        if connection.wasShutDown == .both {
            // A clean end: the answer is a reset (§5.10.6.6).
            if connection.buffered == 0 { fail(index, bad: false) }
            return
        }
        if connection.wasShutDown.contains(.send), connection.buffered == 0, !connection.isSendClosed {
            table[index].isSendClosed = true
            VsockSocket.shutdown(connection.socket, SHUT_WR)
        }
        if connection.wasShutDown.contains(.receive) { VsockSocket.shutdown(connection.socket, SHUT_RD) }
        table.refresh(index)
    }

    // MARK: Ends

    /// The reset that is next; nil when there is none.
    var nextReset: VsockHeader? {
        guard resetCount > 0 else { return nil }
        let reset = resets[firstReset]
        return VsockHeader(.reset, from: reset.source, port: reset.hostPort, to: guestCID, port: reset.guestPort)
    }

    mutating func removeFirstReset() {
        firstReset = (firstReset + 1) % Self.resetCapacity
        resetCount -= 1
    }

    /// Ends a connection; the guest gets a reset.
    /// - Parameter bad: the guest broke a rule.
    mutating func fail(_ index: Int32, bad: Bool) {
        if bad { counters.badPackets.add() }
        let connection = table[index]
        remove(index)
        append(Reset(source: Self.hostCID, hostPort: connection.hostPort, guestPort: connection.guestPort))
    }

    /// Answers a packet that belongs to no connection.
    mutating func refuse(_ header: VsockHeader) {
        append(Reset(source: header.destination, hostPort: header.destinationPort, guestPort: header.sourcePort))
    }

    private mutating func append(_ reset: Reset) {
        // Packets and clients are taken with room for one each, and connections are fewer than the rest.
        guard resetCount < Self.resetCapacity else { return }
        resets[(firstReset + resetCount) % Self.resetCapacity] = reset
        resetCount += 1
    }

    /// Ends a connection that has ports.
    mutating func remove(_ index: Int32) {
        switch table[index].state {
        case .free: return
        case .command: break
        case .connecting:
            connectingCount -= 1
            table.unlink(index)
        case .requested: table.unlink(index)
        case .established:
            table.unlink(index)
            counters.endedConnections.add()
        }
        table.release(index)
    }

    enum HostOperation: UInt8 { case createSocket, connect, watch }

    func report(_ operation: HostOperation, _ error: Int32) {
        let call = operation == .createSocket ? "socket" : "connect"
        events.report(
            .hostError(operation: operation.rawValue, errno: error), .warning,
            "a connection of the guest was refused: \(SystemCallError(call, errno: error))")
    }
}
