// SPDX-License-Identifier: Apache-2.0

/// A file system that is read and never written.
///
/// Everything in it is untrusted. What a call does is bounded whatever the image says, and ends in an error where that
/// contradicts itself.
public protocol FileSystem: Sendable {
    /// `ext4`, `FAT32`.
    var kind: String { get }
    /// As blkid prints it; nil for none.
    var uuid: String? { get }
    var label: String { get }
    /// Indicates whether names are the same in upper and lower case.
    var ignoresCase: Bool { get }

    func root() throws(FileSystemError) -> FileNode
    /// What is in a directory, in its own order, without `.` and `..`.
    func entries(of directory: FileNode) throws(FileSystemError) -> [DirectoryEntry]
    func node(of entry: DirectoryEntry) throws(FileSystemError) -> FileNode
    func target(of link: FileNode) throws(FileSystemError) -> [UInt8]
    func contents(of file: FileNode) throws(FileSystemError) -> FileContents
}

/// A file, a directory or something else that has a name in a file system.
public struct FileNode: Sendable {
    public enum Kind: Sendable, Equatable { case file, directory, symbolicLink, other }

    public var kind: Kind
    /// Bytes.
    public var size: UInt64
    /// The twelve bits of chmod(1).
    public var permissions: UInt16
    /// Seconds since 1970.
    public var modified: Int64
    var place: Place

    enum Place: Sendable {
        case ext(ExtInode)
        /// The first cluster; 0 for an empty file, and for the root directory of FAT12 and FAT16.
        case fat(UInt32)
    }

    /// The same for the same file of a file system; nil if unknown.
    var identity: UInt64? {
        switch place {
        case .ext(let inode): UInt64(inode.number)
        case .fat(let cluster): cluster == 0 ? nil : UInt64(cluster)
        }
    }
}

/// A name in a directory.
public struct DirectoryEntry: Sendable {
    /// The bytes of the name, never empty and without slash and zero.
    public let name: [UInt8]
    let place: Place

    enum Place: Sendable {
        /// The number of an inode.
        case ext(UInt32)
        case node(FileNode)
    }
}

extension FileSystem {
    /// What a path leads to; symbolic links are followed, within this file system.
    /// - Parameter followsLast: also where the path's own last component is one.
    /// - Throws: `notFound`, and what else is wrong.
    public func find(_ path: [UInt8], followsLast: Bool = true) throws(FileSystemError) -> FileNode {
        let text = String(decoding: path, as: UTF8.self)
        // Behind each other from the root, so that `..` finds its way back.
        var way = [try root()]
        var rest = Array(path.split(separator: slash).reversed())
        var links = 0, work: UInt64 = 0
        while let name = rest.popLast() {
            guard let here = way.last, here.kind == .directory else { throw .notADirectory(path: text) }
            if name.elementsEqual(".".utf8) { continue }
            if name.elementsEqual("..".utf8) {
                if way.count > 1 { way.removeLast() }
                continue
            }
            work &+= here.size
            guard work <= maximumWork else { throw .tooLarge(what: text, size: work, limit: maximumWork) }
            guard let entry = try entries(of: here).first(where: { matches($0.name, name) }) else {
                throw .notFound(path: text, missing: String(decoding: name, as: UTF8.self))
            }
            let node = try node(of: entry)
            if node.kind == .symbolicLink, followsLast || !rest.isEmpty {
                links += 1
                guard links <= maximumLinks else { throw .tooManyLinks(path: text, limit: maximumLinks) }
                let target = try target(of: node)
                if target.first == slash { way.removeSubrange(1...) }
                rest += target.split(separator: slash).reversed()
                continue
            }
            guard way.count < maximumDepth else { throw .damaged(what: text, reason: "it is nested too deeply") }
            way.append(node)
        }
        guard let last = way.last else { return try root() }
        if path.last == slash, last.kind != .directory { throw .notADirectory(path: text) }
        return last
    }

    public func find(_ path: String, followsLast: Bool = true) throws(FileSystemError) -> FileNode {
        try find(Array(path.utf8), followsLast: followsLast)
    }

    /// The contents of a regular file.
    public func file(_ path: String) throws(FileSystemError) -> FileContents {
        let node = try find(path)
        guard node.kind == .file else { throw .notAFile(path: path) }
        return try contents(of: node)
    }

    /// The same; nil where there is no such file.
    public func fileIfPresent(_ path: String) throws(FileSystemError) -> FileContents? {
        do throws(FileSystemError) { return try file(path) } catch {
            switch error {
            case .notFound, .notADirectory, .notAFile: return nil
            default: throw error
            }
        }
    }

    /// The names in a directory, sorted; none where there is no such directory.
    func names(in path: String) throws(FileSystemError) -> [String] {
        do throws(FileSystemError) {
            let node = try find(path)
            guard node.kind == .directory else { return [] }
            return try entries(of: node).map { String(decoding: $0.name, as: UTF8.self) }.sorted()
        } catch {
            switch error {
            case .notFound, .notADirectory: return []
            default: throw error
            }
        }
    }

    private func matches(_ name: [UInt8], _ wanted: ArraySlice<UInt8>) -> Bool {
        if name.elementsEqual(wanted) { return true }
        guard ignoresCase else { return false }
        return String(decoding: name, as: UTF8.self).lowercased()
            == String(decoding: wanted, as: UTF8.self).lowercased()
    }
}

private let slash = UInt8(ascii: "/")
/// As Linux has it.
private let maximumLinks = 40
private let maximumDepth = 256
/// Bytes of directories that are searched for one path.
private let maximumWork: UInt64 = 64 << 20
