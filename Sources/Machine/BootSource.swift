// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import BundledGuest
internal import DiskImage
internal import FileSystems
internal import Linux

/// What a machine boots: kernel, initrd and command line, for one boot after the other.
///
/// Files that were named are opened once. A disk's own are looked up again for each boot, in the image that the machine
/// has open: a guest that has installed another kernel boots that one. Called by the thread that makes the board, when
/// no device has anything in flight.
final class BootSource: Sendable {
    /// What one boot takes.
    struct Files: Sendable {
        var kernel: BootFile
        var initrd: BootFile?
        var commandLine: String
        /// What the kernel belongs to, for messages: `Debian GNU/Linux`; nil where its name says all.
        var title: String?
    }

    private enum Kind {
        case files(Files)
        case disk(ImageContents, path: String, entry: String?)
    }

    private let kind: Kind
    /// What was found on a disk at the start, for the first boot.
    private let first: Guarded<BootFiles?>
    private let configuration: Configuration

    /// Opens the files that a configuration names.
    init(_ configuration: Configuration) throws(MachineError) {
        self.configuration = configuration
        let kernel: BootFile
        switch configuration.kernel {
        case .file(let path): kernel = try Machine.open(path)
        case .automatic, .bundled, .disk:
            // The bytes are constants of this binary.
            kernel = unsafe BootFile(
                name: "the bundled guest",
                memory: UnsafeRawBufferPointer(start: bundled_guest_start(), count: bundled_guest_size()))
        }
        let initrd = try configuration.initrd.map { path throws(MachineError) in try Machine.open(path) }
        first = Guarded(nil)
        kind = .files(Files(kernel: kernel, initrd: initrd, commandLine: configuration.fullCommandLine(nil)))
    }

    /// Finds what a disk boots.
    /// - Parameters:
    ///   - image: the machine's own, which no engine uses now.
    ///   - path: what the user calls it.
    init(
        _ configuration: Configuration, booting image: ImageContents, _ path: String, entry: String?
    ) throws(MachineError) {
        guard !image.isRemote else { throw .bootDiskIsRemote(path: path) }
        self.configuration = configuration
        first = Guarded(try Self.find(image, path, entry))
        kind = .disk(image, path: path, entry: entry)
    }

    /// What boots now.
    func next() throws(MachineError) -> Files {
        switch kind {
        case .files(let files): return files
        case .disk(let image, let path, let entry):
            let prepared = first.withLock { first in
                defer { first = nil }
                return first
            }
            let found: BootFiles
            if let prepared { found = prepared } else { found = try Self.find(image, path, entry) }
            let menuEntry = found.entry
            return Files(
                kernel: BootFile(
                    name: "\(menuEntry.kernel.path) of \(path)", contents: FileInImage(contents: found.kernel)),
                initrd: found.initrd.map {
                    BootFile(
                        name: "\(menuEntry.initrds.map(\.path).joined(separator: ", ")) of \(path)",
                        contents: FileInImage(contents: $0))
                },
                commandLine: configuration.fullCommandLine(menuEntry.commandLine), title: menuEntry.title.printable)
        }
    }

    private static func find(
        _ image: ImageContents, _ path: String, _ entry: String?
    ) throws(MachineError) -> BootFiles {
        do throws(FileSystemError) { return try BootMenu(DiskContents(ImageSource(image))).files(entry) } catch {
            throw .bootDisk(path: path, error)
        }
    }
}

extension Configuration {
    /// The command line with the appended words.
    /// - Parameter entry: that of a boot entry, which the user's own replaces.
    fileprivate func fullCommandLine(_ entry: String?) -> String {
        let base = commandLine.isEmpty && !isCommandLineRaw ? entry ?? "" : commandLine
        return [base, appendedWords].filter { !$0.isEmpty }.joined(separator: " ")
    }
}

/// A file of a file system in an image, as what boots.
private struct FileInImage: BootFileContents {
    let contents: FileContents

    var size: UInt64 { contents.size }

    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(BootContentsError) {
        do throws(FileSystemError) { unsafe try contents.read(at: offset, into: buffer) } catch {
            throw BootContentsError(reason: error.description)
        }
    }
}
