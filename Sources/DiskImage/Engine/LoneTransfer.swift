// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// A transfer between a file and memory, as a queue gets it.
@safe struct FileTransfer {
    let isRead: Bool
    let file: Int32
    /// Indicates whether it goes through the host's page cache.
    let isCached: Bool
    let segments: IOSegments
    let offset: UInt64
    let length: UInt64
    let token: UInt64
}

/// The one transfer of an engine that has nothing else under way, carried out by a system call of the engine's thread.
///
/// A system call costs less than an entry of a ring and its completion, and much less where the kernel hands the entry
/// on to a thread of its own, as it does every write to the page cache of a file system that cannot promise not to wait
/// (ext4 among them). It is right only for a transfer that nothing else waits for, so it is held back until everything
/// that there is has been begun: ``EngineQueue`` then knows whether it is alone.
///
/// A read is carried out only as far as the page cache has its bytes, since a disk may take long. A write may wait too,
/// while the kernel has too much to write back or reads the rest of a block; so would a thread of the kernel's.
struct LoneTransfer {
    private let calls: FileCalls
    /// The transfer until it is carried out.
    private(set) var held: FileTransfer?
    private var ended: (token: UInt64, result: Int)?
    /// The last files that can only be read with waiting, as their file systems have it; -1 for none.
    private var refusing = InlineArray<4, Int32>(repeating: -1)
    private var refusals = 0

    /// Bytes of the largest one: this thread serves a whole queue, and copying them is to take no longer than what is
    /// saved by it.
    static let largest: UInt64 = 64 << 10

    init(calls: FileCalls) { self.calls = calls }

    /// Indicates whether a transfer may be carried out here, if it is alone.
    func suits(_ transfer: FileTransfer) -> Bool {
        transfer.isCached && transfer.length <= Self.largest && isIdle
            && !(transfer.isRead && isRefusing(transfer.file))
    }

    private func isRefusing(_ file: Int32) -> Bool {
        refusing[0] == file || refusing[1] == file || refusing[2] == file || refusing[3] == file
    }

    private mutating func refuse(_ file: Int32) {
        refusing[refusals % refusing.count] = file
        refusals += 1
    }

    /// Indicates whether there is none.
    var isIdle: Bool { held == nil && ended == nil }

    mutating func hold(_ transfer: FileTransfer) { held = transfer }

    /// Releases the transfer, to be submitted to the ring.
    @discardableResult mutating func release() -> FileTransfer? { held.take() }

    /// Carries the transfer out. Returns whether it has ended; if not, it is still held.
    mutating func carryOut() -> Bool {
        guard let transfer = held else { return false }
        let result: Int
        if transfer.isRead {
            result = calls.readCached(transfer.file, transfer.segments, at: transfer.offset)
            if result == -Int(EOPNOTSUPP) { refuse(transfer.file) }
            // Any other result is left to the ring.
            guard result == Int(transfer.length) else { return false }
        } else {
            result = calls.write(transfer.file, transfer.segments, at: transfer.offset)
        }
        held = nil
        ended = (transfer.token, result)
        return true
    }

    /// Cancels the transfer if it has this token. Returns whether it has.
    mutating func cancel(_ token: UInt64) -> Bool {
        guard held?.token == token else { return false }
        held = nil
        ended = (token, -Int(ECANCELED))
        return true
    }

    /// Indicates whether it has ended and its result must be taken.
    var hasEnded: Bool { ended != nil }

    @inline(__always) mutating func takeEnded() -> (token: UInt64, result: Int)? { ended.take() }
}
