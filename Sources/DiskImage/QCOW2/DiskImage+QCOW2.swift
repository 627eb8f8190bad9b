// SPDX-License-Identifier: Apache-2.0

/// What is done with an image because it is a qcow2 image: its metadata is replaced in the file, or changed as no
/// request changes it.
extension DiskImage {
    /// What is done to the metadata of the topmost image, if that is a qcow2 image; else nothing.
    func withQCOW2<Answer: ~Copyable, Failure: Error>(
        _ body: (inout QCOW2Image) throws(Failure) -> Answer
    ) throws(Failure) -> Answer? {
        switch layers[0].layout {
        case .qcow2(let image): try body(&image.value)
        case .raw: nil
        case .blocks: nil
        case .extents: nil
        }
    }

    /// The header of the topmost image, with what has changed since it was read; nil in another format.
    var header: QCOW2Header? { withQCOW2 { $0.currentHeader } }

    /// The header of the topmost image as the file has it now.
    func readHeader() throws(DiskImageError) -> QCOW2Header {
        try layers[0].file.measure()
        return try QCOW2Header(layers[0].file)
    }

    /// Reads the topmost image's metadata again, after it was replaced in the file. If the image could not be written
    /// any more, this stays so.
    /// - Parameter size: bytes of the disk, if it is not yet what the file says.
    func reload(size newSize: UInt64? = nil) throws(DiskImageError) {
        try layers[0].file.measure()
        try layers[0].dataFile?.measure()
        var qcow2 = try QCOW2Image(
            layers[0].file, metadataCacheSize: metadataCacheSize, writable: !isReadOnly, size: newSize,
            statistics: layers[0].layout.statistics ?? FileStatistics())
        qcow2.failure = failure
        layers[0].size = qcow2.header.size
        layers[0].layout = Layout(qcow2)
    }
}
