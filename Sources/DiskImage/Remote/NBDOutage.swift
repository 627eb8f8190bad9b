// SPDX-License-Identifier: Apache-2.0

/// The time between the loss of a remote disk's connection and the first answer that comes over another one, and what
/// the host's log says of it: the first loss at once, and then the number of further ones once in each quiet time.
///
/// A server that completes the handshake and closes again has answered nothing: the outage continues, and with it the
/// patience of requests and the pauses between attempts. Times are milliseconds of one clock.
struct NBDOutage {
    /// For so long after a line about a loss the next ones are only counted.
    static let quietTime = 60_000

    /// When it began; nil without one. It is later by the time in which a connection stood and nothing was asked.
    private(set) var began: Int?
    /// Since when a connection stands over which nothing has been asked.
    private var idleSince: Int?
    /// Since when no connection stands, or one that has answered nothing of what waits; nil while one does.
    private var downSince: Int?
    /// Indicates whether the last line says that the connection is lost.
    private var isLogged = false
    private var quietUntil = Int.min
    /// Losses since the last line about one, and why the last of them happened.
    private var unlogged = 0
    private var reason = ""

    /// When a line is due that ``overdue(_:patience:)`` returns; nil without one.
    var logsAt: Int? { unlogged > 0 ? quietUntil : nil }

    /// A connection that was ready has come to its end.
    /// - Returns: whether a command was answered over it, and a line for the log.
    mutating func lost(_ now: Int, _ reason: String, patience: Int) -> (wasUseful: Bool, line: String?) {
        asked(now)
        let wasUseful = began == nil
        if wasUseful { began = now }
        self.reason = reason
        if downSince == nil {
            downSince = now
            unlogged += 1
        }
        return (wasUseful, overdue(now, patience: patience))
    }

    /// The line about losses that were not logged when they happened, if it is time for it.
    mutating func overdue(_ now: Int, patience: Int) -> String? { now >= quietUntil ? rest(now, patience) : nil }

    /// The same, whatever the time: there is no other.
    mutating func last(_ now: Int) -> String? { rest(now, nil) }

    private mutating func rest(_ now: Int, _ patience: Int?) -> String? {
        guard unlogged > 0 else { return nil }
        let isDown = downSince != nil
        let count =
            unlogged > 1 || !isDown ? " (\(unlogged) time\(unlogged == 1 ? "" : "s") since the last message)" : ""
        (unlogged, isLogged, quietUntil) = (0, isDown, now + Self.quietTime)
        guard isDown else { return "connection lost and restored\(count): \(reason)" }
        return "connection lost\(count): \(reason)"
            + (patience.map { "; requests wait up to \($0 / 1000) s for a reconnect" } ?? "")
    }

    /// Another connection is ready.
    /// - Returns: a line for the log, where no command waits whose answer would show that the server is back.
    mutating func connected(_ now: Int, isAwaited: Bool) -> String? {
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
        guard let since = downSince else { return nil }
        downSince = nil
        guard isLogged else { return nil }
        isLogged = false
        return "reconnected after \((now - since + 999) / 1000) s; \(rest)"
    }
}
