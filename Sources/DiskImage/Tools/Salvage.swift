// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// A range of a disk that could not be read, and why.
public struct LostRange: Equatable, Sendable {
    /// Bytes from the start of the disk.
    public internal(set) var offset: UInt64
    public internal(set) var length: UInt64
    /// The reason why its beginning could not be read.
    public let reason: String

    public var end: UInt64 { offset + length }
}

/// The ranges of a disk that could not be read while the rest of it was saved. Several threads add to it; neighbours
/// and what is found twice are one range.
final class SalvageLog: @unchecked Sendable {
    // Within the monitor: hence `Sendable`.
    private let monitor = Monitor()
    /// In the disk's order, without overlaps.
    private var ranges: [LostRange] = []

    var all: [LostRange] { monitor.locked { ranges } }

    func add(_ offset: UInt64, _ length: UInt64, _ reason: String) {
        guard length > 0 else { return }
        monitor.locked {
            var new = LostRange(offset: offset, length: length, reason: reason)
            // All those that it touches.
            let first = firstIndex(endingAtOrAfter: offset)
            var end = first
            while end < ranges.count, ranges[end].offset <= new.end {
                let other = ranges[end]
                let start = min(other.offset, new.offset)
                new = LostRange(
                    offset: start, length: max(other.end, new.end) - start,
                    reason: other.offset <= new.offset ? other.reason : new.reason)
                end += 1
            }
            ranges.replaceSubrange(first..<end, with: CollectionOfOne(new))
        }
    }

    private func firstIndex(endingAtOrAfter offset: UInt64) -> Int {
        var low = 0
        var high = ranges.count
        while low < high {
            let middle = (low + high) / 2
            if ranges[middle].end < offset { low = middle + 1 } else { high = middle }
        }
        return low
    }
}

extension DiskImage {
    /// Bytes of the disk from an offset on that cannot be read for the same reason.
    /// - Parameters:
    ///   - search: as it failed.
    ///   - isTable: whether a piece of a table could not be read.
    func unreadableLength(at offset: UInt64, _ search: Search, isTable: Bool) -> UInt64 {
        // A layer that the search has reached.
        guard search.layer < chainLength else { return search.limit }
        return layers[search.file].layout.unreadableLength(at: offset, isTable: isTable)
    }

    /// Why the disk cannot be read at an offset, if that is for what a format says there.
    func damageReason(at offset: UInt64) -> String? {
        for index in layers.indices {
            if let found = layers[index].layout.damage, found.diskOffset == offset { return found.damage.description }
        }
        return nil
    }

    /// Where the file with a layer's data ends, in one whose format has tables that could say more; else nil.
    func dataEnd(_ layer: Int) -> UInt64? {
        guard remote(ofFile: layer) == nil, clusterSize(ofLayer: layer) > 1 else { return nil }
        switch layers[layer].dataFile {
        case .some(let file): return file.size
        case nil: return layers[layer].file.size
        }
    }
}
