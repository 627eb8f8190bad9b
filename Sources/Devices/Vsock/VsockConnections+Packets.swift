// SPDX-License-Identifier: Apache-2.0

internal import Virtio

/// Packets for the guest.
extension VsockConnections {
    /// The next packet that has no data; nil when there is none, or when data is next.
    func nextHeader() -> VsockHeader? {
        if let reset = nextReset { return reset }
        let first = table.first
        guard first >= 0 else { return nil }
        let owed = table[first].owed
        if owed.contains(.request) { return header(first, .request) }
        if owed.contains(.response) { return header(first, .response) }
        if owed.contains(.creditUpdate) { return header(first, .creditUpdate) }
        if owed.contains(.creditRequest) { return header(first, .creditRequest) }
        guard owed.contains(.shutdown) else { return nil }
        var packet = header(first, .shutdown)
        packet.flags = table[first].announced.rawValue
        return packet
    }

    /// The guest has got that packet.
    mutating func headerSent(_ packet: VsockHeader) {
        guard resetCount == 0 else { return removeFirstReset() }
        let index = table.first
        guard index >= 0 else { return }
        let sent: VsockConnection.Owed =
            switch VsockHeader.Operation(rawValue: packet.operation) {
            case .request: .request
            case .response: .response
            case .creditRequest: .creditRequest
            case .shutdown: .shutdown
            default: []
            }
        table[index].owed.remove(sent)
        noteAnnounced(index)
        table.rotate(index)
    }

    /// The connection whose data is next, and how much of it the guest takes.
    var nextReader: (index: Int32, socket: Int32, credit: Int, buffers: Int)? {
        let first = table.first
        guard first >= 0 else { return nil }
        let connection = table[first]
        return (first, connection.socket, Int(connection.credit), connection.readAhead)
    }

    /// The header of a packet with data.
    func dataHeader(_ index: Int32, length: Int) -> VsockHeader {
        var packet = header(index, .data)
        packet.length = UInt32(truncatingIfNeeded: length)
        return packet
    }

    /// What became of a read for the connection whose data is next.
    /// - Parameters:
    ///   - used: buffers that got something.
    ///   - isFull: there may be more.
    mutating func didRead(_ index: Int32, _ moved: VsockSocket.Moved, used: Int, isFull: Bool) {
        switch moved {
        case .bytes(let count):
            table[index].sent &+= UInt32(truncatingIfNeeded: count)
            table[index].readAhead = isFull ? min(2 * used, VsockReceivePath.maximumBatch) : max(1, used)
            // After the end of what was sent no event comes any more.
            if !isFull, !table[index].hasPeerEnded { table[index].isReadable = false }
            counters.receivedBytes.add(UInt64(count))
            noteAnnounced(index)
        case .none:
            table[index].isReadable = false
            table[index].readAhead = 1
        case .end:
            table[index].hasEnded = true
            table[index].hasPeerEnded = true
            announceEnd(index)
        case .lost: return fail(index, bad: false)
        }
        table.rotate(index)
    }

    /// The host's end has closed its sending side, or all of it.
    mutating func announceEnd(_ index: Int32) {
        let wanted: VsockHeader.Shutdown = table[index].isPeerGone ? .both : .send
        guard !table[index].announced.isSuperset(of: wanted) else { return }
        table[index].announced.formUnion(wanted)
        table[index].owed.insert(.shutdown)
    }

    func header(_ index: Int32, _ operation: VsockHeader.Operation) -> VsockHeader {
        let connection = table[index]
        var packet = VsockHeader(
            operation, from: Self.hostCID, port: connection.hostPort, to: guestCID, port: connection.guestPort)
        packet.bufferSize = UInt32(VsockTable.bufferSize)
        packet.forwarded = connection.forwarded
        return packet
    }

    /// A packet has told the guest of all room that there is.
    mutating func noteAnnounced(_ index: Int32) {
        table[index].announcedForwarded = table[index].forwarded
        table[index].owed.remove(.creditUpdate)
    }
}
