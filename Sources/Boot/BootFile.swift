// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import GuestMemory
internal import Glibc
internal import Linux

/// Bytes that are read on demand: a file that is in a disk image.
public protocol BootFileContents: Sendable {
    var size: UInt64 { get }

    /// Fills a buffer with the bytes from an offset on. The range is inside.
    /// - Throws: the reason, in a sentence.
    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(BootContentsError)
}

/// Why such bytes cannot be read.
public struct BootContentsError: Error, Sendable {
    let reason: String
    public init(reason: String) { self.reason = reason }
}

/// The bytes of a kernel or initrd: a file, or memory of this process (the embedded guest, a kernel that was
/// decompressed).
///
/// Opened once and read at each start and reset of the machine, so a reset boots the same file.
@safe public final class BootFile: @unchecked Sendable {
    // Immutable after init; pread has no shared position; the memory of `.memory` is constant and outlives the
    // process's machines, and a mapping is this object's own: `Sendable` rests on these.
    @safe private enum Contents: ~Copyable {
        case file(FileDescriptor)
        case memory(UnsafeRawBufferPointer)
        case mapping(Mapping)
        case contents(any BootFileContents)
    }

    /// The name in messages: the path as given.
    public let name: String
    /// Size in bytes when it was opened.
    public let size: UInt64
    private let contents: Contents

    /// Opens a file for reading.
    /// - Throws: ``BootError/unreadable(file:_:)``, also for a directory; ``BootError/notRegular(file:)``.
    public init(path: String) throws(BootError) {
        name = path
        var isFile = true
        do throws(SystemCallError) {
            // A FIFO would block in open(2) until it has a writer.
            let descriptor = try FileDescriptor.open(path, O_RDONLY | O_NONBLOCK)
            let status = try descriptor.status()
            isFile = [S_IFREG, S_IFDIR].contains(status.st_mode & S_IFMT)
            guard status.st_mode & S_IFMT == S_IFREG else { throw SystemCallError("open", errno: EISDIR) }
            size = UInt64(clamping: status.st_size)
            contents = .file(descriptor)
        } catch {
            throw isFile ? .unreadable(file: path, error) : .notRegular(file: path)
        }
    }

    /// Uses memory that stays valid and unchanged for as long as this object lives.
    public init(name: String, memory: UnsafeRawBufferPointer) {
        self.name = name
        size = UInt64(memory.count)
        contents = unsafe .memory(memory)
    }

    /// Uses bytes that are somewhere else.
    public init(name: String, contents: any BootFileContents) {
        self.name = name
        size = contents.size
        self.contents = .contents(contents)
    }

    /// Uses the first `size` bytes of a mapping that is no longer written.
    init(name: String, mapping: consuming Mapping, size: UInt64) {
        self.name = name
        self.size = min(size, UInt64(mapping.size))
        contents = .mapping(mapping)
    }

    /// A copy of `count` bytes at `offset`.
    /// - Throws: ``BootError/truncated(file:wanted:found:)`` when the range passes the end.
    func read(at offset: UInt64, count: Int) throws(BootError) -> [UInt8] {
        // Before memory is taken for it.
        try check(offset, UInt64(count))
        var result = [UInt8](repeating: 0, count: count)
        var span = result.mutableSpan
        unsafe try span.withUnsafeMutableBytes { buffer throws(BootError) in unsafe try read(at: offset, into: buffer) }
        return result
    }

    /// Fills a buffer with the bytes from `offset` on.
    /// - Throws: ``BootError/truncated(file:wanted:found:)`` when there are not as many.
    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(BootError) {
        try check(offset, UInt64(buffer.count))
        switch contents {
        // `check` holds the range within the memory of both.
        case .memory(let bytes):
            unsafe buffer.copyMemory(
                from: UnsafeRawBufferPointer(rebasing: bytes[Int(offset)..<Int(offset) + buffer.count]))
        case .mapping(let mapping):
            unsafe buffer.copyMemory(
                from: UnsafeRawBufferPointer(start: mapping.start + Int(offset), count: buffer.count))
        case .contents(let contents):
            do throws(BootContentsError) { unsafe try contents.read(at: offset, into: buffer) } catch {
                throw .unreadableContents(file: name, reason: error.reason)
            }
        case .file(let descriptor):
            var done = 0
            while done < buffer.count {
                let got: Int
                do throws(SystemCallError) {
                    let rest = unsafe UnsafeMutableRawBufferPointer(rebasing: buffer[done...])
                    got = unsafe try descriptor.read(into: rest, at: offset + UInt64(done))
                } catch {
                    throw .unreadable(file: name, error)
                }
                // The file was truncated after it had been opened.
                guard got > 0 else {
                    throw .truncated(file: name, wanted: offset + UInt64(buffer.count), found: offset + UInt64(done))
                }
                done += got
            }
        }
    }

    /// Refuses a range that passes the end of the file; afterwards its sums cannot overflow.
    private func check(_ offset: UInt64, _ count: UInt64) throws(BootError) {
        let end = offset.adding(count) ?? .max
        if end > size { throw .truncated(file: name, wanted: end, found: size) }
    }
}
