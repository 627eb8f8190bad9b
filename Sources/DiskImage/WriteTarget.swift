// SPDX-License-Identifier: Apache-2.0

/// What has to be done for the start of a range that is written, discarded or zeroed. Lengths are in bytes.
enum WriteTarget {
    /// A write at this offset of the file, without a change of the mapping.
    case inPlace(offset: UInt64, length: UInt64)
    /// A range that needs no I/O.
    case done(length: UInt64)
    /// New clusters, this many at most, all of which the range covers.
    case clusters(UInt64)
    /// A part of a cluster that becomes allocated.
    case part(Part)
    /// A load, a wait, a commit or a failure, as in ``RangeLookup``.
    case unresolved(RangeLookup)

    /// What the range does not cover of the part is copied, or zeroes.
    struct Part {
        /// The part, in bytes from the cluster's start: all of it, or some subclusters.
        var range: Range<UInt64>
        /// Indicates whether what is not covered reads as zeroes.
        var isZero: Bool
        /// The cluster in the file, which is there already and ours; nil for a new one.
        var place: UInt64?
    }
}
