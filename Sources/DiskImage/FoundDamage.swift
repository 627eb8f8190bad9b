// SPDX-License-Identifier: Apache-2.0

/// A damage that was found while an image was used, and where.
struct FoundDamage: Equatable, Sendable, CustomStringConvertible {
    let damage: ImageDamage
    /// The entry that cannot be right.
    let entry: TableEntry
    /// The byte of the disk, or of the extent, that was requested; nil where the entry is about no byte of it.
    var diskOffset: UInt64?

    var description: String { "\(entry): \(damage)" }
}

/// An entry of one of a format's tables, by where it is in the file.
struct TableEntry: Equatable, Sendable, CustomStringConvertible {
    enum Table: String {
        case l1 = "L1 table"
        case l2 = "L2 table"
        case refcountTable = "refcount table"
        case refcountBlock = "refcount block"
        case grainDirectory = "grain directory"
        case grainTable = "grain table"
        /// Of VDI.
        case blockMap = "block map"
        /// Of VHD and VHDX.
        case blockAllocationTable = "block allocation table"
    }

    let table: Table
    /// The byte of the file where the table begins.
    let start: UInt64
    /// The byte of the file where the entry begins; nil where the table is too short for it.
    let offset: UInt64?

    var description: String {
        "\(table.rawValue) at byte \(start), " + (offset.map { "entry at byte \($0)" } ?? "which is too short")
    }
}
