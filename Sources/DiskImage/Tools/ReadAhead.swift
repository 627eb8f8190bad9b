// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Reads around the page cache that continue while a thread of a conversion deals with the piece before: what the
/// kernel's reading ahead is for reads through it. Without an io_uring it takes nothing, and everything is read when it
/// is needed.
struct ReadAhead: ~Copyable {
    /// A read under way, or one that has ended and did not bring all.
    struct Read {
        var memory: IOMemory
        var place: UInt64
        var file: Int
        var buffer: Int
    }

    /// Reads that can be under way.
    static let capacity = 64

    private let ring: IORing?
    private var reads: [Read?]
    private var lists: IOSegmentLists?
    /// Under way, for each buffer.
    private var pending: [Int]
    /// What has to be read again by one system call after the other, for each buffer.
    private var failed: [[Read]]

    /// - Parameters:
    ///   - buffers: how many buffers there are, which are waited for one by one.
    ///   - usesRing: false does without io_uring, as happens by itself where the host has none for this process.
    init(buffers: Int, usesRing: Bool = true) {
        ring = usesRing ? try? IORing(entries: Self.capacity) : nil
        reads = [Read?](repeating: nil, count: Self.capacity)
        pending = [Int](repeating: 0, count: buffers)
        failed = [[Read]](repeating: [], count: buffers)
        lists = try? IOSegmentLists(count: Self.capacity, capacity: 1, "")
    }

    /// The ring's, if there is one.
    var descriptor: Int32? {
        switch ring {
        case .some(let ring): ring.rawValue
        case nil: nil
        }
    }

    /// Waits for all operations that the kernel has, and ignores their results: it may write to the buffers until then,
    /// so they must not be freed before. Operations that it has not accepted are never executed.
    ///
    /// This cannot fail, even if the kernel refuses further operations: those that it has complete anyway, and make the
    /// ring's descriptor readable.
    mutating func drain() {
        switch ring {
        case .some(let ring):
            var left = pending.reduce(0, +) - ring.queued()
            while left > 0 {
                if let completion = ring.nextCompletion() {
                    let slot = Int(completion.token)
                    guard reads.indices.contains(slot), let read = reads[slot] else { continue }
                    reads[slot] = nil
                    pending[read.buffer] -= 1
                    left -= 1
                } else {
                    waitUntilReadable(ring.rawValue)
                }
            }
        case nil: break
        }
    }

    /// Starts a read, which ``submit()`` hands over. Returns false when it cannot be under way too.
    mutating func start(_ read: Read, _ descriptor: Int32) -> Bool {
        guard let slot = reads.firstIndex(where: { $0 == nil }) else { return false }
        // The slot's list; the memory is the caller's until the buffer has been waited for.
        guard let segments = lists?.list(slot, read.memory), queue(descriptor, segments, read.place, UInt64(slot))
        else { return false }
        reads[slot] = read
        pending[read.buffer] += 1
        return true
    }

    /// Hands what was started to the kernel. What it does not take ends in ``wait(_:)``.
    func submit() {
        switch ring {
        case .some(let ring): try? ring.submit()
        case nil: break
        }
    }

    /// Waits for the reads of a buffer.
    /// - Returns: those that have to be done again, as they failed or came short.
    mutating func wait(_ buffer: Int) throws(SystemCallError) -> [Read] {
        while pending[buffer] > 0 {
            guard let completion = nextCompletion() else {
                try waitForOne()
                continue
            }
            let slot = Int(completion.token)
            guard reads.indices.contains(slot), let read = reads[slot] else { continue }
            reads[slot] = nil
            pending[read.buffer] -= 1
            if Int(completion.result) != read.memory.count { failed[read.buffer].append(read) }
        }
        defer { failed[buffer] = [] }
        return failed[buffer]
    }

    private func queue(_ descriptor: Int32, _ segments: IOSegments, _ place: UInt64, _ token: UInt64) -> Bool {
        switch ring {
        // They stay until it has ended.
        case .some(let ring):
            unsafe (try? ring.read(descriptor, segments.vectors, count: segments.count, at: place, token: token)) != nil
        case nil: false
        }
    }

    private func nextCompletion() -> IORing.Completion? {
        switch ring {
        case .some(let ring): ring.nextCompletion()
        case nil: nil
        }
    }

    private func waitForOne() throws(SystemCallError) {
        switch ring {
        case .some(let ring):
            try ring.submit()
            try ring.wait()
        case nil: break
        }
    }
}
