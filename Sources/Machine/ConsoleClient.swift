// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
public import Linux

/// A client of a machine's console socket, for a user at a terminal, or for a script on a pipe.
public struct ConsoleClient: ~Copyable {
    /// Why a session ended.
    public enum End: Equatable, Sendable {
        /// The user pressed ``escape``.
        case escape
        /// The machine closed the connection: it has ended, or has too many clients.
        case closed
        /// Standard output takes nothing any more, for that reason (an error number).
        case outputClosed(Int32)
        case signal(Int32)
    }

    /// Ctrl-], as in telnet and virsh.
    public static let escape: UInt8 = 0x1d

    private let socket: FileDescriptor

    /// - Throws: `ECONNREFUSED` or `ENOENT` when no machine listens at the path.
    public init(path: String) throws(SystemCallError) {
        socket = try Listener.client(of: path)
    }

    /// Passes bytes in both directions until one side ends. Standard input at its end is closed for the guest, whose
    /// output is still passed on.
    public consuming func run() throws(SystemCallError) -> End {
        let signals = SignalSet([SIGINT, SIGTERM, SIGHUP, SIGCONT, SIGTSTP].filter { !SignalSet.isIgnored($0) })
        let before = signals.block()
        defer { before.restore() }
        let events = try signals.descriptor()
        let terminal = RawTerminal(STDIN_FILENO)
        terminal?.update()
        var toMachine: [UInt8] = [], toUser: [UInt8] = []
        var hasInput = true
        var buffer = [UInt8](repeating: 0, count: 16 << 10)
        while true {
            var entries = [
                pollfd(fd: events.rawValue, events: Int16(POLLIN), revents: 0),
                // Its end, which is always reported, waits until what came before has been passed on.
                pollfd(
                    fd: toUser.isEmpty || !toMachine.isEmpty ? socket.rawValue : -1,
                    events: Int16(toUser.isEmpty ? POLLIN : 0) | Int16(toMachine.isEmpty ? 0 : POLLOUT), revents: 0),
                pollfd(fd: hasInput && toMachine.isEmpty ? STDIN_FILENO : -1, events: Int16(POLLIN), revents: 0),
                pollfd(fd: toUser.isEmpty ? -1 : STDOUT_FILENO, events: Int16(POLLOUT), revents: 0),
            ]
            // Four entries.
            guard unsafe poll(&entries, 4, -1) > 0 else { continue }
            if entries[0].revents != 0, let signal = SignalSet.next(from: events) {
                switch signal {
                case SIGCONT: terminal?.update()
                case SIGTSTP:
                    terminal?.restore()
                    SignalSet.applyDefault(of: SIGTSTP)
                    terminal?.update()
                default: return .signal(signal)
                }
            }
            if entries[3].revents != 0, !pass(&toUser, STDOUT_FILENO) { return .outputClosed(errno) }
            if entries[1].revents & Int16(POLLOUT) != 0, !pass(&toMachine, socket.rawValue) { return .closed }
            if entries[1].revents & ~Int16(POLLOUT) != 0, toUser.isEmpty {
                let bytes = read(socket.rawValue, &buffer)
                guard let bytes else { continue }
                guard !bytes.isEmpty else { return .closed }
                toUser = bytes
            }
            if entries[2].revents != 0, let keys = read(STDIN_FILENO, &buffer) {
                if let place = keys.firstIndex(of: Self.escape), terminal?.isOurs == true {
                    toMachine = Array(keys[..<place])
                    _ = pass(&toMachine, socket.rawValue)
                    return .escape
                }
                toMachine = keys
                if keys.isEmpty {
                    hasInput = false
                    shutdown(socket.rawValue, Int32(SHUT_WR))
                }
            }
        }
    }

    /// - Returns: nil when there is nothing now; none at the end.
    private borrowing func read(_ number: Int32, _ buffer: inout [UInt8]) -> [UInt8]? {
        // Into the array, as long as it is.
        let count = unsafe buffer.withUnsafeMutableBytes { unsafe Glibc.read(number, $0.baseAddress, $0.count) }
        if count < 0 { return errno == EAGAIN || errno == EINTR ? nil : [] }
        return Array(buffer[..<count])
    }

    /// Writes what the reader takes now.
    /// - Returns: false when there is no reader any more.
    private borrowing func pass(_ bytes: inout [UInt8], _ number: Int32) -> Bool {
        let count = unsafe bytes.withUnsafeBytes { unsafe write(number, $0.baseAddress, $0.count) }
        if count < 0 { return errno == EAGAIN || errno == EINTR }
        bytes.removeFirst(count)
        return true
    }
}
