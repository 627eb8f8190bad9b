// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
public import Linux

/// Copies files out of a file system to the host.
///
/// What is there on the host already stays: nothing is replaced, and no symbolic link of the image is followed to
/// write.
public struct FileExtraction {
    private let source: any FileSystem
    /// What was created, in order: it is removed again after an error.
    private var created: [(path: String, isDirectory: Bool)] = []
    /// The directories on the way, by what they are in the image: one that is in itself has no end.
    private var seen: Set<UInt64> = []

    private static let pieceSize = 1 << 20
    private static let maximumFiles = 1 << 20
    private static let maximumDepth = 128

    public init(_ source: any FileSystem) { self.source = source }

    /// Copies a file, or a directory with all that is in it.
    /// - Parameter destination: the new name, or a directory that is there.
    public mutating func copy(_ path: String, to destination: String) throws(FileSystemError) {
        created = []
        seen = []
        let node = try source.find(path.rawBytes)
        var target = destination
        if isDirectory(destination) {
            guard let name = path.rawBytes.split(separator: UInt8(ascii: "/")).last, !name.elementsEqual(".".utf8),
                !name.elementsEqual("..".utf8)
            else { throw .host(path: destination, reason: "it exists; specify a name for the copy") }
            target = destination + "/" + String(raw: name)
        }
        do throws(FileSystemError) { try copy(node, path, to: target, depth: 0) } catch {
            for (path, isDirectory) in created.reversed() {
                // Here and below: a text ends with a NUL and lives for the call, which keeps no pointer to it.
                path.withRawCString { path in unsafe _ = isDirectory ? rmdir(path) : unlink(path) }
            }
            throw error
        }
    }

    /// Writes a file's contents to a descriptor of the host.
    public func write(_ path: String, to descriptor: borrowing FileDescriptor) throws(FileSystemError) {
        let node = try source.find(path.rawBytes)
        guard node.kind == .file else { throw .notAFile(path: path) }
        let contents = try source.contents(of: node)
        var offset: UInt64 = 0
        while offset < contents.size {
            let piece = try contents.read(at: offset, count: Int(min(contents.size - offset, UInt64(Self.pieceSize))))
            do throws(SystemCallError) { try descriptor.writeAll(piece) } catch {
                throw .host(path: "the output", reason: error.reason)
            }
            offset += UInt64(piece.count)
        }
    }

    private mutating func copy(
        _ node: FileNode, _ path: String, to target: String, depth: Int
    ) throws(FileSystemError) {
        guard depth <= Self.maximumDepth, created.count < Self.maximumFiles else {
            throw .damaged(what: path, reason: "it is nested too deeply, or has too many files")
        }
        switch node.kind {
        case .file:
            try copyFile(source.contents(of: node), to: target, mode: mode_t(node.permissions & 0o777))
            created.append((target, false))
        case .directory:
            if let identity = node.identity, !seen.insert(identity).inserted {
                throw .damaged(what: path, reason: "it is in more than one directory")
            }
            // A text for the call.
            try check(target, target.withRawCString { unsafe mkdir($0, 0o700) }, "mkdir")
            created.append((target, true))
            for entry in try source.entries(of: node) {
                let name = String(raw: entry.name)
                try copy(source.node(of: entry), path + "/" + name, to: target + "/" + name, depth: depth + 1)
            }
            // The same.
            try check(
                target, target.withRawCString { unsafe chmod($0, mode_t(node.permissions & 0o777 | 0o700)) }, "chmod")
        case .symbolicLink:
            let text = String(raw: try source.target(of: node))
            // Both texts live for the call.
            let status = text.withRawCString { text in
                target.withRawCString { target in unsafe symlink(text, target) }
            }
            try check(target, status, "symlink")
            created.append((target, false))
        // Devices, sockets and FIFOs are nothing to copy.
        case .other: break
        }
    }

    /// Writes a new file, which gets its name when it is complete where the host's file system can.
    private func copyFile(_ contents: FileContents, to target: String, mode: mode_t) throws(FileSystemError) {
        let bytes = target.rawBytes
        let parent = bytes.lastIndex(of: UInt8(ascii: "/")).map { String(raw: bytes[...$0]) } ?? "."
        if let file = try? FileDescriptor.open(parent, CLINUX_O_TMPFILE | O_RDWR, mode: mode) {
            try write(contents, to: file, target)
            let status = target.withRawCString { target in
                // The name of the open file, for as long as the call lasts.
                unsafe linkat(AT_FDCWD, "/proc/self/fd/\(file.rawValue)", AT_FDCWD, target, AT_SYMLINK_FOLLOW)
            }
            return try check(target, status, "linkat")
        }
        let file = try host(target) { () throws(SystemCallError) in
            try FileDescriptor.open(target, O_RDWR | O_CREAT | O_EXCL, mode: mode)
        }
        do throws(FileSystemError) { try write(contents, to: file, target) } catch {
            // A text for the call.
            target.withRawCString { unsafe _ = unlink($0) }
            throw error
        }
    }

    private func write(
        _ contents: FileContents, to file: borrowing FileDescriptor, _ path: String
    ) throws(FileSystemError) {
        try check(path, ftruncate(file.rawValue, off_t(clamping: contents.size)), "ftruncate")
        var offset: UInt64 = 0
        while offset < contents.size {
            let hole = contents.hole(at: offset)
            if hole > 0 {
                offset += hole
                continue
            }
            let piece = try contents.read(at: offset, count: Int(min(contents.size - offset, UInt64(Self.pieceSize))))
            var done = 0
            while done < piece.count {
                let rest = piece[done...]
                let place = offset + UInt64(done)
                // The array's own memory, during the call.
                done += try host(path) { () throws(SystemCallError) in
                    try unsafe rest.span.withUnsafeBytes { (bytes) throws(SystemCallError) in
                        unsafe try file.write(bytes, at: place)
                    }
                }
            }
            offset += UInt64(piece.count)
        }
    }

    private func host<Answer: ~Copyable>(
        _ path: String, _ body: () throws(SystemCallError) -> Answer
    ) throws(FileSystemError) -> Answer {
        do throws(SystemCallError) { return try body() } catch { throw .host(path: path, reason: error.reason) }
    }

    private func check(_ path: String, _ status: Int32, _ call: String) throws(FileSystemError) {
        if status < 0 { throw .host(path: path, reason: SystemCallError.last(call).reason) }
    }

    private func isDirectory(_ path: String) -> Bool {
        var status = stat()
        return path.withRawCString { unsafe stat($0, &status) } == 0 && status.st_mode & S_IFMT == S_IFDIR
    }
}
