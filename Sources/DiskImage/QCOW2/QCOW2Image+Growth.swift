// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// The end of the file: ahead of what is written while the image is used, where the last cluster ends when it is
/// closed.
extension QCOW2Image {
    /// Gives the file the host's blocks for what is allocated next, before they are needed: file systems take writes
    /// that move a file's end, or need blocks, one at a time. ``trim(_:)`` frees what was not used. Best effort:
    /// without it the file grows by each write.
    ///
    /// With subclusters there is only a longer file, as small writes are to take no more space than they fill.
    mutating func growAhead(_ file: MetadataFile) {
        let end = usedEnd
        guard end > grownSize, !header.hasDataFile else { return }
        let start = grownSize
        grownSize = end &+ min(max(end / 8, 32 * header.clusterSize), Self.maximumGrowth)
        if !header.hasExtendedL2, (try? file.reserve(start, grownSize - start)) != nil { return }
        // Where the file system cannot reserve that many blocks in advance, the file only becomes longer.
        do throws(MetadataError) {
            if try file.size() < grownSize { try file.truncate(to: grownSize) }
        } catch {
            grownSize = .max
        }
    }

    private static let maximumGrowth: UInt64 = 64 << 20

    /// Where what is in use ends.
    private var usedEnd: UInt64 {
        switch refcounts {
        case .some(let refcounts): max(fileSize, refcounts.end << UInt64(header.clusterBits))
        case nil: fileSize
        }
    }

    /// Truncates the file after its last cluster, when nothing is in flight. Best effort.
    mutating func trim(_ file: MetadataFile) {
        let end = usedEnd
        guard grownSize > end, grownSize != .max else { return }
        if (try? file.truncate(to: end)) != nil { grownSize = end }
    }
}
