// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// A new disk image: an empty disk, or one that shows what another holds.
public struct ImageCreation: Sendable {
    public var path: String
    public var format: ImageFormat
    /// Bytes of the disk, rounded up to whole sectors of 512; nil takes the backing image's.
    public var size: UInt64?
    /// The kind of VMDK or VDI image; nil for the default.
    public var subformat: ImageSubformat?
    public var options = QCOW2Options()
    public var preallocation = Preallocation.off
    public var backing: BackingReference?
    /// Indicates whether the backing image is opened, to check that it exists and to get its size.
    public var opensBacking = true
    /// Indicates whether an existing file is replaced.
    public var replacing = false
    /// Indicates whether the image is on the disk when ``create()`` returns.
    public var durably = false
    /// The options for opening the backing image, whose size is used if none is given. Its format is that of
    /// ``backing``.
    public var backingOptions = DiskImageOptions()

    public init(path: String, format: ImageFormat, size: UInt64? = nil) {
        self.path = path
        self.format = format
        self.size = size
    }

    /// Creates the image. It gets its name when it is complete; after an error there is no file.
    /// - Returns: bytes of the disk.
    @discardableResult
    public func create() throws(DiskImageError) -> UInt64 {
        try format.requireMakeable(path)
        for name in [path, options.dataFile ?? ""] where NBDLocation.isAddress(name) {
            throw .remoteNotPossible(
                path: name,
                reason:
                    "a remote disk must be created on its server; swkvm image convert --force writes to an existing one"
            )
        }
        let size = try diskSize()
        let kind = try ImageSubformat.resolve(subformat, format: format, compresses: false, path)
        try check(size, kind)
        for target in [path, try dataPath()].compactMap({ $0 }) {
            try DiskKey.check(target, isNoFileOf: backingOptions.keys + (options.encryption.map { [$0.key] } ?? []))
        }
        var file = try NewFile(path: path, replacing: replacing)
        guard file.deviceSize == nil else {
            throw .impossible(path: path, reason: "a block device is already a raw disk of fixed size")
        }
        if format == .qcow2 {
            let dataPath = try dataPath()
            if let dataPath, let place = FilePlace(dataPath), place == FilePlace(path) {
                throw .sameFile(path: path, other: dataPath)
            }
            var data = try dataPath.map { path throws(DiskImageError) in try NewFile(path: path, replacing: replacing) }
            try data?.setSize(size)
            try build(file, data, size: size)
            let isDataNew = data?.replacedIdentity == nil
            try data?.publish(durably: durably)
            do throws(DiskImageError) { try file.publish(durably: durably) } catch {
                // One without the other is of no use.
                if let dataPath, isDataNew { removeName(dataPath) }
                throw error
            }
            return size
        }
        var plan = try ImagePlan(format, kind, options, size: size, backing: nil, path: path, replacing: replacing)
        try plan.prepare(file, size: size, preallocation)
        if preallocation == .full, let start = plan.flatStart {
            if let extents = plan.extents {
                try extents.writeZeroes(0, size)
            } else {
                try file.writeZeroes(start, size)
            }
        }
        try plan.writeMetadata(file, preallocation)
        try plan.publish(&file, durably: durably)
        return size
    }

    /// Refuses what cannot be before there is a file.
    private func check(_ size: UInt64, _ kind: ImageSubformat?) throws(DiskImageError) {
        if let kind {
            return try kind.check(path, size: size, preallocation: preallocation, options: options, backing: backing)
        }
        if format == .qcow2 {
            return try options.check(path, size: size, preallocation: preallocation, backing: backing)
        }
        guard size <= DiskImage.maximumSize else {
            throw .impossible(path: path, reason: "\(size) bytes; a disk has \(DiskImage.maximumSize) at most")
        }
        guard backing == nil else {
            throw .impossible(path: path, reason: "a raw image has no backing file; qcow2 does")
        }
        guard preallocation != .metadata else {
            throw .impossible(path: path, reason: "a raw image has no metadata; use falloc or full")
        }
        guard options == QCOW2Options() else {
            throw .impossible(path: path, reason: "qcow2 options do not apply to a raw image")
        }
    }

    private func diskSize() throws(DiskImageError) -> UInt64 {
        let found: UInt64?
        do throws(DiskImageError) { found = try backing.flatMap(backingSize) } catch { throw .backing(of: path, error) }
        guard let size = size ?? found else {
            throw .impossible(path: path, reason: "its size is missing; specify it or a backing file")
        }
        let (rounded, overflow) = size.addingReportingOverflow(511)
        guard !overflow else {
            throw .impossible(path: path, reason: "\(size) bytes; a disk has \(DiskImage.maximumSize) at most")
        }
        return rounded & ~511
    }

    /// Looks at the backing image.
    /// - Returns: bytes of its disk; nil if it is not to be opened.
    private func backingSize(_ backing: BackingReference) throws(DiskImageError) -> UInt64? {
        let place = try backingPath(backing.name, of: path), choice = FormatChoice(backing)
        // None of what the new image shows may be what it replaces.
        let targets = try [path, dataPath() ?? path].compactMap(FilePlace.init)
        guard opensBacking else {
            if let file = FilePlace.search(targets, from: place, choice, backingOptions.namedFiles) {
                throw .backingLoop(path: file)
            }
            try choice.checkUnopened(place)
            return nil
        }
        // Only its size is wanted, for which no key is needed.
        var options = backingOptions
        (options.readOnly, options.allowsDataFile, options.opensData) = (true, true, false)
        let image = try DiskImage(path: place, choice, options: options)
        for (identity, file) in zip(image.identities, image.files) where targets.contains(.file(identity)) {
            throw .backingLoop(path: file)
        }
        return image.size
    }

    private func dataPath() throws(DiskImageError) -> String? {
        try options.dataFile.map { name throws(DiskImageError) in try backingPath(name, of: path) }
    }

    private func build(_ file: borrowing NewFile, _ data: borrowing NewFile?, size: UInt64) throws(DiskImageError) {
        let volume = try options.encryption?.makeVolume(path)
        let cipher = try volume?.cipher(path: path)
        var builder = QCOW2Builder(options, size: size, backing: backing, volume: volume)
        // A reader of the raw data file alone sees zeroes where this image has nothing: both agree if the image never
        // has nothing.
        let isMapped = preallocation != .off || options.dataFileIsRaw
        if isMapped { try preallocate(&builder, file, data, cipher) }
        let end = try builder.writeMetadata(file)
        guard preallocation == .falloc else { return }
        switch data {
        case .some(let data): try data.reserve(0, size)
        case nil: try file.reserve(0, end)
        }
    }

    /// Gives every cluster of the disk its place. With subclusters none of them is allocated, so that a backing file
    /// shows.
    private func preallocate(
        _ builder: inout QCOW2Builder, _ file: borrowing NewFile, _ data: borrowing NewFile?,
        _ cipher: borrowing SectorCipher?
    ) throws(DiskImageError) {
        let count = (builder.size + builder.clusterSize - 1) / builder.clusterSize
        let perRun = builder.clusterSize / (options.extendedL2 ? 16 : 8)
        let subclusters: UInt32 = backing == nil ? .max : 0
        var cluster: UInt64 = 0
        while cluster < count {
            let run = min(perRun, count - cluster)
            let length = run * builder.clusterSize
            switch data {
            case .some(let data):
                let place = cluster * builder.clusterSize
                try builder.map(cluster, count: run, to: place, subclusters: subclusters, file)
                if preallocation == .full { try data.writeZeroes(place, min(length, builder.size - place), cipher) }
            case nil:
                // The table first, so that it lies before what it maps.
                try builder.openTable(of: cluster, file)
                let place = builder.allocate(run)
                try builder.map(cluster, count: run, to: place, subclusters: subclusters, file)
                if preallocation == .full { try file.writeZeroes(place, length, cipher) }
            }
            cluster += run
        }
    }
}
