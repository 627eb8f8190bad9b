// SPDX-License-Identifier: Apache-2.0

/// One operation of the queue.
struct IOOperation: ListElement {
    enum Kind: UInt8 {
        case read, write, synchronize, writeZeroes, zeroRange, load
        /// Frees a range's space: the first is best effort, after the second the range must read as zeroes.
        case discard, punch
        /// A synchronisation of a commit: of the file with the metadata, or of that with the data.
        case commit, commitData
        /// Zeroes for a reader, with which the queue has nothing to do.
        case zeroes
    }

    /// The memory of a transfer.
    enum Memory {
        case none
        /// All that is read or written.
        case piece(IOMemory)
        /// What is read or written is a part of the bytes of these.
        case segments(IOSegments, length: UInt64)
    }

    var kind = Kind.synchronize
    /// The request that it belongs to; -1 for a load.
    var request: Int32 = -1
    /// The file, by its number in the image.
    var layer = 0
    var fileOffset: UInt64 = 0
    /// Where in the request its bytes are.
    var start: UInt64 = 0
    var length: UInt64 = 0
    /// Bytes done, when the kernel did a part.
    var done: UInt64 = 0
    /// Bytes that the queue has of it.
    var submitted: UInt64 = 0
    var retries: Int32 = 0
    var memory = Memory.none
    var load: MetadataLoad?
    /// New clusters that become those of the disk from `guestOffset` on when they are written.
    var run = ClusterRun(first: 0, count: 0)
    var guestOffset: UInt64 = 0
    /// The copy whose cluster it writes; else -1.
    var copy: Int32 = -1
    /// The buffer with what it writes, or reads, encrypted; else -1.
    var cipherBuffer: Int32 = -1
    var isActive = false
    /// The operations of all engines have numbers in the order in which they began.
    var sequence: UInt64 = 0
    var next: Int32 = -1

    /// Indicates whether it is of a commit.
    var isCommit: Bool { kind == .commit || kind == .commitData }

    /// What it asks of the host.
    var access: FailedAccess {
        let call: FailedAccess.Call =
            switch kind {
            case .read, .load: .read
            case .write, .writeZeroes, .zeroes: .write
            case .synchronize, .commit, .commitData: .synchronize
            case .discard, .punch, .zeroRange: .allocate
            }
        return FailedAccess(call: call, file: layer, isMetadata: kind == .load, offset: fileOffset &+ done)
    }

    /// Makes bytes of the reader's zero, `start` of them behind the operation's first.
    func clear(from start: UInt64 = 0) {
        switch memory {
        case .none: break
        case .piece(let memory): memory.prefix(Int(length)).from(Int(start)).clear()
        case .segments(let segments, _): segments.clear(from: self.start + start, length: length - start)
        }
    }
}
