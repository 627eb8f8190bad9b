// SPDX-License-Identifier: Apache-2.0

/// How much an engine has under way and does in a turn, in bytes: what the queue has at a time, and what the owner's
/// thread does until others have their turn.
struct WorkBudget {
    /// Bytes that the queue has.
    private(set) var bytesInFlight: UInt64 = 0
    /// How many it may have when it gets more.
    let maximumBytesInFlight: UInt64
    /// Bytes of work until the owner's turn is over.
    private var turnLeft = Int.max

    /// Bytes of one call of the kernel's, which nothing ends once it is under way; the rest of an operation follows, as
    /// after a short transfer.
    static let largestCall: UInt64 = 4 << 20
    /// Bytes that the queues of a disk have at a time: more than a disk needs to be busy, and no more than it does in a
    /// moment.
    static let maximumBytesInFlight: UInt64 = 64 << 20
    /// The same where the owner's thread carries everything out by itself, and gains nothing by more.
    private static let maximumBytesInFlightInTurn: UInt64 = 16 << 20
    /// Bytes that a turn of the owner's is worth: some ten milliseconds.
    private static let turn = 64 << 20
    /// The cost of a metadata lookup, in bytes.
    private static let lookup = 4 << 10
    /// What a change of the metadata alone is worth: a 64th of the bytes that it is about.
    private static let metadataShift: UInt64 = 6

    /// - Parameters:
    ///   - isConcurrent: whether operations are carried out while the owner continues.
    ///   - share: the engines together with which this one keeps to a bound of bytes under way.
    init(isConcurrent: Bool, share: Int) {
        maximumBytesInFlight =
            isConcurrent
            ? max(Self.largestCall, Self.maximumBytesInFlight / UInt64(max(1, share))) : Self.maximumBytesInFlightInTurn
    }

    /// Indicates whether there is room for another operation.
    var hasRoom: Bool { bytesInFlight < maximumBytesInFlight && turnLeft > 0 }

    // MARK: - The queue

    mutating func queue(_ bytes: UInt64) {
        bytesInFlight += bytes
        turnLeft -= Int(bytes)
    }

    mutating func dequeue(_ bytes: UInt64) { bytesInFlight -= bytes }

    // MARK: - The owner's turn

    mutating func beginTurn() { turnLeft = Self.turn }

    /// Begins a turn without end.
    mutating func beginEndlessTurn() { turnLeft = .max }

    var isTurnOver: Bool { turnLeft <= 0 }

    mutating func spendLookup() { turnLeft -= Self.lookup }
    mutating func spend(zeroes bytes: UInt64) { turnLeft -= Int(bytes) }
    mutating func spend(metadataOf bytes: UInt64) { turnLeft -= Int(clamping: bytes >> Self.metadataShift) }
}
