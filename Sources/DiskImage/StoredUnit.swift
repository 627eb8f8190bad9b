// SPDX-License-Identifier: Apache-2.0

/// How one unit of a file, a cluster, subcluster or block, is stored: what an entry of the format's table says.
enum StoredUnit: Equatable {
    case unallocated
    case zero
    /// The place of the unit's first byte.
    case data(UInt64)
    /// The table's word about it: an entry, or a place.
    case compressed(UInt64)
    case damaged(ImageDamage)

    /// Indicates whether `next`, the unit after this one's run of `length` bytes, continues it.
    func continues(with next: StoredUnit, after length: UInt64) -> Bool {
        switch (self, next) {
        case (.unallocated, .unallocated), (.zero, .zero): true
        case (.data(let start), .data(let place)): place == start &+ length
        default: false
        }
    }
}
