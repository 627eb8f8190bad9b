// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import CNBD
internal import Glibc
internal import Linux

/// A disk on another host, or in another process, that speaks NBD: a connection, what is asked over it, and the next
/// connection when that one is lost.
///
/// It is used in one of two ways. As the queue of a ``DiskEngine`` it belongs to the engine's thread, and its
/// ``descriptor`` is readable while there is something to be done. For tools it answers calls that wait, of any number
/// of threads (NBDDisk+Waiting.swift). Not both at a time.
final class NBDDisk: @unchecked Sendable {
    /// The address that the user gave.
    let path: String
    let location: NBDLocation
    /// What the server said of its disk first. Later connections have to find the same.
    var export = NBDExport(size: 0)

    // All that changes is the one owner's, or is touched by one of several threads within `monitor`: hence `Sendable`.
    let monitor = Monitor()
    /// Indicates whether one of the waiting threads serves the connection for all.
    var isLooking = false
    /// What is known of the last place that was asked about.
    var known = NBDExtents()

    /// Where its server is to be found; empty where it cannot be sought again.
    let addresses: [SocketAddress]
    let report: (@Sendable (String) -> Void)?
    let epoll: Epoll
    private let timer: TimerFD
    private let wakeup: EventFD

    // Its connection: NBDDisk+Connecting.swift.
    var connection: NBDConnection?
    /// The number of the connection: events of one before it are none of its own.
    var generation: UInt64 = 0
    /// What its socket is waited for.
    var watched: Epoll.Events = []
    var link = Link.down(retryAt: 0)
    /// What has happened since the last answer.
    var outage = NBDOutage()
    /// When the connection was ready.
    var readyAt = 0
    /// Milliseconds for which requests wait for it.
    let patience: Int
    var nextAddress = 0
    /// Addresses that were tried since the last pause.
    var tried = 0
    var pause = firstPause
    var lastFailure = ""
    var isCancelled = false
    /// When what is under way has to be over.
    var endBy: Int?

    // What is asked: NBDDisk+Requests.swift.
    private(set) var commands: Slab<NBDCommand>
    let board: NBDBoard
    var freeCommand: Int32 = -1
    var waiting = List()
    var ended = List()
    /// Commands that are neither free nor ended.
    var inUse = 0
    /// Commands at the server that change something.
    var changing = 0
    /// The write of a part of a block that is under way, which nothing else may change meanwhile.
    var exclusive: Int32 = -1
    let bounces: IOBuffer
    var freeBounces: [Int32]
    var isShutDown = false
    let statistics = RemoteStatistics()
    /// As ``DiskImageOptions/isInterrupted``, while the image is being opened; nil afterwards: a machine's requests
    /// wait for as long as they have to.
    var isInterrupted: (@Sendable () -> Bool)?

    /// Connects.
    /// - Parameters:
    ///   - reconnect: seconds; nil for what the address says, or ``standardReconnect``.
    ///   - report: Receives messages about the connection.
    ///   - isInterrupted: the first value of ``isInterrupted``.
    convenience init(
        path: String, reconnect: Int? = nil, report: (@Sendable (String) -> Void)? = nil,
        isInterrupted: (@Sendable () -> Bool)? = nil
    ) throws(DiskImageError) {
        let location = try NBDLocation(path)
        if location.security != nil, !cnbd_has_tls() {
            throw .remote(
                path: path,
                reason:
                    "this swkvm is a static binary without TLS; use nbd: on a network that you trust or through a tunnel, or build swkvm with TLS (make release TLS=yes)"
            )
        }
        let addresses: [SocketAddress]
        switch location.server {
        case .unix(let socket):
            guard let address = SocketAddress(unixPath: socket) else {
                throw .remoteAddress(path: path, reason: "the path of a socket has 1 to 107 bytes")
            }
            addresses = [address]
        case .tcp(let host, let port):
            switch SocketAddress.resolve(host: host, port: port, isInterrupted: isInterrupted) {
            case .success(let found): addresses = found
            case .failure(.failed(let reason)):
                throw .remote(path: path, reason: "its host name cannot be resolved: \(reason)")
            case .failure(.interrupted): throw .openingInterrupted(path: path)
            }
        }
        try self.init(path, location, addresses, reconnect: reconnect, report)
        self.isInterrupted = isInterrupted
        try connectFirst()
    }

    /// Talks over a socket that is connected; there is no other when that one is lost.
    convenience init(path: String, socket: consuming FileDescriptor, time: Int = connectTime) throws(DiskImageError) {
        try self.init(path, try NBDLocation(path), [], reconnect: 0, nil)
        do throws(NBDFailure) {
            try adopt(NBDConnection(location, adopting: socket))
            try waitUntilReady(time)
        } catch {
            throw .remote(path: path, reason: error.reason)
        }
    }

    private init(
        _ path: String, _ location: NBDLocation, _ addresses: [SocketAddress], reconnect: Int?,
        _ report: (@Sendable (String) -> Void)?
    ) throws(DiskImageError) {
        do throws(SystemCallError) {
            epoll = try Epoll()
            timer = try TimerFD()
            wakeup = try EventFD()
            try epoll.add(timer.rawValue, .input, token: Self.timerToken)
            try epoll.add(wakeup.rawValue, .input, token: Self.wakeupToken)
        } catch {
            throw .system(path: path, error)
        }
        self.path = path
        self.location = location
        self.addresses = addresses
        self.report = report
        patience = 1000 * (reconnect ?? location.reconnect ?? Self.standardReconnect)
        bounces = try IOBuffer(count: Self.bounceCount * Self.bounceSize, path)
        freeBounces = (0..<Int32(Self.bounceCount)).reversed()
        let board = NBDBoard()
        self.board = board
        commands = Slab(count: 0) { _ in NBDCommand(board: board) }
        reserve(Self.toolCommands)
    }

    deinit {
        connection?.disconnect()
        // Before the memory goes that its callbacks would write to.
        connection = nil
    }

    // MARK: - Waiting

    /// Readable while there is something to be done.
    var descriptor: Int32 { epoll.rawValue }

    private static let socketKind: UInt64 = 0, timerToken: UInt64 = 1, wakeupToken: UInt64 = 2

    /// What a look has found.
    struct Events {
        var socket: Epoll.Events = []
        var generation: UInt64 = 0
    }

    /// Waits until there is something to be done, and takes notice of it.
    /// - Parameter timeout: milliseconds; -1 waits without a limit, 0 does not wait.
    func look(timeout: Int32) -> Events {
        var found = Events()
        let timeout = isInterrupted != nil && (timeout < 0 || timeout > 100) ? 100 : timeout
        // It fails only for a descriptor that is none.
        _ = try? epoll.wait(timeout: timeout) { token, events in
            switch token {
            case Self.timerToken: _ = timer.take()
            case Self.wakeupToken: wakeup.drain()
            default: found = Events(socket: events, generation: token >> 2)
            }
        }
        return found
    }

    /// Does what is due after events were processed.
    func handle(_ events: Events) {
        if !events.socket.isEmpty, events.generation == generation, let connection {
            do throws(NBDFailure) { try connection.notify(events.socket) } catch { lastFailure = error.reason }
        }
        goOn()
    }

    /// Does what can be done without waiting.
    func goOn() {
        repeat {
            collect()
            while step() {}
            issue()
            // Sending may have brought answers, or found the connection's end.
        } while hasAnswers || isBroken
        watch()
    }

    /// Indicates whether the connection is at its end, and nothing has been done about it yet.
    private var isBroken: Bool {
        if case .up = link { return connection?.stage != .ready }
        return false
    }

    /// Watches the socket for what is due next, and the clock.
    func watch() {
        if let connection {
            let events = connection.events, number = connection.descriptor
            // While it connects libnbd may continue to another socket, whatever its number.
            if number >= 0, events != watched || connection.stage == .connecting {
                let token = generation << 2 | Self.socketKind
                // Adding fails only for lack of kernel memory; then the time-out ends it.
                if watched.isEmpty || (try? epoll.modify(number, events, token: token)) == nil {
                    try? epoll.add(number, events, token: token)
                }
                watched = events
            }
        }
        var next: Int?
        func at(_ time: Int) { next = min(next ?? time, time) }
        switch link {
        case .connecting(let deadline): at(deadline)
        case .down(let retryAt): at(retryAt)
        case .up, .broken: break
        }
        if let began = outage.began, !waiting.isEmpty { at(began + patience) }
        if let time = outage.logsAt { at(time) }
        if let endBy { at(endBy) }
        if let next { timer.start(milliseconds: next - now()) }
    }

    func now() -> Int {
        var time = timespec()
        // A value of its own.
        unsafe clock_gettime(CLOCK_MONOTONIC, &time)
        return time.tv_sec * 1000 + time.tv_nsec / 1_000_000
    }

    // MARK: - For requests

    /// Indicates whether a request can be sent.
    var isUp: Bool {
        if case .up = link { return connection?.stage == .ready }
        return false
    }

    func send(_ index: Int32) throws(NBDFailure) {
        guard let connection else { throw NBDFailure("not connected", errno: ENOTCONN) }
        // The command stays where it is until it has been answered or its connection is gone.
        try unsafe connection.send(commands.address(of: Int(index)))
    }

    /// Makes room for so many commands. None is under way.
    func reserve(_ count: Int) {
        guard count > commands.count else { return }
        precondition(inUse == 0 && ended.isEmpty)
        commands = Slab(count: count) { [board] _ in NBDCommand(board: board) }
        freeCommand = -1
        for index in (0..<Int32(count)).reversed() {
            commands[index].index = index
            commands[index].next = freeCommand
            freeCommand = index
        }
    }

    /// Why requests fail, for people.
    var failure: String? {
        if case .up = link { return nil }
        return lastFailure.isEmpty ? "the connection is lost" : lastFailure
    }

    // MARK: - Ends

    /// What is under way is over within a time, with an error if it has to be.
    /// - Parameter milliseconds: from now on.
    func drain(within milliseconds: Int) {
        guard inUse > 0 else { return }
        endBy = now() + milliseconds
        watch()
    }

    /// Ends everything, for good: what is under way fails with `ECANCELED`, and so does all that comes. Any thread may
    /// say so while others wait in calls for tools.
    func cancel() {
        monitor.locked { isCancelled = true }
        wakeup.signal()
    }
}
