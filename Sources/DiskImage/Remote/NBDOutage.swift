// SPDX-License-Identifier: Apache-2.0

/// The time between the loss of a remote disk's connection and the first answer that comes over another one, and what
/// the host's log says of it.
///
/// A server that completes the handshake and closes again has answered nothing: the outage continues, and with it the
/// patience of requests and the pauses between attempts. Times are milliseconds of one clock.
struct NBDOutage {
    /// For so long after a line about a loss the next loss is not logged, unless the connection is still down then.
    static let quietTime = 10_000

    /// When it began; nil without one. It is later by the time in which a connection stood and nothing was asked.
    private(set) var began: Int?
    /// Since when a connection stands over which nothing has been asked.
    private var idleSince: Int?
    /// Indicates whether the last line says that the connection is lost.
    private var isLogged = false
    private var quietUntil = Int.min
    /// Losses since the last line about one, and why the last of them happened.
    private var unlogged = 0
    private var pendingReason: String?

    /// When a line is due that ``overdue(_:patience:)`` returns; nil without one.
    var logsAt: Int? { pendingReason == nil ? nil : quietUntil }

    /// A connection that was ready has come to its end.
    /// - Returns: whether a command was answered over it, and a line for the log.
    mutating func lost(_ now: Int, _ reason: String, patience: Int) -> (wasUseful: Bool, line: String?) {
        asked(now)
        let wasUseful = began == nil
        if wasUseful { began = now }
        guard !isLogged else { return (wasUseful, nil) }
        unlogged += 1
        pendingReason = reason
        return (wasUseful, now >= quietUntil ? overdue(now, patience: patience) : nil)
    }

    /// The line about a loss that was not logged when it happened, if it is time for it.
    mutating func overdue(_ now: Int, patience: Int) -> String? {
        guard let reason = pendingReason, now >= quietUntil else { return nil }
        let count = unlogged > 1 ? " (\(unlogged) times by now)" : ""
        (pendingReason, unlogged, isLogged, quietUntil) = (nil, 0, true, now + Self.quietTime)
        return "connection lost\(count): \(reason); requests wait up to \(patience / 1000) s for a reconnect"
    }

    /// Another connection is ready.
    /// - Returns: a line for the log, where no command waits whose answer would show that the server is back.
    mutating func connected(_ now: Int, isAwaited: Bool) -> String? {
        pendingReason = nil
        guard !isAwaited else { return nil }
        idleSince = now
        return back(now, "no requests were waiting")
    }

    /// A command is sent.
    mutating func asked(_ now: @autoclosure () -> Int) {
        guard let idle = idleSince else { return }
        idleSince = nil
        if let began { self.began = began + now() - idle }
    }

    /// A command was answered: the outage is over, if there was one.
    mutating func answered(_ now: @autoclosure () -> Int) -> String? {
        guard began != nil else { return nil }
        let line = back(now(), "waiting requests are sent again")
        began = nil
        idleSince = nil
        return line
    }

    private mutating func back(_ now: Int, _ rest: String) -> String? {
        guard isLogged, let began else { return nil }
        isLogged = false
        return "reconnected after \((now - began + 999) / 1000) s; \(rest)"
    }
}
