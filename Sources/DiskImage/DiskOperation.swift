// SPDX-License-Identifier: Apache-2.0

/// The operation of a request on a range of the disk.
public enum DiskOperation: UInt8, Sendable {
    /// Disk to memory.
    case read
    /// Memory to disk.
    case write
    /// Makes durable every write that completed before this was started.
    case flush
    /// The range's contents no longer matter. What is read from it afterwards is the old data or zeroes.
    case discard
    /// The range reads as zeroes afterwards; its space stays reserved.
    case writeZeroes
    /// The range reads as zeroes afterwards and its space may be freed.
    case writeZeroesUnmapping

    /// The operation's name in messages.
    var systemCall: String {
        switch self {
        case .read: "read"
        case .write: "write"
        case .flush: "fdatasync"
        case .discard, .writeZeroes, .writeZeroesUnmapping: "fallocate"
        }
    }
}
