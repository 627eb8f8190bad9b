// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// A remote disk as the queue of an engine, whose thread alone calls these.
extension NBDDisk {
    func transfer(
        _ request: NBDRequest, _ segments: IOSegments, at offset: UInt64, token: UInt64
    ) throws(SystemCallError) {
        let command = self.begin(request, segments, at: offset, token: token)
        if command == nil { throw SystemCallError("nbd", errno: EBUSY) }
    }

    func change(_ request: NBDRequest, at offset: UInt64 = 0, length: UInt64 = 0, token: UInt64) throws(SystemCallError)
    {
        let command = self.begin(request, at: offset, length: length, token: token)
        if command == nil { throw SystemCallError("nbd", errno: EBUSY) }
    }

    /// Sends what was requested. While there is no connection, it also processes events: a caller whose requests all
    /// fail immediately might otherwise never do so, and would prevent a reconnect.
    func submit() {
        if isUp { goOn() } else { handle(look(timeout: 0)) }
    }

    /// Waits until something has ended, of which at least one is to come.
    func wait() {
        goOn()
        while ended.isEmpty { handle(look(timeout: -1)) }
    }

    func nextCompletion() -> IORing.Completion? {
        if ended.isEmpty { handle(look(timeout: 0)) }
        guard ended.first >= 0 else { return nil }
        let index = ended.first
        removeFirst(&ended)
        let command = commands[index]
        release(index)
        let moved = command.request == .read || command.request == .write ? command.length : 0
        return IORing.Completion(
            token: command.token, result: command.error == 0 ? Int32(clamping: moved) : -command.error)
    }
}
