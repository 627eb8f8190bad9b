// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

extension DiskImage {
    /// Refuses what is no qcow2 image, by the stated format or else by its name, for what only those have.
    /// - Parameter reason: completes "disk PATH: ".
    public static func requireQCOW2(
        _ path: String, format: ImageFormat?, _ reason: (ImageFormat) -> String
    ) throws(DiskImageError) {
        let choice = try FormatChoice(format, of: path)
        guard choice.format != .qcow2 else { return }
        _ = try choice.check(path: path)
        throw .notApplicable(path: path, reason: reason(choice.format))
    }

    /// Examines the metadata of an image and, if that is asked, repairs it. Backing files are not checked.
    ///
    /// A repair is complete or has not happened, whenever the power fails: ``MetadataReplacement``. The exception are
    /// entries that cannot be right (`repair` is ``CheckReport/Repair/all``), each of which becomes zeroes by itself.
    /// What the report says is fixed is durable.
    /// - Parameter options: the format, the way of locking, and the file with the data of an image that keeps it
    ///   outside: where one is named, it has to be there and as long as the clusters in use need. Whatever else they
    ///   say does not matter here.
    public static func check(
        path: String, options: DiskImageOptions = DiskImageOptions(), repair: CheckReport.Repair? = nil
    ) throws(DiskImageError) -> CheckReport {
        let choice = try FormatChoice(options.format, of: path, option: options.formatOption)
        if choice.format != .qcow2 {
            _ = try choice.check(path: path)
            throw .notCheckable(path: path)
        }
        guard !NBDLocation.isAddress(path) else { throw .remoteNotPossible(path: path, reason: NBDLocation.isRaw) }
        let file = try ImageFile(path: path, writable: repair != nil, cache: .writeback, locking: options.locking)
        try choice.check(file)
        return try check(file, repair, options, calls: .host)
    }

    static func check(
        _ file: borrowing ImageFile, _ repair: CheckReport.Repair?, _ options: DiskImageOptions = DiskImageOptions(),
        calls: FileCalls
    ) throws(DiskImageError) -> CheckReport {
        let header = try QCOW2Header(file, allowingCut: true)
        let dataFile = try file.openStatedDataFile(header, options)
        let dataSize: UInt64? =
            switch dataFile {
            case .some(let data): data.size
            case nil: nil
            }
        let table = TableFile(path: file.path, file: MetadataFile(calls: calls, number: file.descriptor.rawValue))
        var check = QCOW2Check(header: header, file: table, dataSize: dataSize)
        return try check.run(repair)
    }

    /// For an image that was not closed by a program that keeps its reference counts lazily: wrong refcounts are
    /// repaired. Damaged entries are not touched, and keep the image from being written.
    static func repairIfDirty(_ file: inout ImageFile) throws(DiskImageError) -> CheckReport? {
        let header = try QCOW2Header(file)
        guard header.isDirty, !header.isCorrupt else { return nil }
        let table = TableFile(path: file.path, file: MetadataFile(calls: .host, number: file.descriptor.rawValue))
        var check = QCOW2Check(header: header, file: table)
        let report = try check.run(.all, repairsEntries: false)
        guard report.errors == 0 else {
            throw .notWritable(
                path: file.path,
                reason:
                    "it was not closed cleanly and has \(report.errors) error\(report.errors == 1 ? "" : "s"): swkvm image check --repair all"
            )
        }
        try file.measure()
        return report
    }
}

/// A check of one file, and its repair.
struct QCOW2Check {
    private(set) var header: QCOW2Header
    let file: TableFile
    /// Bytes of the file with the data, where that is known to be another one.
    let dataSize: UInt64?

    /// The number of attempts of a repair: a repaired entry may reveal other errors.
    private static let maximumPasses = 16

    init(header: QCOW2Header, file: TableFile, dataSize: UInt64? = nil) {
        self.header = header
        self.file = file
        self.dataSize = dataSize
    }

    mutating func run(_ repair: CheckReport.Repair?, repairsEntries: Bool = true) throws(DiskImageError) -> CheckReport
    {
        var scan = try QCOW2Scan.scan(header, file, fileSize: try size(), dataSize: dataSize)
        let found = scan.report
        guard let repair else { return found }
        var passes = 0
        while passes < Self.maximumPasses, try self.repair(scan, repair, repairsEntries: repairsEntries) {
            header.replaced(by: try file.read(header.fixedLength, at: 0))
            scan = try QCOW2Scan.scan(header, file, fileSize: try size(), dataSize: dataSize)
            passes += 1
        }
        var report = scan.report
        if report.errors == 0, header.isDirty || header.isCorrupt { try clearMarks() }
        report.errorsFixed = max(0, found.errors - report.errors)
        report.leaksFixed = max(0, found.leaks - report.leaks)
        report.findings = found.findings
        return report
    }

    private func size() throws(DiskImageError) -> UInt64 {
        do throws(MetadataError) { return try file.file.size() } catch { throw error.asError(file.path, "lseek") }
    }

    /// Puts right what can be; returns whether anything has changed.
    private func repair(
        _ scan: borrowing QCOW2Scan, _ repair: CheckReport.Repair, repairsEntries: Bool
    ) throws(DiskImageError) -> Bool {
        let report = scan.report
        if report.isSound { return false }
        if repair == .all, scan.hasLosses || !scan.broken.isEmpty {
            guard repairsEntries else { return false }
            return try scan.hasLosses ? dropLosses(scan) : repairEntries(scan)
        }
        guard repair == .all || report.leaks > 0 else { return false }
        // Space that nothing is known to use is freed only if all that could use it is known.
        let raises = (0..<scan.references.end).contains { scan.references[$0] > scan.counts[$0] }
        guard !scan.isIncomplete || (repair == .all && raises) else { return false }
        var new = try MetadataReplacement(
            scan, counting: repair == .leaks ? .countedAndUsed : scan.isIncomplete ? .countedOrUsed : .used)
        do throws(DiskImageError) {
            // Flags go by counts, so they wait for those to be right.
            if repair == .all || report.errors == 0 { try new.setL1(try file.readL1(header, scan.fileSize)) }
            try new.commit()
        } catch {
            guard !new.isCommitted else { throw error }
            new.abandon()
            guard error.isOutOfSpace, try repairInPlace(scan, repair) else { throw error }
        }
        return true
    }

    /// Replaces entries that cannot be right; returns whether there was any to replace.
    private func repairEntries(_ scan: borrowing QCOW2Scan) throws(DiskImageError) -> Bool {
        var isRepaired = false
        for broken in scan.broken where scan.references[broken.place >> UInt64(header.clusterBits)] <= broken.uses {
            try file.writeTable(broken.replacement, at: broken.place)
            isRepaired = true
        }
        if isRepaired { try file.synchronize() }
        return isRepaired
    }

    /// The image is consistent, and is no longer marked as dirty or corrupt.
    private func clearMarks() throws(DiskImageError) {
        var features = [UInt8](repeating: 0, count: 8)
        features.store(
            try file.read(8, at: 72).bigEndian64(at: 0)
                & ~(QCOW2Header.Incompatible.dirty | QCOW2Header.Incompatible.corrupt), at: 0)
        try file.synchronize()
        try file.write(features, at: 72)
        try file.synchronize()
    }
}
