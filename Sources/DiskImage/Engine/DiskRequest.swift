// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// A request that has ended.
public struct DiskCompletion: Sendable {
    /// The number that ``DiskEngine/acquire()`` gave.
    public let request: Int
    public let operation: DiskOperation
    /// Byte of the disk where the request begins.
    public let offset: UInt64
    /// Bytes that the request was about.
    public let length: UInt64
    /// 0, or the errno value of the first failure.
    public let error: Int32
    /// The access that the host refused, for ``DiskEngine/failure(of:)``.
    let failed: FailedAccess?

    /// Indicates whether the image itself, and no file's I/O, is the likely reason.
    public var isDamage: Bool { failed == nil && error == EIO }

    /// Indicates whether the host had no room for what is written.
    public var isOutOfRoom: Bool { operation != .read && (error == ENOSPC || error == EDQUOT) }
}

/// A request and how far it has come. `next` links it into the one list that it is in.
struct DiskRequest: ListElement {
    var operation = DiskOperation.flush
    /// The owner's memory of a transfer.
    var segments: IOSegments?
    var offset: UInt64 = 0
    var length: UInt64 = 0
    /// Bytes from the start for which operations are under way or done.
    private(set) var mapped: UInt64 = 0
    var search = DiskImage.Search(limit: 0)
    /// Operations under way.
    var pending: Int32 = 0
    var error: Int32 = 0
    /// The access that gave the error; nil where it is of no file.
    var failed: FailedAccess?
    /// Indicates whether it waits for a commit to make room, and fails with it.
    var awaitsCommit = false
    /// Indicates whether it is in a list of those that wait, and will be advanced from there.
    var isListed = false
    var next: Int32 = -1

    init() {}

    init(_ operation: DiskOperation, segments: IOSegments? = nil, offset: UInt64, length: UInt64) {
        self.operation = operation
        self.segments = segments
        self.offset = offset
        self.length = length
        search.limit = length
    }

    var isTransfer: Bool { operation == .read || operation == .write }

    /// Indicates whether there is nothing left to be begun. A flush has no bytes and is one step.
    var isMapped: Bool { operation == .flush ? mapped != 0 : mapped == length }

    /// The byte of the disk from which on nothing has been begun.
    var position: UInt64 { offset + mapped }

    /// The memory for its operations.
    var memory: IOOperation.Memory { segments.map { .segments($0, length: length) } ?? .none }

    /// The next bytes are being dealt with.
    mutating func consume(_ bytes: UInt64) {
        mapped += bytes
        search = DiskImage.Search(limit: length - mapped)
    }

    /// A flush has been begun.
    mutating func consumeFlush() { mapped = 1 }

    /// Notes a failure, of which the first counts.
    mutating func fail(_ error: Int32, _ failed: FailedAccess? = nil) {
        guard error != 0, self.error == 0 else { return }
        self.error = error
        self.failed = failed
    }
}
