// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The process of a network that is up: it sets the network up, watches the bridge, and takes everything down when the
/// last machine has left, however that ended.
///
/// What it does is also done, after it was killed, by the next verb or start (``Networks/repair()``).
public struct NetworkKeeper: ~Copyable {
    private let files: NetworkFiles
    private let netlink: RouteNetlink
    private let process: ProcessFile
    private let watcher: LinkWatcher
    private let signals: FileDescriptor
    private var server: pid_t
    /// When the server was started last, in milliseconds.
    private var serverStart: UInt64
    private let state: NetworkState
    /// What a user is to know of the start.
    public let report: [String]

    /// Milliseconds between two starts of the server.
    private static let pause: UInt64 = 10_000

    /// Sets the network up. Its caller, or the caller's caller, has the lock of the networks.
    public init(_ name: NetworkName, _ networks: Networks) throws(NetworkError) {
        let files = networks.files(of: name)
        let process = try Self.lock(files)
        let set = SignalSet([SIGTERM, SIGINT, SIGHUP, SIGCHLD])
        set.block()
        let signals = try Self.descriptor(set, files)
        let setUp = try NetworkSetUp(files, try networks.definition(of: name))
        do throws(HostNetworkError) {
            let netlink = try RouteNetlink()
            let watcher = try LinkWatcher(index: setUp.bridgeIndex)
            self.init(files, setUp, process, signals, netlink, watcher)
        } catch {
            setUp.revert()
            throw .host(error.description)
        }
    }

    private init(
        _ files: NetworkFiles, _ setUp: NetworkSetUp, _ process: ProcessFile, _ signals: consuming FileDescriptor,
        _ netlink: consuming RouteNetlink, _ watcher: consuming LinkWatcher
    ) {
        (self.files, self.process) = (files, process)
        self.signals = signals
        self.netlink = netlink
        self.watcher = watcher
        (server, state, report) = (setUp.server, setUp.state, setUp.report)
        serverStart = TimerFD.now
    }

    private static func lock(_ files: NetworkFiles) throws(NetworkError) -> ProcessFile {
        do throws(ProcessFile.Refusal) { return try ProcessFile(files.process) } catch {
            switch error {
            case .taken: throw .isUp(files.name)
            case .foreign:
                throw .system(
                    purpose: "lock", path: files.process, SystemCallError("open", errno: EEXIST))
            case .system(let error): throw .system(purpose: "lock", path: files.process, error)
            }
        }
    }

    private static func descriptor(_ set: SignalSet, _ files: NetworkFiles) throws(NetworkError) -> FileDescriptor {
        do throws(SystemCallError) { return try set.descriptor() } catch {
            throw .system(purpose: "receive signals for", path: files.runtime, error)
        }
    }

    /// Returns when the network is down: no machine is left, and it is not to stay up without one; or somebody has
    /// removed its bridge.
    public mutating func run() {
        while true {
            let isIdle = !isNeeded
            if isIdle, end() { return }
            keepServer()
            var entries = [signals.rawValue, watcher.descriptor].map {
                pollfd(fd: $0, events: Int16(POLLIN), revents: 0)
            }
            // The array has two entries. Without a server, or if the end has failed, there is something to do later.
            _ = unsafe poll(&entries, 2, server > 0 && !isIdle ? -1 : 1000)
            while SignalSet.next(from: signals) != nil {}
            _ = watcher.latest()
        }
    }

    private var isNeeded: Bool {
        guard let bridge = try? netlink.link(named: state.bridge) else { return false }
        if fileStatus(ofPath: files.kept) != nil { return true }
        // Where the kernel does not tell, machines may be there.
        return (try? netlink.ports(of: bridge.index))?.isEmpty != true
    }

    /// Takes the network down, unless a machine has come meanwhile.
    private func end() -> Bool {
        guard let lock = try? NetworksLock(files.directories) else { return false }
        guard !isNeeded else { return false }
        // As the file has it now: another network may have left something to this one.
        NetworkSetUp.takeDown(files, NetworkState(of: files) ?? state, server: server)
        process.removeName()
        _ = files.runtime.withRawCString { unsafe rmdir($0) }
        _ = consume lock
        return true
    }

    /// Starts the server again when it has ended.
    private mutating func keepServer() {
        if server > 0, waitpid(server, nil, WNOHANG) == server { server = 0 }
        guard server <= 0, TimerFD.now >= serverStart &+ Self.pause else { return }
        serverStart = TimerFD.now
        server = (try? NetworkSetUp.startServer(files)) ?? 0
    }

    /// What `swkvm network keep` does: goes on in the background once the network is up. The process that was called
    /// prints what a user is to know, or why the network is not up.
    /// - Returns: the exit status.
    public static func main(_ name: NetworkName) -> Int32 {
        let networks = Networks(), files = networks.files(of: name)
        // Of the starter, which has nothing for a network's process.
        close(3)
        _ = unsafe chdir("/")
        do throws(SystemCallError) {
            // In memory: the reason may be a disk that is full.
            let messages = try FileDescriptor.memory("messages")
            let start = try BackgroundStart(messages: messages)
            do throws(NetworkError) {
                var keeper = try NetworkKeeper(name, networks)
                for line in keeper.report { try? Self.print(line) }
                _ = start.finish()
                keeper.run()
                return 0
            } catch {
                try? Self.print(error.description)
                return 1
            }
        } catch {
            try? Self.print(
                NetworkError.system(purpose: "start the process of", path: files.runtime, error).description)
            return 1
        }
    }

    private static func print(_ line: String) throws(SystemCallError) {
        try FileDescriptor.duplicate(of: STDERR_FILENO).writeAll(Array((line + "\n").utf8))
    }
}
