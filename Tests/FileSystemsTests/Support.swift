// SPDX-License-Identifier: Apache-2.0

import Glibc
import Testing

@testable import FileSystems

/// A directory that goes with the value.
final class TemporaryDirectory: Sendable {
    let path: String

    init() {
        let parent =
            access("/dev/shm", W_OK) == 0 ? "/dev/shm" : getenv("TMPDIR").map { String(cString: $0) } ?? P_tmpdir
        var template = Array("\(parent)/swkvm-files.XXXXXX".utf8CString)
        path = template.withUnsafeMutableBufferPointer { String(cString: mkdtemp($0.baseAddress!)) }
    }

    deinit { #expect(system("rm -rf '\(path)'") == 0) }

    /// Runs a script in the directory. The programs of file systems are where root has them.
    func shell(_ script: String, sourceLocation: SourceLocation = #_sourceLocation) {
        let line = "cd '\(path)' && export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C.UTF-8 MTOOLS_SKIP_CHECK=1 && set -e\n"
        let status = system(line + script)
        #expect(status == 0, "\(script)", sourceLocation: sourceLocation)
    }

    func disk(_ name: String) throws -> HostFile { try HostFile(path + "/" + name) }
}

/// A file of the host as a disk.
final class HostFile: BlockSource {
    let size: UInt64
    private let descriptor: Int32

    init(_ path: String) throws {
        descriptor = open(path, O_RDONLY | O_CLOEXEC)
        try #require(descriptor >= 0, "\(path)")
        size = UInt64(lseek(descriptor, 0, SEEK_END))
    }

    deinit { close(descriptor) }

    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(FileSystemError) {
        guard pread(descriptor, buffer.baseAddress, buffer.count, off_t(offset)) == buffer.count else {
            throw .unreadable(reason: "pread")
        }
    }

    var bytes: [UInt8] {
        get throws { try Volume(self).read(at: 0, count: Int(size)) }
    }
}

/// Files by their paths, for what reads configurations.
struct TextFileSystem: FileSystem {
    let kind = "text"
    var uuid: String?
    var label = ""
    let ignoresCase = false
    private var names: [String] = [""]
    private var texts: [[UInt8]] = [[]]

    init(uuid: String? = nil, label: String = "", _ files: [String: String], binary: [String: [UInt8]] = [:]) {
        self.uuid = uuid
        self.label = label
        let all = files.mapValues { Array($0.utf8) }.merging(binary) { $1 }
        for (path, bytes) in all.sorted(by: { $0.key < $1.key }) {
            names.append(path)
            texts.append(bytes)
        }
    }

    private func index(of node: FileNode) -> Int {
        if case .fat(let number) = node.place { Int(number) } else { 0 }
    }

    /// Directories are numbered behind the files, by the first path below them.
    private func path(of node: FileNode) -> String {
        let index = index(of: node)
        guard node.kind == .directory, index > 0 else { return node.kind == .directory ? "" : names[index] }
        return names[index % 1000].split(separator: "/").prefix(index / 1000).map { "/" + $0 }.joined()
    }

    func root() throws(FileSystemError) -> FileNode {
        FileNode(kind: .directory, size: 0, permissions: 0, modified: 0, place: .fat(0))
    }

    func entries(of directory: FileNode) throws(FileSystemError) -> [DirectoryEntry] {
        let prefix = path(of: directory) + "/", depth = prefix.utf8.filter { $0 == UInt8(ascii: "/") }.count
        var seen: Set<String> = [], entries: [DirectoryEntry] = []
        for (number, name) in names.enumerated() where name.hasPrefix(prefix) {
            let parts = name.dropFirst(prefix.count).split(separator: "/").map(String.init)
            guard let first = parts.first, seen.insert(first).inserted else { continue }
            let node = FileNode(
                kind: parts.count > 1 ? .directory : .file, size: UInt64(texts[number].count), permissions: 0,
                modified: 0,
                place: .fat(UInt32(parts.count > 1 ? depth * 1000 + number : number)))
            entries.append(DirectoryEntry(name: Array(first.utf8), place: .node(node)))
        }
        return entries
    }

    func node(of entry: DirectoryEntry) throws(FileSystemError) -> FileNode {
        guard case .node(let node) = entry.place else { throw .notAFile(path: "") }
        return node
    }

    func target(of link: FileNode) throws(FileSystemError) -> [UInt8] { [] }

    func contents(of file: FileNode) throws(FileSystemError) -> FileContents {
        FileContents(bytes: texts[index(of: file)])
    }
}

extension DiskContents {
    /// A disk with a GPT and these file systems in it, from partition 1 on.
    init(_ fileSystems: [TextFileSystem], efi: Int? = nil) {
        self.init(
            table: PartitionTable(kind: .gpt, partitions: []),
            places: fileSystems.enumerated().map { index, fileSystem in
                let type = index == efi ? "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" : ""
                return Place(
                    partition: Partition(number: index + 1, start: 0, size: 0, type: type, name: ""),
                    fileSystem: fileSystem, kind: "text", problem: nil)
            })
    }
}

/// Visits all that there is, as a tool would that is asked for all of it.
/// - Returns: bytes that were read.
@discardableResult
func visit(_ disk: any BlockSource) throws(FileSystemError) -> Int {
    var sum = 0
    let contents = try DiskContents(disk)
    for place in contents.places {
        if let problem = place.problem { throw problem }
        guard let fileSystem = place.fileSystem else { continue }
        var directories = [try fileSystem.root()], left = 300
        while let directory = directories.popLast(), left > 0 {
            for entry in try fileSystem.entries(of: directory).prefix(left) {
                left -= 1
                let node = try fileSystem.node(of: entry)
                switch node.kind {
                case .directory: directories.append(node)
                case .symbolicLink: sum += try fileSystem.target(of: node).count
                case .file:
                    let file = try fileSystem.contents(of: node)
                    sum += try file.read(at: 0, count: Int(min(file.size, 100_000))).count
                    if file.size > 0 { _ = try file.read(at: file.size - 1, count: 1) }
                    _ = file.hole(at: file.size / 2)
                case .other: break
                }
            }
        }
    }
    if let menu = try? BootMenu(contents) { _ = try? menu.files(nil) }
    return sum
}
