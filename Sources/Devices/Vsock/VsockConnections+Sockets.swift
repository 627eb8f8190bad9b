// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux
internal import Virtio

/// Sockets of the host.
extension VsockConnections {
    /// Takes a client of the host; closes it if that is not possible.
    /// - Parameter socket: does not block; the table's from now on.
    mutating func add(_ socket: Int32, _ epoll: borrowing Epoll) {
        guard let index = table.allocate() else {
            close(socket)
            return
        }
        table[index].socket = socket
        table[index].state = .command
        if !watch(index, epoll) { table.release(index) }
    }

    func watch(_ index: Int32, _ epoll: borrowing Epoll) -> Bool {
        // It fails for lack of kernel memory, or of watches of the user's.
        do throws(SystemCallError) {
            try epoll.add(
                table[index].socket, [.input, .peerHangUp, .edgeTriggered],
                token: DeviceWorkerToken.firstOfEngine | table.token(index))
            return true
        } catch {
            events.report(
                .hostError(operation: HostOperation.watch.rawValue, errno: error.errno), .warning,
                "a connection was refused: \(error)")
            return false
        }
    }

    /// Waits for room in a socket, or does not.
    mutating func watchRoom(_ index: Int32, _ on: Bool, _ epoll: borrowing Epoll) {
        guard table[index].isWatchingRoom != on else { return }
        // Watched already: nothing is allocated, so it does not fail.
        try? epoll.modify(
            table[index].socket,
            on ? [.input, .output, .peerHangUp, .edgeTriggered] : [.input, .peerHangUp, .edgeTriggered],
            token: DeviceWorkerToken.firstOfEngine | table.token(index))
        table[index].isWatchingRoom = on
    }

    /// A socket has become ready, or has ended.
    mutating func ready(token: UInt64, _ occurred: Epoll.Events, _ epoll: borrowing Epoll) {
        guard let index = table.index(ofToken: token) else { return }
        if !occurred.isDisjoint(with: [.input, .peerHangUp, .hangUp, .error]) { table[index].isReadable = true }
        if !occurred.isDisjoint(with: [.peerHangUp, .hangUp, .error]) { table[index].hasPeerEnded = true }
        if occurred.contains(.hangUp) { table[index].isPeerGone = true }
        switch table[index].state {
        case .free, .connecting: break
        case .command: readCommand(index)
        case .requested: if table[index].isPeerGone { fail(index, bad: false) }
        case .established:
            if occurred.contains(.output), table[index].buffered > 0 { return flush(index, epoll) }
            if table[index].hasEnded { announceEnd(index) }
            table.refresh(index)
        }
    }

    /// Reads the line that a client begins with, and nothing behind it: that is for the guest.
    mutating func readCommand(_ index: Int32) {
        let socket = table[index].socket
        var line = InlineArray<32, UInt8>(repeating: 0)
        // As many bytes as the array has.
        let peeked = unsafe withUnsafeMutableBytes(of: &line) { unsafe VsockSocket.peek(socket, $0) }
        guard case .bytes(let count) = peeked else {
            if case .none = peeked { return }
            return table.release(index)
        }
        switch VsockCommand(line.span.extracting(0..<count)) {
        case .incomplete: if table[index].hasPeerEnded { refuseClient(index) }
        case .invalid: refuseClient(index)
        case .connect(let port, let length):
            let taken = unsafe withUnsafeMutableBytes(of: &line) { bytes in
                // At most the array.
                unsafe VsockSocket.take(socket, UnsafeMutableRawBufferPointer(rebasing: bytes[..<length]))
            }
            guard case .bytes(length) = taken, let hostPort = newHostPort(guestPort: port) else {
                return refuseClient(index)
            }
            table[index].hostPort = hostPort
            table[index].guestPort = port
            table[index].state = .requested
            table[index].owed.insert(.request)
            table.link(index)
            table.refresh(index)
        }
    }

    mutating func refuseClient(_ index: Int32) {
        counters.hostRefusals.add()
        table.release(index)
    }

    /// The next port of a client; nil when all that are tried are used.
    mutating func newHostPort(guestPort: UInt32) -> UInt32? {
        for _ in 0...VsockTable.capacity {
            let port = nextHostPort
            nextHostPort = (port &+ 1) % Self.firstHostPort + Self.firstHostPort
            if table.find(hostPort: port, guestPort: guestPort) == nil { return port }
        }
        return nil
    }
}
