// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// A number for each cluster of an image's file: how often it is referred to, or counted to be.
///
/// Counts that do not fit stay at the highest. Memory is given by the kernel as it is touched, so a sparse file costs little.
@safe struct ClusterCounts: ~Copyable {
    /// Clusters that can be counted.
    let capacity: UInt64
    /// The end of those that ever were.
    private(set) var end: UInt64 = 0
    private let counts: Mapping

    init(capacity: UInt64, path: String) throws(DiskImageError) {
        let (size, overflow) = capacity.multipliedReportingOverflow(by: 4)
        guard !overflow, size < 1 << 47 else { throw .system(path: path, SystemCallError("mmap", errno: ENOMEM)) }
        do { counts = try Mapping(size: max(1, Int(size)), flags: MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE) } catch { throw .system(path: path, error) }
        self.capacity = capacity
    }

    subscript(_ cluster: UInt64) -> UInt32 {
        // The mapping has `capacity` counts.
        get { cluster < capacity ? unsafe counts.start.load(fromByteOffset: Int(cluster) * 4, as: UInt32.self) : 0 }
        set {
            guard cluster < capacity else { return }
            unsafe counts.start.storeBytes(of: newValue, toByteOffset: Int(cluster) * 4, as: UInt32.self)
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
