// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// Opening images of one file, or several, with tables of blocks.
extension Chain {
    mutating func openBlocks(
        _ file: consuming ImageFile, _ format: ImageFormat, _ options: DiskImageOptions, writable: Bool
    ) throws(DiskImageError) {
        switch format {
        case .vdi:
            let header = try VDIHeader(file)
            let blocks = try BlockMapImage(
                header.layout, file, cacheSize: options.metadataCacheSize,
                allocator: writable ? header.allocator(file) : nil)
            append(DiskImage.Layer(file: file, layout: Layout(blocks), size: header.layout.size))
        case .vhd:
            let footer = try VHDFooter(file, size: options.vhdSize)
            if count == 0 { vhdSizes = footer.sizes }
            hasVHD = true
            if options.vhdSize == nil, let notice = footer.sizes.notice(options.vhdSizeOption) {
                options.notice?("disk \"\(file.path.printable)\": \(notice)")
            }
            guard let layout = footer.layout else {
                // A fixed one is its disk, with the footer behind it.
                return append(DiskImage.Layer(file: file, size: footer.size))
            }
            let blocks = try BlockMapImage(layout, file, cacheSize: options.metadataCacheSize)
            append(DiskImage.Layer(file: file, layout: Layout(blocks), size: layout.size))
        case .vhdx:
            let header = try VHDXHeader(file)
            let blocks = try BlockMapImage(header.layout, file, cacheSize: options.metadataCacheSize, log: header.log)
            append(DiskImage.Layer(file: file, layout: Layout(blocks), size: header.layout.size))
        case .vmdk:
            try openVMDK(file, options, writable: writable)
        case .raw, .qcow2:
            break
        }
    }

    // MARK: - VMDK

    private mutating func openVMDK(
        _ file: consuming ImageFile, _ options: DiskImageOptions, writable: Bool
    ) throws(DiskImageError) {
        let path = file.path
        let start = try file.read("the header", count: Int(min(file.size, 4)), at: 0)
        if start == Array("COWD".utf8) { throw .unsupported(path: path, feature: "an ESX sparse extent (vmfsSparse)") }
        if start == VMDKHeader.magic {
            let header = try VMDKHeader(file)
            var place: UInt64 = 0
            if let range = header.descriptor {
                let text = try file.read(
                    "the descriptor", count: Int(range.upperBound - range.lowerBound), at: range.lowerBound)
                let descriptor = try VMDKDescriptor(text, path: path)
                place = descriptor.contentIDPlace.map { range.lowerBound + UInt64($0) } ?? 0
                // A file that is a part of another image has no descriptor, or one that says so.
                guard descriptor.extents.count <= 1 else {
                    throw .invalid(path: path, reason: "its descriptor has \(descriptor.extents.count) extents")
                }
            }
            let blocks = try sparse(header, file, options, contentID: VMDKContentID(at: place), writable: writable)
            append(DiskImage.Layer(file: file, layout: Layout(blocks), size: header.layout.size))
            return
        }
        guard file.size <= UInt64(VMDKDescriptor.maximumSize) else {
            throw .notOfFormat(
                path: path, format: "VMDK", reason: "it has no known signature and is too long for a descriptor")
        }
        let text = try file.read("the descriptor", count: Int(file.size), at: 0)
        guard VMDKDescriptor.begins(text) else {
            throw .notOfFormat(
                path: path, format: "VMDK",
                reason: "it begins with neither \"KDMV\" nor \"\(VMDKDescriptor.firstLine)\"")
        }
        let descriptor = try VMDKDescriptor(text, path: path)
        guard !descriptor.extents.isEmpty else { throw .invalid(path: path, reason: "its descriptor has no extents") }
        if writable, descriptor.extents.contains(where: { $0.isReadOnly || $0.kind == .zero }) {
            throw .notWritable(path: path, reason: "some of its extents are read-only")
        }
        let main = count, namer = NamingImage(file)
        append(DiskImage.Layer(file: file, size: descriptor.extents.reduce(0) { $0 + $1.size }))
        var pieces: [DiskPiece] = [], flat: [Int: [Range<UInt64>]] = [:]
        var position: UInt64 = 0
        for extent in descriptor.extents {
            let end = position + extent.size
            if extent.kind == .zero {
                pieces.append(DiskPiece(start: position, end: end, file: nil, place: 0))
            } else {
                guard options.allowsBacking else { throw .extentNotAllowed(path: path, name: extent.name) }
                do throws(DiskImageError) {
                    let (file, place) = try open(extent, of: namer, after: main, options, writable: writable)
                    pieces.append(DiskPiece(start: position, end: end, file: file, place: place))
                    if extent.kind != .sparse { flat[file, default: []].append(place..<place + extent.size) }
                } catch {
                    throw .extent(of: path, error)
                }
            }
            position = end
        }
        if writable {
            for (file, ranges) in flat where ByteRanges(ranges).overlap {
                throw .notWritable(
                    path: layers[file].file.path, reason: "two extents of the image overlap in this file")
            }
        }
        // A grain belongs to one file, and the engine knows one size of them.
        if writable, let size = clusterSize {
            for piece in pieces {
                guard let file = piece.file, let other = layers[file].layout.clusterSize else { continue }
                guard other == size, piece.start % size == 0 else {
                    throw .notWritable(path: path, reason: "its extents are not aligned to grains of one size")
                }
            }
        }
        let contentID = VMDKContentID(at: descriptor.contentIDPlace.map { UInt64($0) } ?? 0)
        setLayout(Layout(VMDKExtents(pieces, contentID: contentID)), of: main)
    }

    /// Opens the file of an extent.
    /// - Parameter main: the image itself; what comes after it are its extents.
    /// - Returns: which file that is, and where the extent's bytes begin there.
    private mutating func open(
        _ extent: VMDKDescriptor.Extent, of image: NamingImage, after main: Int, _ options: DiskImageOptions,
        writable: Bool
    ) throws(DiskImageError) -> (file: Int, place: UInt64) {
        let place = if case .flat(let place) = extent.kind { place } else { 0 as UInt64 }
        // A file of several flat extents is opened, and locked, once.
        for name in [extent.name, extent.converted] where extent.kind != .sparse {
            guard let name, let identity = try ImageFile.Identity(ofPath: VMDKDescriptor.path(name, of: image.path))
            else { continue }
            for index in main + 1..<max(main + 1, count)
            where layers[index].file.identity == identity && layers[index].layout.isRaw {
                // One of the layers that have been made.
                try requireRoom(for: extent, at: place, layers[index].file)
                return (index, place)
            }
        }
        let file = try openFile(of: extent, image, options, writable: writable)
        for index in 0..<count where layers[index].file.identity == file.identity {
            throw .invalid(path: file.path, reason: "the image uses it twice")
        }
        guard extent.kind == .sparse else {
            try requireRoom(for: extent, at: place, file)
            let size = file.size
            append(DiskImage.Layer(file: file, size: size))
            return (count - 1, place)
        }
        let header = try VMDKHeader(file)
        guard header.layout.size >= extent.size else {
            throw .invalid(
                path: file.path,
                reason: "it has \(header.layout.size) bytes of the disk, its descriptor says \(extent.size)")
        }
        let blocks = try sparse(header, file, options, writable: writable)
        append(DiskImage.Layer(file: file, layout: Layout(blocks), size: header.layout.size))
        return (count - 1, 0)
    }

    private func requireRoom(
        for extent: VMDKDescriptor.Extent, at place: UInt64, _ file: borrowing ImageFile
    ) throws(DiskImageError) {
        guard place <= file.size, extent.size <= file.size - place else {
            throw .truncated(path: file.path, what: "the extent", needed: place &+ extent.size, size: file.size)
        }
    }

    /// Opens the file by its name as the bytes are or, where there is none, by the same name in UTF-8.
    private func openFile(
        of extent: VMDKDescriptor.Extent, _ image: NamingImage, _ options: DiskImageOptions, writable: Bool
    ) throws(DiskImageError) -> ImageFile {
        do throws(DiskImageError) {
            return try ImageFile(
                path: VMDKDescriptor.path(extent.name, of: image.path), of: image, writable: writable, options)
        } catch {
            guard case .system(_, let cause) = error, cause.errno == ENOENT, let name = extent.converted else {
                throw error
            }
            let path = try VMDKDescriptor.path(name, of: image.path)
            // The error is about the name as it is written.
            guard ImageFile.Identity(ofPath: path) != nil else { throw error }
            return try ImageFile(path: path, of: image, writable: writable, options)
        }
    }

    private func sparse(
        _ header: VMDKHeader, _ file: borrowing ImageFile, _ options: DiskImageOptions,
        contentID: VMDKContentID = VMDKContentID(), writable: Bool
    ) throws(DiskImageError) -> BlockMapImage {
        try BlockMapImage(
            header.layout, file, cacheSize: options.metadataCacheSize, directory: header.directory,
            allocator: writable ? header.allocator(file) : nil,
            contentID: contentID)
    }
}
