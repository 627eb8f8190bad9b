// SPDX-License-Identifier: Apache-2.0

/// Clusters that are being copied, as a request covers a part of them: what each copy is about, and a buffer with the
/// cluster's bytes.
///
/// Each has a request, number ``RequestTable/depth`` + its own, which reads the old contents.
struct CopyTable: ~Copyable {
    struct Copy: ListElement {
        /// The request that writes into the cluster, and which of its bytes go there.
        var owner: Int32 = -1
        var start: UInt64 = 0
        var length: UInt64 = 0
        /// The cluster on the disk and in the file.
        var guestOffset: UInt64 = 0
        /// The bytes of the disk that the buffer has.
        var base: UInt64 = 0
        var size: UInt64 = 0
        var run = ClusterRun(first: 0, count: 0)
        var file = 0
        /// Indicates whether the old contents are being read; then an operation writes the new ones.
        fileprivate(set) var isReading = true
        var next: Int32 = -1
    }

    static let maximum = 16

    private let copies: Slab<Copy>
    private let buffers: IOBuffer
    private var vectors: IOSegmentLists
    private var free = IndexList<Copy>()
    /// How many there are: none for an image that needs no copies.
    let count: Int
    /// Bytes of a cluster, or 0.
    let clusterSize: UInt64

    /// - Parameter clusterSize: 0 for an image that needs no copies.
    init(_ clusterSize: UInt64, _ path: String) throws(DiskImageError) {
        let count = clusterSize == 0 ? 0 : Self.maximum
        let buffers = try IOBuffer(count: count * Int(clusterSize), path)
        let vectors = try IOSegmentLists(count: Self.maximum, capacity: 1, path)
        copies = Slab(count: Self.maximum) { _ in Copy(isReading: false) }
        self.buffers = buffers
        self.vectors = vectors
        self.count = count
        self.clusterSize = clusterSize
        for index in 0..<count { free.append(Int32(index), copies) }
    }

    var hasFree: Bool { !free.isEmpty }

    /// Begins a copy with the reading of its cluster. The caller has checked ``hasFree``; a second user of a buffer
    /// would corrupt the disk, so without a free one the process ends.
    mutating func begin(_ copy: Copy) -> Int32 {
        guard let index = free.popFirst(copies) else { preconditionFailure("no room for another copy") }
        copies[index] = copy
        return index
    }

    /// The old contents are there, or will not come. Returns the copy.
    mutating func endReading(_ index: Int32) -> Copy {
        copies[index].isReading = false
        return copies[index]
    }

    subscript(index: Int32) -> Copy { copies[index] }

    /// Frees a copy whose cluster has been written, or is not going to be.
    mutating func end(_ index: Int32) { free.prepend(index, copies) }

    func forEachReading(_ body: (Copy) -> Void) {
        for index in 0..<count where copies[index].isReading { body(copies[index]) }
    }

    /// A cluster's bytes.
    func buffer(_ index: Int32) -> IOMemory { buffers.piece(Int(index) * Int(clusterSize), Int(clusterSize)) }

    /// The segment with the first `length` bytes of a buffer; it is valid until the next call.
    mutating func segments(_ index: Int32, length: UInt64) -> IOSegments {
        vectors.list(Int(index), buffer(index).prefix(Int(length)))
    }

    /// The old contents of a cluster are in its buffer: what the request has for it goes over them.
    func merge(_ index: Int32, _ request: DiskRequest, diskSize: UInt64) {
        let copy = copies[index]
        let buffer = buffer(index)
        // Of the cluster the request covers a part. Beyond the end of the disk there was nothing to be read.
        let readable = min(copy.size, diskSize - copy.base)
        buffer.piece(Int(readable), Int(copy.size - readable)).clear()
        let target = buffer.piece(Int((request.offset + copy.start) - copy.base), Int(copy.length))
        if request.operation == .write {
            request.segments?.copyOut(from: copy.start, to: target)
        } else {
            target.clear()
        }
    }
}
