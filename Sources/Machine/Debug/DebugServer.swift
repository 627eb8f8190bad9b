// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import GDBRemote
internal import GuestMemory
internal import Linux
internal import Logging
internal import Synchronization

/// The address where a debugger connects, and the thread that serves it: one debugger at a time, as many as like one
/// after the other.
final class DebugServer: Sendable {
    /// For the user: where it is, as GDB takes it.
    let announcement: String
    /// Signalled when a vCPU has stopped.
    let stopped: StopObserver

    fileprivate enum Token {
        static let end: UInt64 = 0, listener: UInt64 = 1, stopped: UInt64 = 2, client: UInt64 = 3
    }

    let listener: Listener
    fileprivate let epoll: Epoll
    fileprivate let log: Logger
    private let thread = Guarded<Thread?>(nil)
    /// Indicates whether a debugger was connected when the thread ended, which a reset of the guest brings too: the
    /// next boot waits for it.
    var wasAttached: Bool { hadClient.load(ordering: .acquiring) }
    fileprivate let hadClient = Atomic<Bool>(false)

    init(_ address: Configuration.Debugger, log: Logger) throws(SystemCallError) {
        self.log = log
        stopped = try StopObserver()
        epoll = try Epoll()
        let place: String
        switch address {
        case .port(let port):
            listener = try Listener(port: port)
            place = "127.0.0.1:\(listener.port ?? port)"
        case .unix(let path):
            listener = try Listener(path: path)
            place = path
        }
        announcement = "the guest waits at its first instruction for a debugger: target remote \(place)"
        // Edge-triggered: a client that cannot be taken for lack of descriptors must not keep the loop busy.
        try epoll.add(listener.descriptor.rawValue, [.input, .edgeTriggered], token: Token.listener)
        try epoll.add(stopped.event.rawValue, .input, token: Token.stopped)
    }

    /// Starts to serve; the thread ends with the machine, or with the guest's reset, after which it is started again.
    /// - Parameter makeTarget: called on the thread, which alone uses the target.
    func start(ending: Ending, _ makeTarget: @escaping @Sendable () -> MachineDebugTarget) throws(SystemCallError) {
        epoll.remove(ending.event.rawValue)
        try epoll.add(ending.event.rawValue, .input, token: Token.end)
        stopped.event.drain()
        try thread.withLock { (thread) throws(SystemCallError) in
            thread = try Thread.start(name: "gdb") { [self] in
                var service = DebugService(self, makeTarget(), ending)
                service.run()
            }
        }
    }

    /// Waits for the thread's end, which the machine's end brings.
    func join() {
        if let thread = thread.withLock({ $0.take() }) { thread.join() }
    }
}

/// What the thread does.
private struct DebugService: ~Copyable {
    private enum Phase {
        /// No debugger is connected, and the guest runs, or waits for the first one.
        case idle
        /// A client has connected. Until it has begun as a debugger does, the guest notices nothing of it, and it gives
        /// way to another one.
        case greeting
        /// A debugger has connected, and the vCPUs are stopping.
        case arriving
        case serving(DebugSession<MachineDebugTarget>)
        /// The debugger has gone without a word; the vCPUs are stopping, to be freed of its breakpoints.
        case leaving
    }

    private let server: DebugServer
    private let target: MachineDebugTarget
    private let ending: Ending
    private var phase = Phase.idle
    private var client: DebugClient?
    /// What the client has sent before there is a session.
    private var greeting: [UInt8] = []
    private var strangers = StrangerReport()
    /// Indicates whether the client is watched for room, with answers pending; what it sends is not read meanwhile.
    private var isWaitingForRoom = false

    init(_ server: DebugServer, _ target: MachineDebugTarget, _ ending: Ending) {
        self.server = server
        self.target = target
        self.ending = ending
    }

    mutating func run() {
        while true {
            var ready: [UInt64] = []
            do throws(SystemCallError) { try server.epoll.wait { token, _ in ready.append(token) } } catch {
                return ending.post(.hostError("the debugger thread's event loop failed: \(error)"))
            }
            for token in ready {
                switch token {
                case DebugServer.Token.end: return reportEnd()
                case DebugServer.Token.stopped:
                    server.stopped.event.drain()
                    checkStop()
                case DebugServer.Token.client: serveClient()
                default: acceptClient()
                }
            }
        }
    }

    // MARK: Visits

    private mutating func acceptClient() {
        // The one before may have gone, its end still unread.
        serveClient()
        while true {
            // One that comes while the vCPUs are stopping, for its predecessor or to be freed of its breakpoints, has
            // its turn afterwards.
            switch phase {
            case .arriving, .leaving: return
            case .idle, .greeting, .serving: break
            }
            guard let next = server.listener.accept() else { return }
            // One at a time: the stream of a second client is closed.
            if case .serving = phase { continue }
            dismiss()
            greet(DebugClient(next))
        }
    }

    private mutating func greet(_ next: DebugClient) {
        guard (try? server.epoll.add(next.descriptor.rawValue, .input, token: DebugServer.Token.client)) != nil else {
            return
        }
        client = next
        phase = .greeting
    }

    /// The client has sent its first bytes. GDB and LLDB speak first; a web browser that was pointed at the port does
    /// too, and what it sends must not reach a session.
    private mutating func hearGreeting() {
        guard let client, let bytes = client.receive() else { return }
        guard let first = bytes.first else { return dismiss() }
        guard DebugSession<MachineDebugTarget>.canBegin(with: first) else {
            strangers.report(began: first, to: server.log)
            return dismiss()
        }
        greeting = bytes
        // Not before the session: what it sends would keep the loop busy.
        server.epoll.remove(client.descriptor.rawValue)
        phase = .arriving
        target.attach()
    }

    /// Closes the connection of a client that there is no session with.
    private mutating func dismiss() {
        if let client { server.epoll.remove(client.descriptor.rawValue) }
        client = nil
        phase = .idle
    }

    private mutating func checkStop() {
        guard let stop = target.nextStop() else { return }
        switch phase {
        case .arriving:
            var session = DebugSession(target, stop: stop)
            session.receive(greeting)
            greeting = []
            phase = .serving(session)
            // Not before: what it has sent already would keep the loop busy.
            isWaitingForRoom = false
            guard let client,
                (try? server.epoll.add(client.descriptor.rawValue, .input, token: DebugServer.Token.client)) != nil
            else { return leave() }
            flush()
            // And a client that has come meanwhile.
            acceptClient()
        case .serving(var session):
            session.stopped(stop)
            phase = .serving(session)
            flush()
        case .greeting: target.detach()
        case .leaving, .idle:
            target.detach()
            phase = .idle
            acceptClient()
        }
    }

    /// Sends what is left to be sent, then reads what the client sends and answers, for as long as it takes the
    /// answers.
    private mutating func serveClient() {
        if case .greeting = phase { return hearGreeting() }
        guard case .serving(var session) = phase, let client else { return }
        // Out of the phase while it changes: it is not copied.
        phase = .arriving
        var isGone = !client.send(&session.output)
        while !isGone, session.output.isEmpty, !session.isFinished {
            guard let bytes = client.receive() else { break }
            isGone = bytes.isEmpty
            session.receive(bytes)
            isGone = !client.send(&session.output) || isGone
        }
        phase = .serving(session)
        if isGone || session.isFinished && session.output.isEmpty {
            leave()
        } else {
            watch(forRoom: !session.output.isEmpty)
        }
    }

    /// Sends pending output.
    private mutating func flush() {
        guard case .serving(var session) = phase, let client else { return }
        phase = .arriving
        let isThere = client.send(&session.output)
        phase = .serving(session)
        if !isThere || session.isFinished && session.output.isEmpty {
            leave()
        } else {
            watch(forRoom: !session.output.isEmpty)
        }
    }

    /// The visit is over: the guest runs on, without anything of the debugger's.
    private mutating func leave() {
        guard case .serving(let session) = phase else { return }
        if session.isForeign { strangers.report(began: nil, to: server.log) }
        if let client { server.epoll.remove(client.descriptor.rawValue) }
        client = nil
        guard target.isAttached else { return phase = .idle }
        if session.isRunning {
            phase = .leaving
            target.interrupt()
        } else {
            target.detach()
            phase = .idle
        }
    }

    /// The machine has ended, or the guest has reset itself.
    private mutating func reportEnd() {
        if case .greeting = phase { dismiss() }
        server.hadClient.store(client != nil, ordering: .releasing)
        guard case .serving(var session) = phase, let end = ending.end else { return }
        if case .signal(let number) = end {
            session.ended(.signal(UInt8(truncatingIfNeeded: number)))
        } else {
            session.ended(.status(UInt8(truncatingIfNeeded: end.exitStatus)))
        }
        client?.sendAll(&session.output)
    }

    private mutating func watch(forRoom wanted: Bool) {
        guard wanted != isWaitingForRoom, let client else { return }
        isWaitingForRoom = wanted
        try? server.epoll.modify(client.descriptor.rawValue, wanted ? .output : .input, token: DebugServer.Token.client)
    }
}
