// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Changes much of an image by what others show, many requests at a time: while those are under way, what comes next is
/// read.
final class WindowWriter {
    // They go in this order: what the kernel may still use is not freed before the engine has waited for it.
    /// The image. When the engine is used for something else, nothing is in flight.
    var engine: DiskEngine
    private let sources: [WindowReader]
    /// One for each request.
    private var lists: IOSegmentLists
    /// Requests that write what is in a window's memory.
    private var users = [Int](repeating: 0, count: WindowReader.count)
    /// The window of each request that has one.
    private var windows = [Int?](repeating: nil, count: depth)

    /// Windows that are being read; the others are being written.
    private static let ahead = WindowReader.count / 2
    /// Requests at a time. A window may need many, where only some of its clusters are changed.
    private static let depth = 64

    /// An engine for this.
    /// - Parameter calls: a test's system calls; nil for the host's.
    static func engine(_ image: DiskImage, calls: FileCalls?) throws(DiskImageError) -> DiskEngine {
        if let calls { return try DiskEngine(image, depth: depth, segments: 1, calls: calls) }
        return try DiskEngine(image, depth: depth, segments: 1)
    }

    /// - Parameters:
    ///   - engine: of ``engine(_:calls:)``.
    ///   - sources: what is read. What is in the memory of the first one can be written.
    init(_ engine: consuming DiskEngine, sources: [WindowReader]) throws(DiskImageError) {
        lists = try IOSegmentLists(count: Self.depth, capacity: 1, engine.path)
        self.sources = sources
        self.engine = engine
    }

    deinit {
        // After an error or a cancellation: no request may use the memory of windows any more.
        engine.cancelAll()
    }

    /// Goes through a disk, and makes what was written durable.
    /// - Parameters:
    ///   - interruption: the error for a cancellation.
    ///   - progress: called from time to time; false cancels.
    ///   - plan: returns which parts of a window are read.
    ///   - write: begins the writes of a window that has been read.
    func run(
        size: UInt64, interruption: DiskImageError, _ progress: (ImageProgress) -> Bool,
        plan: (inout DiskWindow) throws(DiskImageError) -> Void, write: (DiskWindow) throws(DiskImageError) -> Void
    ) throws(DiskImageError) {
        var read: [DiskWindow] = []
        var position: UInt64 = 0
        var number = 0
        while position < size || !read.isEmpty {
            if position < size, read.count < Self.ahead {
                if !progress(ImageProgress(done: position, total: size)) { throw interruption }
                while users[number] > 0 { try wait() }
                var window = DiskWindow(number: number, start: position, diskSize: size)
                try plan(&window)
                position = window.end
                if !window.parts.isEmpty {
                    for source in sources { try source.begin(window) }
                    read.append(window)
                    number = (number + 1) % WindowReader.count
                }
            } else {
                let window = read.removeFirst()
                for source in sources { try source.release(window) }
                try write(window)
            }
            try submit()
        }
        try awaitAll()
        try engine.perform(.flush)
        _ = progress(ImageProgress(done: size, total: size))
    }

    /// Begins to write a range of what has been read of a window.
    func write(_ range: Range<UInt64>, of window: DiskWindow) throws(DiskImageError) {
        let request = try acquire()
        windows[request] = window.number
        users[window.number] += 1
        // Nothing else uses the window's memory until the request has ended.
        let memory = sources[0].memory(range, ofWindow: window.number)
        engine.start(
            request, .write, offset: range.lowerBound, length: UInt64(memory.count),
            segments: lists.list(request, memory))
    }

    /// Begins to make a range of the disk zero.
    func clear(_ range: Range<UInt64>) throws(DiskImageError) {
        let request = try acquire()
        windows[request] = nil
        engine.start(request, .writeZeroesUnmapping, offset: range.lowerBound, length: UInt64(range.count))
    }

    /// Indicates whether the image has the beginning of a range of its own, and how far that goes. Nothing that is in
    /// flight is about the range.
    func ownership(at offset: UInt64, limit: UInt64) throws(DiskImageError) -> (isOwn: Bool, length: UInt64) {
        if let answer = try engine.ownership(at: offset, limit: limit) { return answer }
        // Another request is reading what is needed, or there is no room to read it before changes are in the file.
        try awaitAll()
        if let answer = try engine.ownership(at: offset, limit: limit) { return answer }
        try engine.perform(.flush)
        if let answer = try engine.ownership(at: offset, limit: limit) { return answer }
        throw .request(path: engine.image.path, SystemCallError("read", errno: EIO))
    }

    // MARK: - Requests

    private func acquire() throws(DiskImageError) -> Int {
        while true {
            if let request = engine.acquire() { return request }
            try wait()
        }
    }

    /// Submits what was begun, and processes what has completed.
    private func submit() throws(DiskImageError) {
        try engine.submit()
        while let completion = engine.nextCompletion() { try take(completion) }
    }

    private func awaitAll() throws(DiskImageError) {
        while engine.inFlight > 0 { try wait() }
    }

    /// Waits for a request, of which at least one is in flight.
    private func wait() throws(DiskImageError) {
        guard let completion = try engine.waitForCompletion() else {
            throw .request(path: engine.image.path, SystemCallError("write", errno: EIO))
        }
        try take(completion)
    }

    private func take(_ completion: DiskCompletion) throws(DiskImageError) {
        if let window = windows[completion.request] { users[window] -= 1 }
        engine.release(completion.request)
        if completion.error != 0 {
            throw .request(path: engine.image.path, SystemCallError("\(completion.operation)", errno: completion.error))
        }
    }
}

extension DiskEngine {
    /// Indicates whether the topmost image has the beginning of a range of its own, and how far that goes.
    /// - Returns: nil if what is in flight, or what has not been made durable, has to end first.
    fileprivate mutating func ownership(
        at offset: UInt64, limit: UInt64
    ) throws(DiskImageError) -> (isOwn: Bool, length: UInt64)? {
        var search = DiskImage.Search(limit: limit)
        while true {
            switch image.locate(offset, &search) {
            case .data(_, let length), .zero(let length):
                return (search.layer == 0, length)
            case .memory(let bytes):
                return (search.layer == 0, UInt64(bytes.count))
            case .load(let load) where load.kind == .compressed:
                // It is known to be there, which is enough: nothing is read.
                image.complete(load, bytes: 0, error: ECANCELED)
                image.unpin(load)
                let cluster = image.clusterSize(ofLayer: load.layer)
                return (load.layer == 0, min(search.limit, cluster - offset % cluster))
            case .load(let load):
                var code: Int32 = 0
                do throws(MetadataError) { try metadataFile.read(into: load.buffer, at: load.offset) } catch {
                    if case .failed(let error) = error { code = error } else { code = EIO }
                }
                image.complete(load, bytes: code == 0 ? load.length : 0, error: code)
                image.unpin(load)
                // The image would only request it again.
                if code != 0 { throw .request(path: image.path, SystemCallError("read", errno: code)) }
            case .commit, .wait:
                return nil
            case .unallocated:
                throw .request(path: image.path, SystemCallError("read", errno: EIO))
            case .failed(let error):
                throw image.damage ?? .request(path: image.path, SystemCallError("read", errno: error))
            }
        }
    }
}
