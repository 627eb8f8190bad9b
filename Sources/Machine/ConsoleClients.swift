// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Linux

/// The clients of a console that is a socket, in the order in which they have come. All get the guest's output. The
/// first one that still sends has the keyboard; what the others send is dropped until it is their turn.
struct ConsoleClients {
    private struct Client {
        let input: ConsoleInput
        let output: ClientOutput
        /// False after the end of what it sends.
        var sends = true
        /// It knows that another one has the keyboard.
        var isToldToWatch = false
    }

    /// More than a machine's users need; each may keep ``ClientOutput/capacity`` bytes.
    static let maximum = 16

    private let output: ConsoleOutput
    private var clients: [Client] = []

    /// - Parameter output: gets the clients' other halves.
    init(_ output: ConsoleOutput) { self.output = output }

    /// Where the guest's input comes from: one that has gone counts as long as what it has sent is not read.
    var keyboard: ConsoleInput? { clients.first { $0.sends }?.input }

    /// Takes a client in, or refuses it where there are too many.
    mutating func add(_ socket: consuming FileDescriptor, _ epoll: borrowing Epoll, token: UInt64) {
        if clients.count >= Self.maximum, let gone = clients.firstIndex(where: { $0.input.isGone }) {
            remove(gone, epoll)
        }
        guard let copy = try? socket.duplicate() else { return }
        let output = ClientOutput(copy)
        guard clients.count < Self.maximum else {
            return output.note("the console has \(clients.count) clients already")
        }
        var client = Client(input: ConsoleInput(socket), output: output)
        client.isToldToWatch = isWatcher(clients.count)
        if client.isToldToWatch { output.note("read-only: another client has the keyboard") }
        clients.append(client)
        self.output.add(output)
        // Edge-triggered: input that the guest has no room for must not keep the loop busy.
        try? epoll.add(client.input.descriptor.rawValue, [.input, .edgeTriggered], token: token)
    }

    /// What the keyboard's client has sent is at its end. One that has only closed its sending side still gets output.
    mutating func endKeyboard(_ epoll: borrowing Epoll) {
        guard let index = clients.firstIndex(where: { $0.sends }) else { return }
        clients[index].sends = false
        if clients[index].input.isGone { remove(index, epoll) }
        passKeyboard()
    }

    /// Drops what those without the keyboard have sent, and removes those that have gone.
    /// - Returns: whether another client has the keyboard now.
    mutating func update(_ epoll: borrowing Epoll) -> Bool {
        for index in clients.indices.reversed() {
            if clients[index].sends {
                guard isWatcher(index), isAtEnd(clients[index].input) else { continue }
                clients[index].sends = false
            }
            if clients[index].input.isGone { remove(index, epoll) }
        }
        return passKeyboard()
    }

    /// Indicates whether an earlier one has the keyboard.
    private func isWatcher(_ index: Int) -> Bool {
        clients[..<index].contains { $0.sends && !$0.input.isGone }
    }

    private func isAtEnd(_ input: ConsoleInput) -> Bool {
        // A client that sends faster than this does not keep the loop.
        for _ in 0..<64 {
            switch input.read() {
            case .bytes: continue
            case .empty: return false
            case .end: return true
            }
        }
        return false
    }

    @discardableResult private mutating func passKeyboard() -> Bool {
        guard let index = clients.firstIndex(where: { $0.sends && !$0.input.isGone }), clients[index].isToldToWatch
        else {
            return false
        }
        clients[index].isToldToWatch = false
        clients[index].output.note("the keyboard is yours now")
        return true
    }

    private mutating func remove(_ index: Int, _ epoll: borrowing Epoll) {
        let client = clients.remove(at: index)
        epoll.remove(client.input.descriptor.rawValue)
        epoll.remove(client.output.rawValue)
        output.remove(client.output)
    }

    // MARK: Output

    /// Sends what those that are behind take now, and watches them as long as they are.
    func sendBacklogs(_ epoll: borrowing Epoll, token: UInt64) {
        for client in clients {
            client.output.drain()
            if client.output.pending > 0 {
                // Watched already, mostly.
                try? epoll.add(client.output.rawValue, .output, token: token)
            } else {
                epoll.remove(client.output.rawValue)
            }
        }
    }
}

/// What a client of the console's socket gets. One that does not read loses output and is told how much: neither the
/// guest nor another client waits for it.
final class ClientOutput: @unchecked Sendable {
    // What changes is touched under the lock only: hence `Sendable`.

    /// Bytes that may wait for the client.
    static let capacity = 256 << 10

    private let descriptor: FileDescriptor
    private let lock = Lock()
    /// What the socket had no room for; its first ``sent`` bytes are done with.
    private var backlog: [UInt8] = []
    private var sent = 0
    /// Bytes that there was no room for after those.
    private var lost = 0
    private var isGone = false

    init(_ descriptor: consuming FileDescriptor) { self.descriptor = descriptor }

    /// To wait until the client takes more.
    var rawValue: Int32 { descriptor.rawValue }

    /// Bytes that wait.
    var pending: Int {
        lock.lock()
        defer { lock.unlock() }
        return waiting
    }

    private var waiting: Int { isGone ? 0 : backlog.count - sent + lost }

    /// Sends bytes, or keeps them.
    /// - Returns: whether the client has just fallen behind.
    func take(_ bytes: Span<UInt8>) -> Bool {
        lock.lock()
        defer { lock.unlock() }
        let wasBehind = waiting > 0
        let done = wasBehind ? 0 : send(bytes)
        guard !isGone, done < bytes.count else { return false }
        if sent > Self.capacity / 2 {
            backlog.removeFirst(sent)
            sent = 0
        }
        // What is lost has to be contiguous.
        let room = lost > 0 ? 0 : max(0, Self.capacity - (backlog.count - sent))
        let end = min(bytes.count, done + room)
        for index in done..<end { backlog.append(bytes[index]) }
        lost += bytes.count - end
        return !wasBehind
    }

    /// Sends what waits, as far as the client takes it.
    func drain() {
        lock.lock()
        defer { lock.unlock() }
        while waiting > 0 {
            if sent == backlog.count {
                backlog = Self.line("\(lost) bytes of output are missing here: this client did not read them in time")
                (sent, lost) = (0, 0)
            }
            let count = send(backlog.span.extracting(sent...))
            if count == 0 { return }
            sent += count
            if sent == backlog.count { (backlog, sent) = ([], 0) }
        }
    }

    /// Tells the client something, between what the guest prints.
    func note(_ text: String) { _ = take(Self.line(text).span) }

    private static func line(_ text: String) -> [UInt8] { Array("\r\n[swkvm: \(text)]\r\n".utf8) }

    private func send(_ bytes: Span<UInt8>) -> Int {
        var done = 0
        while done < bytes.count {
            do throws(SystemCallError) {
                // The rest of the span, which lives throughout the call.
                done += unsafe try bytes.withUnsafeBytes { buffer throws(SystemCallError) in
                    unsafe try descriptor.sendNow(UnsafeRawBufferPointer(rebasing: buffer[done...]))
                }
            } catch {
                // Nobody reads any more; its input tells the event loop.
                if error.errno != EAGAIN { isGone = true }
                return done
            }
        }
        return done
    }
}
