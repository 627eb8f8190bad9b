// SPDX-License-Identifier: Apache-2.0

/// Opening remote disks.
extension Chain {
    /// Connects to a remote disk, whose contents are the disk's.
    mutating func connect(_ path: String, _ choice: FormatChoice, _ options: DiskImageOptions) throws(DiskImageError) {
        if count == 0, let name = options.dataFile { throw .dataFileUnused(path: path, name: name) }
        let writable = count == 0 && !options.readOnly
        guard choice.format == .raw, count > 0 || options.snapshot == nil else {
            throw .remoteNotPossible(path: path, reason: NBDLocation.isRaw)
        }
        let disk: NBDDisk
        if let connected, connected.path.utf8.elementsEqual(path.utf8) {
            disk = connected
        } else {
            disk = try NBDDisk(
                path: path, reconnect: options.reconnect, report: options.report, isInterrupted: options.isInterrupted)
            try choice.check(disk)
        }
        if disk.export.isReadOnly, writable {
            throw .notWritable(path: path, reason: "the server exports it read-only")
        }
        if !disk.export.canFlush, writable {
            options.report?("disk \(path): the server does not support flush: swkvm cannot make written data durable")
        }
        append(DiskImage.Layer(file: try ImageFile(disk), size: (disk.export.size &+ 511) & ~511))
        chainLength += 1
        remote = disk
    }
}
