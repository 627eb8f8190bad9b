// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// A number for each cluster of an image's file: how often it is referred to, or counted to be.
///
/// Counts that do not fit stay at the highest. Memory is given by the kernel as it is touched, so a sparse file costs
/// little.
struct ClusterCounts: ~Copyable {
    /// Clusters that can be counted.
    let capacity: UInt64
    /// The end of those that ever were.
    private(set) var end: UInt64 = 0
    private let counts: IOBuffer

    init(capacity: UInt64, path: String) throws(DiskImageError) {
        let (size, overflow) = capacity.multipliedReportingOverflow(by: 4)
        guard !overflow, size < 1 << 47 else { throw .system(path: path, SystemCallError("mmap", errno: ENOMEM)) }
        counts = try IOBuffer(count: Int(size), path)
        self.capacity = capacity
    }

    subscript(_ cluster: UInt64) -> UInt32 {
        get { cluster < capacity ? counts.memory.load(Int(cluster) * 4) : 0 }
        set {
            guard cluster < capacity else { return }
            counts.memory.store(newValue, Int(cluster) * 4)
            end = max(end, cluster + 1)
        }
    }

    mutating func add(_ change: Int64, to cluster: UInt64) {
        self[cluster] = UInt32(clamping: Int64(self[cluster]) &+ change)
    }

    mutating func add(_ change: Int64, to clusters: Range<UInt64>) {
        for cluster in clusters { add(change, to: cluster) }
    }

    /// The end of the clusters whose count is not 0.
    var usedEnd: UInt64 {
        var end = end
        while end > 0, self[end - 1] == 0 { end -= 1 }
        return end
    }

    func copy(path: String) throws(DiskImageError) -> ClusterCounts {
        var copy = try ClusterCounts(capacity: capacity, path: path)
        for cluster in 0..<end where self[cluster] != 0 { copy[cluster] = self[cluster] }
        return copy
    }
}
