// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// A benchmark of an image: many requests of one size, several in flight.
public struct ImageBench: Sendable {
    /// The offsets of the requests.
    public enum Pattern: Sendable, Equatable {
        /// Each request begins this many bytes after the last one.
        case sequential(step: UInt64)
        /// Anywhere; the places follow from the seed.
        case random(seed: UInt64)
    }

    /// The number of requests and the time.
    public struct Result: Sendable {
        public var seconds: Double
        /// Requests and bytes.
        public var requests: UInt64
        public var bytes: UInt64
    }

    public var path: String
    public var options = DiskImageOptions(readOnly: true)
    /// Indicates whether it writes, all bytes with the value ``fill``: what the image holds is lost.
    public var writes = false
    public var fill: UInt8 = 0
    public var count: UInt64 = 75000
    public var depth = 64
    public var size = 4096
    public var offset: UInt64 = 0
    public var pattern = Pattern.sequential(step: 4096)
    /// The number of writes between flushes; 0 for none.
    public var flushInterval: UInt64 = 0
    public var usesRing = true

    public init(path: String) { self.path = path }

    /// Carries the requests out. What follows the last one is no part of the time: a flush, if there were writes.
    /// - Parameter begins: called when the image is open and all is ready.
    public func run(begins: () -> Void = {}) throws(DiskImageError) -> Result {
        var options = options
        options.readOnly = !writes
        let image = try DiskImage(path: path, options: options)
        guard depth > 0, depth <= 4096, size > 0, size <= 64 << 20, UInt64(size) <= image.size,
            offset <= image.size - UInt64(size)
        else {
            throw .notApplicable(
                path: path,
                reason:
                    "requests of \(size) bytes from offset \(offset) with depth \(depth) do not fit on a disk of \(image.size) bytes"
            )
        }
        let diskSize = image.size
        var engine = try DiskEngine(image, depth: depth, segments: 1, usesRing: usesRing)
        let buffers = try TransferBuffer(depth * size, path)
        var lists: IOSegmentLists
        lists = try IOSegmentLists(count: depth, capacity: 1, path)
        // Each request has its own part of the buffer, which outlives the engine's use of it.
        var segments: [IOSegments] = []
        for request in 0..<depth { segments.append(lists.list(request, buffers.memory.piece(request * size, size))) }
        // For reads too: the memory is there before it counts.
        buffers.memory.fill(fill)

        var places = Places(pattern, offset: offset, diskSize: diskSize, size: UInt64(size))
        begins()
        let start = now()
        var started: UInt64 = 0, done: UInt64 = 0
        // Also until the last flush among them has ended.
        while done < count || engine.inFlight > 0 {
            while started < count, let request = engine.acquire() {
                engine.start(
                    request, writes ? .write : .read, offset: places.next(), length: UInt64(size),
                    segments: segments[request])
                started += 1
            }
            guard let completion = try engine.waitForCompletion() else { break }
            try complete(completion, &engine, &done)
            while let completion = engine.nextCompletion() { try complete(completion, &engine, &done) }
        }
        let seconds = now() - start
        if writes { try engine.perform(.flush) }
        return Result(seconds: seconds, requests: done, bytes: done * UInt64(size))
    }

    private func complete(
        _ completion: DiskCompletion, _ engine: inout DiskEngine, _ done: inout UInt64
    ) throws(DiskImageError) {
        if completion.error != 0 {
            throw .request(path: path, SystemCallError("\(completion.operation)", errno: completion.error))
        }
        if completion.operation == .flush { return engine.release(completion.request) }
        done += 1
        if flushInterval > 0, writes, done % flushInterval == 0 {
            engine.start(completion.request, .flush, offset: 0, length: 0)
        } else {
            engine.release(completion.request)
        }
    }

    private func now() -> Double {
        var time = timespec()
        // A value of its own.
        unsafe clock_gettime(CLOCK_MONOTONIC, &time)
        return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
    }
}

/// Where one request after the other begins.
struct Places {
    private let pattern: ImageBench.Pattern
    private let first: UInt64
    /// The last byte at which a request may begin.
    private let last: UInt64
    private let diskSize: UInt64
    private let size: UInt64
    private var position: UInt64
    private var state: UInt64 = 0

    /// Requests of `size` bytes, the first of them at `offset` or beyond, on a disk where that is possible.
    init(_ pattern: ImageBench.Pattern, offset: UInt64, diskSize: UInt64, size: UInt64) {
        self.pattern = pattern
        first = offset
        last = diskSize - size
        self.diskSize = diskSize
        self.size = size
        position = offset
        if case .random(let seed) = pattern { state = seed }
    }

    mutating func next() -> UInt64 {
        switch pattern {
        case .sequential(let step):
            let place = position
            // Around at the end, so that long steps come to other places each time; where no request fits, to where it
            // began.
            let next = (position + step % diskSize) % diskSize
            position = next > last ? first : next
            return place
        case .random:
            // SplitMix64: the same places with the same seed, whatever the machine.
            state &+= 0x9e37_79b9_7f4a_7c15
            var z = state
            z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
            z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
            z ^= z >> 31
            // Aligned as requests of a file system are.
            return first + z % ((last - first) / size + 1) * size
        }
    }
}
