// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// A bound for a file that output is appended to: when it has its size, its contents move to the first of a few files
/// beside it, whose contents move to the next, and those of the last are dropped.
///
/// All files are opened before: rotating copies, and needs no name. So a reader that follows the file sees it
/// truncated. One thread uses it.
public final class FileRotation: @unchecked Sendable {
    // One thread after the other: hence `Sendable`.

    /// One of the files beside it.
    private final class Backup {
        let descriptor: FileDescriptor
        init(_ descriptor: consuming FileDescriptor) { self.descriptor = descriptor }
    }

    private let limit: UInt64
    private var backups: [Backup] = []
    /// Bytes in the file.
    private var size: UInt64
    /// Indicates whether the file ends with a line.
    private var isAtLineStart = true
    private var buffer = [UInt8](repeating: 0, count: 64 << 10)

    /// - Parameters:
    ///   - limit: bytes in each of the files, at least 1.
    ///   - size: bytes that the file has now.
    public init(limit: UInt64, size: UInt64) {
        self.limit = max(1, limit)
        self.size = size
    }

    /// Adds the next file beside it, open for reading and writing.
    public func add(_ backup: consuming FileDescriptor) { backups.append(Backup(backup)) }

    /// Writes as much of `bytes` as the file has room for, up to the end of a line if there is one; rotates when there
    /// is no room. A file that has more than its size already is rotated first.
    /// - Parameter file: opened for reading, and for appending.
    /// - Returns: how many bytes were written; 0 after a rotation.
    public func write(
        _ bytes: ArraySlice<UInt8>, to file: borrowing FileDescriptor
    ) throws(SystemCallError) -> Int {
        let room = limit > size ? limit - size : 0
        var piece = bytes
        if UInt64(bytes.count) > room {
            piece = bytes.prefix(Int(room))
            if let end = piece.lastIndex(of: UInt8(ascii: "\n")) {
                piece = piece[...end]
            } else if room == 0 || isAtLineStart && size > 0 {
                try rotate(file)
                return 0
            }
        }
        let count = try file.writeOnce(piece)
        size += UInt64(count)
        if count > 0 { isAtLineStart = piece[piece.startIndex + count - 1] == UInt8(ascii: "\n") }
        return count
    }

    /// Moves the contents, the oldest first. What a file beside it does not take, for lack of room, is lost; the file
    /// itself is emptied in any case.
    private func rotate(_ file: borrowing FileDescriptor) throws(SystemCallError) {
        for index in backups.indices.reversed() {
            if index == 0 {
                copy(file, to: backups[0].descriptor)
            } else {
                copy(backups[index - 1].descriptor, to: backups[index].descriptor)
            }
        }
        if ftruncate(file.rawValue, 0) < 0 { throw .last("ftruncate") }
        size = 0
        isAtLineStart = true
    }

    private func copy(_ source: borrowing FileDescriptor, to target: borrowing FileDescriptor) {
        var done: UInt64 = 0
        var rest = limit
        // The array has the bytes that the kernel reads and writes.
        unsafe buffer.withUnsafeMutableBytes { buffer in
            do throws(SystemCallError) {
                while rest > 0 {
                    let part = unsafe UnsafeMutableRawBufferPointer(
                        rebasing: buffer.prefix(Int(min(rest, UInt64(buffer.count)))))
                    let count = unsafe try source.read(into: part, at: done)
                    if count == 0 { break }
                    var written = 0
                    while written < count {
                        written += unsafe try target.write(
                            UnsafeRawBufferPointer(rebasing: part[written..<count]), at: done + UInt64(written))
                    }
                    done += UInt64(count)
                    rest -= UInt64(count)
                }
            } catch {}
        }
        _ = ftruncate(target.rawValue, off_t(clamping: done))
    }
}
