// SPDX-License-Identifier: Apache-2.0

internal import Virtio

/// A first-in, first-out queue of bytes with a fixed capacity.
struct ByteQueue {
    private let capacity: Int
    /// Grows to the capacity as it is filled for the first time, so that memory that is never needed is not touched.
    private var storage: [UInt8] = []
    private var start = 0
    private(set) var count = 0

    init(capacity: Int) {
        self.capacity = capacity
        storage.reserveCapacity(capacity)
    }

    var isEmpty: Bool { count == 0 }
    var room: Int { capacity - count }

    /// Returns false when the queue is full.
    mutating func append(_ byte: UInt8) -> Bool {
        guard room > 0 else { return false }
        let place = (start + count) % capacity
        if place == storage.count { storage.append(byte) } else { storage[place] = byte }
        count += 1
        return true
    }

    mutating func removeFirst() -> UInt8? {
        guard count > 0 else { return nil }
        defer { drop(1) }
        return storage[start]
    }

    /// Appends bytes from the front, as far as there is room.
    /// - Returns: how many.
    mutating func append(_ bytes: Span<UInt8>) -> Int {
        let count = min(bytes.count, room)
        for index in 0..<count { _ = append(bytes[index]) }
        return count
    }

    mutating func removeAll() { drop(count) }

    /// Moves bytes from the front into a run of guest memory, as far as it reaches.
    /// - Returns: how many.
    mutating func move(to buffers: IOVectors) -> Int {
        var done = 0
        while count > 0 {
            let length = min(count, capacity - start)
            // The rest of the ring's bytes up to its end, all of them initialized.
            let taken = unsafe buffers.copy(
                at: UInt64(done), from: storage.span.extracting(start..<start + length).bytes)
            drop(taken)
            done += taken
            if taken < length { break }
        }
        return done
    }

    /// Gives the sink as much as it takes.
    mutating func drain(to sink: any SerialSink) {
        while count > 0 {
            let length = min(count, capacity - start)
            let taken = min(max(sink.take(storage.span.extracting(start..<start + length)), 0), length)
            drop(taken)
            if taken < length { return }
        }
    }

    private mutating func drop(_ number: Int) {
        count -= number
        // An empty queue is filled from its beginning: in the memory that was used before.
        start = count == 0 ? 0 : (start + number) % capacity
    }
}
