// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// A fixed number of entries for connections: which are free, which has which ports, and which have something for the
/// guest. Nothing here allocates.
struct VsockTable: ~Copyable {
    /// Connections at a time, those included that are being opened.
    static let capacity = 1024
    /// Bytes of the guest that a connection holds for a socket.
    static let bufferSize = 256 << 10
    private static let bucketCount = 2048

    private var entries: [VsockConnection]
    private var buckets = [Int32](repeating: -1, count: Self.bucketCount)
    private var firstFree: Int32 = 0
    private(set) var freeCount = Self.capacity
    /// Memory for what sockets do not take, a part for each entry.
    private let buffers: Mapping
    /// Connections with something for the guest, in the order in which they are served; -1 for none.
    private(set) var first: Int32 = -1
    private var last: Int32 = -1

    init() throws(SystemCallError) {
        buffers = try Mapping(
            size: Self.capacity * Self.bufferSize, flags: MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
        entries = (0..<Self.capacity).map { index in
            var connection = VsockConnection()
            connection.nextInBucket = index + 1 < Self.capacity ? Int32(index + 1) : -1
            return connection
        }
    }

    deinit { for connection in entries where connection.socket >= 0 { close(connection.socket) } }

    subscript(index: Int32) -> VsockConnection {
        get { entries[Int(index)] }
        _modify { yield &entries[Int(index)] }
    }

    /// Part of the buffer of a connection.
    func buffer(_ index: Int32, _ range: Range<Int>) -> UnsafeMutableRawBufferPointer {
        precondition(
            index >= 0 && index < Self.capacity && range.lowerBound >= 0 && range.upperBound <= Self.bufferSize)
        // Within this connection's part of the mapping.
        return unsafe UnsafeMutableRawBufferPointer(
            start: buffers.start + Int(index) * Self.bufferSize + range.lowerBound, count: range.count)
    }

    // MARK: Entries

    mutating func allocate() -> Int32? {
        guard firstFree >= 0 else { return nil }
        let index = firstFree
        firstFree = self[index].nextInBucket
        freeCount -= 1
        let generation = self[index].generation
        self[index] = VsockConnection()
        self[index].generation = generation
        return index
    }

    /// Closes the socket of a connection that is in no bucket; the entry is free.
    mutating func release(_ index: Int32) {
        unlist(index)
        let connection = self[index]
        // epoll forgets it with its only descriptor.
        if connection.socket >= 0 { close(connection.socket) }
        if connection.hasUsedBuffer {
            let buffer = unsafe buffer(index, 0..<Self.bufferSize)
            // Nobody needs the contents.
            _ = unsafe madvise(buffer.baseAddress, buffer.count, Int32(MADV_DONTNEED))
        }
        self[index] = VsockConnection()
        self[index].generation = connection.generation &+ 1
        self[index].nextInBucket = firstFree
        firstFree = index
        freeCount += 1
    }

    var indices: Range<Int32> { 0..<Int32(Self.capacity) }

    // MARK: Tokens

    /// What an event of a connection's socket is recognized by, below 2³².
    func token(_ index: Int32) -> UInt64 {
        UInt64(self[index].generation) << 16 | UInt64(UInt32(bitPattern: index))
    }

    /// - Returns: nil for a connection that has ended.
    func index(ofToken token: UInt64) -> Int32? {
        let index = Int32(truncatingIfNeeded: token & 0xffff)
        guard index < Self.capacity, self[index].state != .free,
            self[index].generation == UInt16(truncatingIfNeeded: token >> 16)
        else { return nil }
        return index
    }

    // MARK: Lookup

    private static func bucket(_ hostPort: UInt32, _ guestPort: UInt32) -> Int {
        let mixed = (UInt64(hostPort) << 32 | UInt64(guestPort)) &* 0x9e37_79b9_7f4a_7c15
        return Int(mixed >> 53)
    }

    func find(hostPort: UInt32, guestPort: UInt32) -> Int32? {
        var index = buckets[Self.bucket(hostPort, guestPort)]
        while index >= 0 {
            if self[index].hostPort == hostPort, self[index].guestPort == guestPort { return index }
            index = self[index].nextInBucket
        }
        return nil
    }

    mutating func link(_ index: Int32) {
        let bucket = Self.bucket(self[index].hostPort, self[index].guestPort)
        self[index].nextInBucket = buckets[bucket]
        buckets[bucket] = index
    }

    mutating func unlink(_ index: Int32) {
        let bucket = Self.bucket(self[index].hostPort, self[index].guestPort)
        if buckets[bucket] == index {
            buckets[bucket] = self[index].nextInBucket
            return
        }
        var before = buckets[bucket]
        while before >= 0 {
            let next = self[before].nextInBucket
            if next == index {
                self[before].nextInBucket = self[index].nextInBucket
                return
            }
            before = next
        }
    }

    // MARK: The order of service

    /// Puts a connection at the end of the list if it has something for the guest, or takes it out if it has nothing.
    mutating func refresh(_ index: Int32) {
        let connection = self[index]
        if connection.state == .established, connection.isReadable, !connection.hasEnded, connection.credit == 0,
            !connection.hasAskedForCredit
        {
            self[index].hasAskedForCredit = true
            self[index].owed.insert(.creditRequest)
        }
        guard self[index].hasWork else { return unlist(index) }
        guard !connection.isListed else { return }
        self[index].isListed = true
        self[index].previous = last
        self[index].next = -1
        if last >= 0 { self[last].next = index } else { first = index }
        last = index
    }

    mutating func unlist(_ index: Int32) {
        let connection = self[index]
        guard connection.isListed else { return }
        if connection.previous >= 0 {
            self[connection.previous].next = connection.next
        } else {
            first = connection.next
        }
        if connection.next >= 0 {
            self[connection.next].previous = connection.previous
        } else {
            last = connection.previous
        }
        self[index].isListed = false
    }

    /// It is the others' turn.
    mutating func rotate(_ index: Int32) {
        unlist(index)
        refresh(index)
    }
}
