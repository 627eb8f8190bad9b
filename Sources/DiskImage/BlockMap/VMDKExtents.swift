// SPDX-License-Identifier: Apache-2.0

/// A disk that a VMDK descriptor says to be in several files: which part is where. What each of them says of its part
/// is for it to say.
struct VMDKExtents: ~Copyable {
    /// In their order and without gaps.
    private let pieces: [DiskPiece]
    var contentID: VMDKContentID

    init(_ pieces: [DiskPiece], contentID: VMDKContentID) {
        self.pieces = pieces
        self.contentID = contentID
    }

    /// The piece with an offset.
    func piece(at offset: UInt64) -> DiskPiece? {
        var low = 0, high = pieces.count
        while low < high {
            let middle = (low + high) / 2
            if pieces[middle].end <= offset { low = middle + 1 } else { high = middle }
        }
        return low < pieces.count && pieces[low].start <= offset ? pieces[low] : nil
    }
}

/// A part of a disk that is in a file of its own.
struct DiskPiece: Equatable, Sendable {
    /// Bytes of the disk.
    let start: UInt64
    let end: UInt64
    /// The number of the file in the image; nil for zeroes.
    let file: Int?
    /// Where in the file, or in the disk that the file's own table maps, it begins.
    let place: UInt64

    /// Where an offset of the disk is, in the file or in the disk that its table maps.
    func place(of offset: UInt64) -> UInt64 { place &+ (offset - start) }
}

/// The content ID of a VMDK descriptor, by which images that link to this one see that it has changed.
struct VMDKContentID {
    /// Where the file has it; 0 when there is none, or it has been replaced.
    private var place: UInt64

    init(at place: UInt64 = 0) { self.place = place }

    /// Indicates whether there is none, or it has been replaced.
    var isReplaced: Bool { place == 0 }

    /// Writes another one, with the first change.
    mutating func replace(_ file: MetadataFile) throws(MetadataError) {
        guard place != 0 else { return }
        try file.write(VMDKDescriptor.newContentID(), at: place)
        place = 0
    }
}
