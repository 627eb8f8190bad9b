// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Gives an image another backing file, or none.
public struct ImageRebase: Sendable {
    public var path: String
    public var options = DiskImageOptions()
    /// The new backing file; nil for none.
    public var backing: BackingReference?
    /// The keys of the new backing file and those below it, as ``DiskImageOptions/keys``; those of the old one are in
    /// ``options``.
    public var backingKeys: [DiskKey] = []
    /// Indicates whether only the name is changed: the caller guarantees that the new one has the contents of the old
    /// one.
    public var isUnsafe = false

    /// A test's system calls.
    var calls: FileCalls?

    public init(path: String) { self.path = path }

    /// Writes what the new backing file shows otherwise into the image, makes that durable, and then changes the name,
    /// so that the disk is the same at any time, whenever it stops.
    /// - Parameter progress: called from time to time; false cancels, and the old backing file stays.
    public func run(_ progress: (ImageProgress) -> Bool = { _ in true }) throws(DiskImageError) {
        var options = options
        options.readOnly = false
        guard !NBDLocation.isAddress(path) else { throw .remoteNotPossible(path: path, reason: NBDLocation.isRaw) }
        try DiskImage.requireQCOW2(path, format: options.format) { _ in "only qcow2 images have backing files" }
        // By itself: what is below is read beside it, and may be gone if only the name is changed.
        options.followsBacking = false
        options.opensData = !isUnsafe
        options.sparesCache = true
        let engine = try WindowWriter.engine(DiskImage(path: path, options: options), calls: calls)
        // From now on no other process changes it.
        let old = try ImageInformation(path: path, format: .qcow2, locking: false).backing
        guard isUnsafe || engine.image.header?.snapshotCount == 0 else {
            throw .notWritable(
                path: path,
                reason:
                    "its snapshots also depend on the backing file, and their contents would change; --unsafe changes the name only"
            )
        }
        // What cannot be is known before anything is written.
        _ = try newHeader(engine)
        if isUnsafe {
            try checkName(engine)
            return try changeName(engine)
        }
        let writer = try copyDifferences(engine, old, progress)
        try changeName(writer.engine)
    }

    /// - Returns: the writer that has written them, with the image.
    private func copyDifferences(
        _ engine: consuming DiskEngine, _ old: ImageInformation.Backing?, _ progress: (ImageProgress) -> Bool
    ) throws(DiskImageError) -> WindowWriter {
        let keys = options.keys(below: engine.image)
        let before = try WindowReader(
            old.map { backing throws(DiskImageError) in
                let place = try backingPath(backing.name, of: path)
                return try chain(place, FormatChoice(backing: backing.format, place), of: engine.image.namer, keys)
            }, path, calls: calls)
        // Of one remote disk below both there is one connection, as many a server has one client at a time.
        let after = try WindowReader(
            backing.map { backing throws(DiskImageError) in
                try chain(
                    backingPath(backing.name, of: path), FormatChoice(backing), of: nil, backingKeys, before.remote)
            }, path, calls: calls)
        if let size = options.vhdSize, !before.hasVHD, !after.hasVHD { throw .vhdSizeUnused(path: path, size) }
        for identity in engine.image.identities {
            if let other = after.path(of: identity) { throw .backing(of: path, .backingLoop(path: other)) }
        }
        let size = engine.image.size
        // What the image has of its own or not, in bytes.
        let unit = engine.image.withQCOW2 { $0.header.clusterSize >> ($0.header.hasExtendedL2 ? 5 : 0) } ?? 65536
        // What the image shows as zeroes because it has nothing there would show the new one.
        if backing != nil { engine.image.withQCOW2 { $0.hasBacking = true } }
        let writer = try WindowWriter(engine, sources: [before, after])
        try writer.run(size: size, interruption: .interruptedUnchanged(path: path), progress) {
            window throws(DiskImageError) in
            var position = window.start
            while position < window.end {
                let (isOwn, length) = try writer.ownership(at: position, limit: window.end - position)
                if !isOwn { try addData(position..<position + length, unit, before, after, &window) }
                position += length
            }
        } write: { window throws(DiskImageError) in
            for part in window.parts { try writeDifferences(part, unit, before, after, window, writer) }
        }
        return writer
    }

    /// Has those clusters of a range be read where one of both may have something else than zeroes.
    private func addData(
        _ range: Range<UInt64>, _ unit: UInt64, _ before: WindowReader, _ after: WindowReader,
        _ window: inout DiskWindow
    ) throws(DiskImageError) {
        // Small ones are compared together.
        let step = max(unit, 64 << 10)
        var position = range.lowerBound
        while position < range.upperBound {
            let left = range.upperBound - position
            var zeroes = try before.zeroes(at: position, limit: left)
            if zeroes > 0 { zeroes = try after.zeroes(at: position, limit: zeroes) }
            if zeroes == left { return }
            let start = position + zeroes - (position + zeroes) % unit
            position = min(range.upperBound, start - start % step + step)
            window.add(max(start, range.lowerBound)..<position)
        }
    }

    /// Writes those clusters that differ in the new backing file: adjacent ones in one request, and zero clusters
    /// separately.
    private func writeDifferences(
        _ part: Range<UInt64>, _ unit: UInt64, _ before: WindowReader, _ after: WindowReader, _ window: DiskWindow,
        _ writer: WindowWriter
    ) throws(DiskImageError) {
        var pending = part.lowerBound..<part.lowerBound
        var change = Change.none
        func write() throws(DiskImageError) {
            switch change {
            case .none: break
            case .zeroes: try writer.clear(pending)
            case .data: try writer.write(pending, of: window)
            }
        }
        while pending.upperBound < part.upperBound {
            let start = pending.upperBound, end = min(part.upperBound, start - start % unit + unit)
            let next = Change(
                from: before.memory(start..<end, ofWindow: window.number),
                to: after.memory(start..<end, ofWindow: window.number))
            if next != change {
                try write()
                pending = start..<start
                change = next
            }
            pending = pending.lowerBound..<end
        }
        try write()
    }

    /// What has to be done where the backing file shows something else.
    private enum Change {
        case none, zeroes, data

        /// - Parameter old: as many bytes as `new`.
        init(from old: IOMemory, to new: IOMemory) {
            self = old.isEqual(to: new) ? .none : old.isZero ? .zeroes : .data
        }
    }

    private func chain(
        _ path: String, _ choice: FormatChoice, of namer: NamingImage?, _ keys: [DiskKey], _ remote: NBDDisk? = nil
    ) throws(DiskImageError) -> DiskImage {
        var options = options
        options.readOnly = true
        options.keys = keys
        options.usesAll = false
        options.dataFile = nil
        options.allowsDataFile = true
        options.sparesCache = true
        do throws(DiskImageError) {
            return try DiskImage(path: path, choice, of: namer, options: options, remote: remote)
        } catch {
            throw .backing(of: self.path, error.orLoop(to: self.path))
        }
    }

    /// Refuses an impossible backing file, without opening it.
    private func checkName(_ engine: borrowing DiskEngine) throws(DiskImageError) {
        guard let backing else { return }
        do throws(DiskImageError) {
            let place = try backingPath(backing.name, of: path), choice = FormatChoice(backing)
            let own = engine.image.identities.map { FilePlace.file($0) }
            if let other = FilePlace.search(own, from: place, choice, options.namedFiles) {
                throw .backingLoop(path: other)
            }
            try choice.checkUnopened(place)
        } catch { throw .backing(of: path, error) }
    }

    /// The header with the new name.
    private func newHeader(_ engine: borrowing DiskEngine) throws(DiskImageError) -> [UInt8] {
        guard let header = engine.image.header else {
            throw .notApplicable(path: path, reason: "only qcow2 images have backing files")
        }
        if let backing {
            guard (1...QCOW2Header.maximumBackingName).contains(backing.name.rawBytes.count) else {
                throw .notApplicable(
                    path: path,
                    reason:
                        "a backing file's name has 1 to \(QCOW2Header.maximumBackingName) bytes, this one \(backing.name.rawBytes.count)"
                )
            }
            guard header.autoclearFeatures & header.keptAutoclearFeatures == 0 else {
                throw .notApplicable(
                    path: path, reason: "its raw data file holds the whole disk, so it cannot have a backing file")
            }
        }
        var area = QCOW2HeaderArea(parsing: try engine.tableFile.read(Int(header.clusterSize), at: 0))
        area.backingName = backing?.name
        area.setExtension(QCOW2HeaderArea.Extension.backingFormat, backing.map { Array($0.format.rawValue.utf8) })
        // What others keep true of the file they do not of this one. The disk, which bitmaps are about, is the same.
        if header.version >= 3 {
            area.set64(
                QCOW2HeaderArea.Field.autoclearFeatures,
                header.autoclearFeatures & (QCOW2Header.Autoclear.bitmaps | header.keptAutoclearFeatures))
        }
        guard let bytes = area.bytes(clusterSize: Int(header.clusterSize)) else {
            throw .notApplicable(
                path: path,
                reason: "the backing file's name does not fit into its header, which has \(header.clusterSize) bytes")
        }
        return bytes
    }

    private func changeName(_ engine: borrowing DiskEngine) throws(DiskImageError) {
        let file = engine.tableFile
        try file.write(newHeader(engine), at: 0)
        try file.synchronize()
    }
}
