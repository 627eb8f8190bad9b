// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

/// What can be asked of a server.
enum NBDRequest: UInt8 {
    case read, write, flush
    /// The range's contents no longer matter.
    case trim
    /// The range becomes zero, and its space may be freed, or not.
    case zero, zeroKeeping
    /// The block status of the range.
    case status

    var changes: Bool { self != .read && self != .flush && self != .status }
}

/// A request of the disk's user on its way, which may take several of the server's, one after the other. It stays at
/// one place of memory, where libnbd's callbacks find it.
struct NBDCommand {
    enum State: UInt8 {
        case free
        /// A command to be sent, now or after a reconnect.
        case waiting
        case sent
        /// Answered, in the board's list until the disk processes it.
        case answered
        /// Over; its user has not heard of it yet.
        case ended
    }

    var state = State.free
    var request = NBDRequest.flush
    /// What the user knows it by.
    var token: UInt64 = 0
    var offset: UInt64 = 0
    /// Bytes; of a transfer, what is moved in one step: the user requests the rest again.
    var length: UInt64 = 0
    /// Bytes done of what transfers nothing.
    var done: UInt64 = 0
    /// The user's memory. It stays until the command has ended.
    var segments: IOSegments?
    /// Our own memory in place of the user's, by its number; -1 without.
    var bounce: Int32 = -1
    /// Indicates whether a write begins or ends within a block of the server, of which the rest has to be read first.
    var isPartial = false
    /// Indicates whether a thread waits for this one, and takes its end itself.
    var isAwaited = false
    /// 0 or an errno value.
    var error: Int32 = 0
    /// Where the answer of ``NBDRequest/status`` goes.
    var extents: NBDExtents?

    /// When it was first lost with a connection, without progress since then; nil before that.
    var lostAt: Int?

    // What the server is asked.
    var sending = NBDRequest.flush
    var sentOffset: UInt64 = 0
    var sentLength: UInt64 = 0
    var memory: IOMemory?

    /// The next one of the list that it is in.
    var next: Int32 = -1
    var index: Int32 = -1
    /// Its disk's, which outlives the commands: no reference is counted for it.
    unowned(unsafe) let board: NBDBoard

    /// libnbd says that the server has answered, or never will (`ENOTCONN`).
    mutating func answer(_ error: Int32) {
        guard state == .sent else { return }
        state = .answered
        self.error = error
        // The disk has its board for as long as it has commands.
        unsafe (next, board.firstAnswered) = (board.firstAnswered, index)
    }
}

/// Where answered commands are left: the last one first.
final class NBDBoard {
    var firstAnswered: Int32 = -1
}

/// How a range is stored, from its start on: at most as many pieces as there is room for. It is shared by the caller
/// and the command.
final class NBDExtents {
    static let capacity = 256
    private var pieces: InlineArray<256, (length: UInt32, readsAsZeroes: Bool)> = .init(repeating: (0, false))
    private(set) var count = 0
    /// The first byte of the disk that it is about.
    var offset: UInt64 = 0

    /// Records the next piece; not after an empty one, which is a protocol violation.
    func append(length: UInt32, readsAsZeroes: Bool) {
        guard count < Self.capacity, count == 0 || pieces[count - 1].length > 0 else { return }
        pieces[count] = (length, readsAsZeroes)
        count += 1
    }

    func clear() { count = 0 }

    /// The piece with a byte of the disk, or nil if none has it.
    func piece(at place: UInt64) -> (end: UInt64, readsAsZeroes: Bool)? {
        var start = offset
        guard place >= start else { return nil }
        for index in 0..<count {
            let end = start + UInt64(pieces[index].length)
            if place < end { return (end, pieces[index].readsAsZeroes) }
            start = end
        }
        return nil
    }
}
