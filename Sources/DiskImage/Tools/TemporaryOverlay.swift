// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

extension DiskImage {
    /// Opens an image that stays as it is: what is written goes to a new qcow2 overlay, whose file has no name any more
    /// when this returns, so that nothing is left of it when the process has gone.
    ///
    /// The overlay is in `$TMPDIR`, or else in `/var/tmp`.
    /// - Parameters:
    ///   - path: of the image, which is opened for reading, as a backing file is.
    ///   - options: those of the image. Its backing files and keys are found as without the overlay.
    public convenience init(overlaying path: String, options: DiskImageOptions) throws(DiskImageError) {
        guard !Self.isRemote(path) else {
            throw .remoteNotPossible(path: path, reason: "a remote disk has no temporary overlay")
        }
        let choice = try FormatChoice(options.format, of: path, option: options.formatOption)
        guard options.snapshot == nil, options.dataFile == nil else {
            throw .impossible(
                path: path, reason: "snapshot= and data-file= cannot be combined with a temporary overlay")
        }
        // What is relative is to be found from the overlay's directory, too.
        guard let base = resolved(path) else { throw .system(path: path, .last("open")) }
        var below = options
        below.readOnly = true
        below.format = choice.format
        let directory = try Self.makeTemporaryDirectory()
        let overlay = directory + "/overlay.qcow2"
        defer {
            removeName(overlay)
            // The name ends with a NUL and lives for the call.
            directory.withRawCString { unsafe _ = rmdir($0) }
        }
        var creation = ImageCreation(path: overlay, format: .qcow2)
        creation.backing = BackingReference(name: base, format: choice.format, isFormatStated: options.format != nil)
        creation.backingOptions = below
        do throws(DiskImageError) { try creation.create() } catch {
            if case .backing(overlay, let error) = error { throw error }
            throw error
        }
        var above = options
        above.format = .qcow2
        above.namedFiles.stated.append(base)
        // The image's own backing files are in or below its directory, as without the overlay.
        do throws(DiskImageError) { try self.init(path: overlay, options: above) } catch {
            // The user knows of no overlay.
            if case .backing(overlay, let error) = error { throw error }
            throw error
        }
    }

    private static func makeTemporaryDirectory() throws(DiskImageError) -> String {
        let parent = environmentVariable("TMPDIR").flatMap { $0.isEmpty ? nil : $0 } ?? "/var/tmp"
        for _ in 0..<100 {
            let path = parent + "/swkvm-" + String(UInt64.random(in: 0 ... .max), radix: 36)
            // The same.
            if path.withRawCString({ unsafe mkdir($0, 0o700) }) == 0 { return path }
            if errno != EEXIST { throw .system(path: path, .last("mkdir")) }
        }
        throw .system(path: parent, SystemCallError("mkdir", errno: EEXIST))
    }
}
