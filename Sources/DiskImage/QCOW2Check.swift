internal import Glibc
internal import Linux

extension DiskImage {
    /// Examines the metadata of an image and, if that is asked, repairs it. Backing files are not looked at.
    ///
    /// A repair is complete or has not happened, whenever the power fails: ``MetadataReplacement``. The exception are entries that cannot be right
    /// (`repair` is ``CheckReport/Repair/all``), each of which becomes zeroes by itself.
    /// - Parameter options: the format and the way of locking; whatever else they say does not matter here.
    public static func check(path: String, options: DiskImageOptions = DiskImageOptions(), repair: CheckReport.Repair? = nil) throws(DiskImageError) -> CheckReport {
        let format: ImageFormat
        if let stated = options.format { format = stated } else { format = try ImageFormat(extensionOf: path) }
        guard format == .qcow2 else { throw .notCheckable(path: path) }
        let file = try ImageFile(path: path, writable: repair != nil, cache: .writeback, locking: options.locking)
        return try check(file, repair, calls: .host)
    }

    static func check(_ file: borrowing ImageFile, _ repair: CheckReport.Repair?, calls: FileCalls) throws(DiskImageError) -> CheckReport {
        let header = try QCOW2Header(file)
        let table = TableFile(path: file.path, file: MetadataFile(calls: calls, number: file.descriptor.rawValue))
        return try QCOW2Check(header: header, file: table).run(repair)
    }

    /// For an image that was not closed by a program that keeps its reference counts lazily: what is counted wrongly is put right. Damaged
    /// entries are not touched, and keep the image from being written.
    static func repairIfDirty(_ file: inout ImageFile) throws(DiskImageError) -> CheckReport? {
        let header = try QCOW2Header(file)
        guard header.isDirty, !header.isCorrupt else { return nil }
        let table = TableFile(path: file.path, file: MetadataFile(calls: .host, number: file.descriptor.rawValue))
        let report = try QCOW2Check(header: header, file: table).run(.all, mendsEntries: false)
        guard report.errors == 0 else {
            throw .notWritable(
                path: file.path, reason: "it was not closed and has \(report.errors) error\(report.errors == 1 ? "" : "s"): swkvm image check --repair all")
        }
        try file.measure()
        return report
    }
}

/// A check of one file, and its repair.
struct QCOW2Check {
    let header: QCOW2Header
    let file: TableFile

    /// Broken entries are mended so often: each time may bring others to light.
    private static let maximumPasses = 16

    func run(_ repair: CheckReport.Repair?, mendsEntries: Bool = true) throws(DiskImageError) -> CheckReport {
        var scan = try QCOW2Scan.scan(header, file, fileSize: try size())
        let found = scan.report
        let isMarked = header.isDirty || header.isCorrupt
        guard let repair, !found.isSound || isMarked else { return found }
        if repair == .all {
            var passes = 0
            while mendsEntries, passes < Self.maximumPasses, try mend(scan) {
                scan = try QCOW2Scan.scan(header, file, fileSize: try size())
                passes += 1
            }
            if !scan.broken.isEmpty { return try result(found, scan.report) }
        }
        let left = scan.report
        var new = try MetadataReplacement(scan, mended: repair == .all)
        if repair == .leaks {
            for cluster in 0..<scan.counts.end where scan.counts[cluster] > scan.references[cluster] {
                // What is new already, beside the old refcount structure, has gone from these counts.
                let surplus = Int64(scan.counts[cluster]) - Int64(scan.references[cluster])
                new.counts.add(-surplus, to: cluster)
            }
        }
        do throws(DiskImageError) {
            if repair == .all || left.errors == 0 {
                let l1 = try file.readL1(header, scan.fileSize)
                let refreshed = try new.refreshed(l1)
                if refreshed != l1 { try new.setL1(refreshed) }
                new.clear(incompatible: QCOW2Header.Incompatible.dirty | QCOW2Header.Incompatible.corrupt)
            }
            try new.commit()
        } catch {
            if !new.isCommitted { new.abandon() }
            throw error
        }
        return try result(found, nil)
    }

    private func size() throws(DiskImageError) -> UInt64 {
        do throws(MetadataError) { return try file.file.size() } catch { throw .system(path: file.path, SystemCallError("lseek", errno: EIO)) }
    }

    /// Replaces entries that cannot be right; returns whether there was any to replace.
    private func mend(_ scan: borrowing QCOW2Scan) throws(DiskImageError) -> Bool {
        var isMended = false
        for broken in scan.broken where scan.references[broken.place >> UInt64(header.clusterBits)] <= broken.uses {
            try file.writeTable(broken.replacement, at: broken.place)
            isMended = true
        }
        if isMended { try file.synchronize() }
        return isMended
    }

    /// What is left of what was found.
    private func result(_ found: CheckReport, _ known: CheckReport?) throws(DiskImageError) -> CheckReport {
        var report: CheckReport
        if let known { report = known } else { report = try QCOW2Scan.scan(readHeader(), file, fileSize: try size()).report }
        report.errorsFixed = max(0, found.errors - report.errors)
        report.leaksFixed = max(0, found.leaks - report.leaks)
        report.findings = found.findings
        return report
    }

    /// The header as it is now.
    private func readHeader() throws(DiskImageError) -> QCOW2Header {
        var header = header
        let fields = try file.read(header.fixedLength, at: 0)
        header.replaced(by: fields)
        return header
    }
}
