// SPDX-License-Identifier: Apache-2.0

/// Opening qcow2 images, with the file that has their data and the backing files that they name.
extension Chain {
    mutating func openQCOW2(
        _ file: consuming ImageFile, _ options: DiskImageOptions, writable: Bool
    ) throws(DiskImageError) {
        let path = file.path
        if writable { repair = try DiskImage.repairIfDirty(&file) }
        let qcow2 = try QCOW2Image(
            file, metadataCacheSize: options.metadataCacheSize, writable: writable,
            snapshot: count == 0 ? options.snapshot : nil,
            salvaging: options.salvages && !writable)
        let header = qcow2.header
        let dataFile = try openDataFile(header, file, options, writable: writable)
        let cipher = try openCipher(header, file, options, writable: writable)
        let isSealed = header.encryption != nil && !options.opensData
        let namer = NamingImage(file)
        append(
            DiskImage.Layer(
                file: file, layout: Layout(qcow2), size: header.size, dataFile: dataFile, cipher: cipher,
                isSealed: isSealed))
        guard options.followsBacking, let name = header.backingName else { return }
        guard options.allowsBacking else { throw .backingNotAllowed(path: path, name: name) }
        do throws(DiskImageError) {
            let backing = try backingPath(name, of: path)
            try open(backing, FormatChoice(backing: header.backingFormat, backing), of: namer, options)
        } catch {
            throw .backing(of: path, error)
        }
    }

    /// The file that an image keeps its data in, if it does: the one that the user names for the topmost, or the one it
    /// names, if that is allowed. That of a backing file is only read, so its name is followed as its own was.
    private func openDataFile(
        _ header: QCOW2Header, _ image: borrowing ImageFile, _ options: DiskImageOptions, writable: Bool
    ) throws(DiskImageError) -> ImageFile? {
        let path = image.path
        let stated = count == 0 ? options.dataFile : nil
        guard header.hasDataFile else {
            if let stated { throw .dataFileUnused(path: path, name: stated) }
            return nil
        }
        guard stated != nil || options.allowsDataFile || count > 0 else {
            throw .dataFileNotAllowed(path: path, name: header.dataFileName ?? "")
        }
        do throws(DiskImageError) {
            let place: String
            if let stated {
                place = stated
            } else if let name = header.dataFileName {
                place = try backingPath(name, of: path)
            } else {
                throw .invalid(path: path, reason: "it has an external data file but does not name it")
            }
            let file = try image.openDataFile(place, isStated: stated != nil, writable: writable, options)
            guard !isOpen(file.identity) else { throw .backingLoop(path: place) }
            return file
        } catch {
            throw .dataFile(of: path, error)
        }
    }
}

extension ImageFile {
    /// Opens the file with the data of this image.
    /// - Parameter isStated: whether the user names it, and not the image.
    borrowing func openDataFile(
        _ place: String, isStated: Bool, writable: Bool, _ options: DiskImageOptions
    ) throws(DiskImageError) -> ImageFile {
        let file = try ImageFile(path: place, of: isStated ? nil : NamingImage(self), writable: writable, options)
        // Data in an image's own tables would be the end of it.
        guard file.identity != identity else { throw .backingLoop(path: place) }
        return file
    }

    /// The same for this image alone: the file that the user names for it, or nil.
    borrowing func openStatedDataFile(
        _ header: QCOW2Header, _ options: DiskImageOptions
    ) throws(DiskImageError) -> ImageFile? {
        guard let place = options.dataFile else { return nil }
        guard header.hasDataFile else { throw .dataFileUnused(path: path, name: place) }
        do throws(DiskImageError) { return try openDataFile(place, isStated: true, writable: false, options) } catch {
            throw .dataFile(of: path, error)
        }
    }
}
