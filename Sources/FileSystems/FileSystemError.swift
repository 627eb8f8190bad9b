// SPDX-License-Identifier: Apache-2.0

/// The reason why something on a disk cannot be found or read.
public enum FileSystemError: Error, Sendable, Equatable, CustomStringConvertible {
    /// The disk itself cannot be read; `reason` is its own sentence.
    case unreadable(reason: String)
    /// A structure contradicts itself: what it is, and what is wrong with it.
    case damaged(what: String, reason: String)
    /// Something valid that is not read here.
    case unsupported(what: String, reason: String)
    /// A path that names nothing; `missing` is the first component that does not exist.
    case notFound(path: String, missing: String)
    case notADirectory(path: String)
    case notAFile(path: String)
    /// More symbolic links on the path than are followed.
    case tooManyLinks(path: String, limit: Int)
    /// A text (a configuration of a boot loader, a target of a link) that is larger than one can be.
    case tooLarge(what: String, size: UInt64, limit: UInt64)
    /// A boot loader's configuration that cannot be evaluated: the file and line, and why.
    case configuration(file: String, line: Int?, reason: String)
    /// A file of the host that cannot be written.
    case host(path: String, reason: String)
    /// A partition that does not exist.
    case noPartition(number: Int, found: [Int])
    /// Nothing on the disk has a supported file system; `found` lists what is there instead.
    case noFileSystem(found: [String])
    /// Nothing that boots; both lists are for the message.
    case nothingBoots(looked: [String], found: [String])
    /// An entry of the boot menu that does not exist.
    case noEntry(wanted: String, count: Int)

    public var description: String {
        switch self {
        case .unreadable(let reason): reason
        case .damaged(let what, let reason): "\(what) is damaged: \(reason)"
        case .unsupported(let what, let reason): "\(what) is not supported: \(reason)"
        case .notFound(let path, let missing):
            path.hasSuffix("/" + missing) ? "\(path) does not exist" : "\(path) does not exist: there is no \(missing)"
        case .notADirectory(let path): "\(path) is not a directory"
        case .notAFile(let path): "\(path) is not a regular file"
        case .tooManyLinks(let path, let limit): "\(path) leads through more than \(limit) symbolic links"
        case .tooLarge(let what, let size, let limit):
            "\(what) has \(size) bytes; at most \(limit) are read"
        case .configuration(let file, let line, let reason): "\(file)\(line.map { ", line \($0)" } ?? ""): \(reason)"
        case .host(let path, let reason): "cannot write \(path): \(reason)"
        case .noPartition(let number, let found):
            found.isEmpty
                ? "there is no partition \(number): the disk has no partition table"
                : "there is no partition \(number); the disk has \(list(found.map(String.init)))"
        case .noFileSystem(let found):
            found.isEmpty
                ? "neither a partition table nor a file system was found; expected GPT or MBR, ext2, ext3, ext4 or FAT"
                : "no file system that swkvm reads was found (ext2, ext3, ext4, FAT); found \(list(found))"
        case .nothingBoots(let looked, let found):
            found.isEmpty
                ? "no kernel was found: the disk has no file system that swkvm reads (ext2, ext3, ext4, FAT)"
                : "no kernel was found: looked for \(list(looked)) in \(list(found))"
        case .noEntry(let wanted, let count):
            "there is no boot entry \(wanted): the disk has \(count), see --boot list"
        }
    }
}

/// `a, b and c`.
func list(_ words: [String]) -> String {
    words.count < 2 ? words.joined() : words.dropLast().joined(separator: ", ") + " and " + (words.last ?? "")
}
