// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// The life of a remote disk's connections: the first one, its loss, and those that follow.
extension NBDDisk {
    enum Link {
        case up
        case connecting(deadline: Int)
        case down(retryAt: Int)
        /// The connection failed permanently.
        case broken
    }

    /// Seconds for which requests wait for a connection that was lost, unless the user says otherwise.
    static let standardReconnect = 10
    /// Milliseconds that a server has for the way from the first packet to the disk.
    static let connectTime = 10_000
    /// Milliseconds between attempts to connect again: twice as many after each, up to the last.
    static let firstPause = 100
    private static let lastPause = 5000

    /// The first connection, to the first address that answers.
    func connectFirst() throws(DiskImageError) {
        var failure = NBDFailure("it has no address")
        for address in addresses {
            do throws(NBDFailure) {
                try adopt(NBDConnection(location, to: address))
                return try waitUntilReady(Self.connectTime)
            } catch {
                failure = error
            }
            if isInterrupted?() == true { throw .openingInterrupted(path: path) }
            nextAddress += 1
        }
        throw .remote(path: path, reason: explained(failure))
    }

    func waitUntilReady(_ time: Int) throws(NBDFailure) {
        let deadline = now() + time
        watch()
        while true {
            switch connection?.stage {
            case .ready:
                if let connection {
                    export = try connection.export()
                    connection.watchPeer()
                }
                readyAt = now()
                link = .up
                statistics.noteConnected()
                return
            case .connecting:
                let left = deadline - now()
                if isInterrupted?() == true {
                    close()
                    throw NBDFailure("it was interrupted")
                }
                guard left > 0 else {
                    close()
                    throw NBDFailure(
                        "no answer within \(time / 1000) seconds; a server that serves one client at a time may be busy (qemu-nbd --shared)"
                    )
                }
                let events = look(timeout: Int32(clamping: left))
                if !events.socket.isEmpty, events.generation == generation { try connection?.notify(events.socket) }
                watch()
            case .dead, nil:
                throw NBDFailure(lastFailure.isEmpty ? "the server has closed the connection" : lastFailure)
            }
        }
    }

    func adopt(_ connection: NBDConnection) {
        close()
        generation += 1
        self.connection = connection
    }

    /// Closes the connection. Requests that were sent over it must be sent again.
    private func close() {
        if let number = connection?.descriptor, number >= 0, !watched.isEmpty { epoll.remove(number) }
        watched = []
        connection = nil
        reclaim()
    }

    /// One step of a connection's life; false when there is nothing to be done now.
    func step() -> Bool {
        let now = now()
        if isCancelled { return cancelAll() }
        if let line = outage.overdue(now, patience: patience) { tell(line) }
        if let endBy, now >= endBy || inUse == 0 {
            self.endBy = nil
            if inUse > 0 {
                tell("cancelled \(inUse) requests that the server did not answer")
                lose("requests were cancelled")
                failWaiting(EIO)
                return true
            }
        }
        switch link {
        case .up:
            guard isShutDown || connection?.stage != .ready else { return false }
            lose(isShutDown ? "the server shuts down" : lastFailure.isEmpty ? "the server has closed it" : lastFailure)
            return true
        case .connecting(let deadline):
            switch connection?.stage {
            case .ready:
                establish()
                return true
            case .connecting where now < deadline:
                break
            case .connecting:
                retryLater("no answer within \(Self.connectTime / 1000) seconds")
                return true
            case .dead, nil:
                retryLater(lastFailure)
                return true
            }
        case .down(let retryAt):
            if now >= retryAt, !addresses.isEmpty {
                connectAgain()
                return true
            }
        case .broken:
            break
        }
        if isHopeless(now) { failWaiting(EIO) }
        return false
    }

    /// Indicates whether requests need not wait for a connection.
    private func isHopeless(_ now: Int) -> Bool {
        if case .broken = link { return true }
        guard let began = outage.began else { return false }
        return now >= began + patience || addresses.isEmpty
    }

    private func lose(_ reason: String) {
        isShutDown = false
        lastFailure = ""
        statistics.noteLost()
        let now = now()
        let (wasUseful, line) = outage.lost(now, reason, patience: patience)
        if let line { tell(line) }
        // A connection without an answer is no better than none.
        guard wasUseful else { return retryLater(reason) }
        close()
        (tried, pause) = (0, Self.firstPause)
        link = .down(retryAt: max(now, readyAt + Self.firstPause))
    }

    private func connectAgain() {
        let address = addresses[nextAddress % addresses.count]
        do throws(NBDFailure) {
            try adopt(NBDConnection(location, to: address))
            link = .connecting(deadline: now() + Self.connectTime)
        } catch {
            retryLater(error.reason)
        }
    }

    /// An attempt has failed: the next address is tried immediately, the first one again after a pause.
    private func retryLater(_ reason: String) {
        close()
        lastFailure = reason
        nextAddress += 1
        tried += 1
        guard tried >= addresses.count else { return link = .down(retryAt: now()) }
        tried = 0
        link = .down(retryAt: now() + pause)
        pause = min(2 * pause, Self.lastPause)
    }

    private func establish() {
        do throws(NBDFailure) {
            guard let found = try connection?.export() else { return retryLater("") }
            if let difference = found.difference(from: export) {
                tell("the server now has \(difference): it is not used, and every request fails")
                lastFailure = "the server has another disk since the connection was lost: \(difference)"
                close()
                link = .broken
                return
            }
            connection?.watchPeer()
            statistics.noteConnected()
            readyAt = now()
            if let line = outage.connected(readyAt, isAwaited: !waiting.isEmpty) { tell(line) }
            lastFailure = ""
            link = .up
        } catch {
            retryLater(error.reason)
        }
    }

    private func cancelAll() -> Bool {
        if case .broken = link, waiting.isEmpty { return false }
        connection?.disconnect()
        close()
        link = .broken
        failWaiting(ECANCELED)
        return false
    }

    /// A command was answered, with whatever.
    func noteAnswer() {
        if let line = outage.answered(now()) { tell(line) }
    }

    /// Why requests fail that cannot be sent; nil while they wait for a connection, or have one.
    var outageReason: String? {
        if case .broken = link { return failure }
        guard isHopeless(now()) else { return nil }
        return "no connection to the server" + (patience > 0 ? " for \(patience / 1000) s" : "")
    }

    /// Reports the losses that were only counted, up to now: the disk is at its end.
    func reportLosses() {
        handle(look(timeout: 0))
        if let line = outage.last(now()) { tell(line) }
    }

    private func tell(_ what: String) { report?("disk \(quoted(path)): \(what)") }

    /// libnbd's words, and what they mean where they do not say it.
    private func explained(_ failure: NBDFailure) -> String {
        let text = failure.reason
        // NBD_REP_ERR_TLS_REQD comes before the server says more.
        if location.security == nil, text.firstOccurrence(of: "TLS") != nil || text.firstOccurrence(of: "tls") != nil {
            return "\(text); the server requires TLS: use nbds:"
        }
        // Without a name libnbd uses that of the logged-in user.
        if let security = location.security, security.keyFile != nil, security.user == nil,
            text.firstOccurrence(of: "getlogin") != nil || text.firstOccurrence(of: "gnutls") != nil
        {
            return "\(text); specify the user of the key: nbds://USER@…"
        }
        return text
    }
}
