// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

/// The system calls for the files of an image; a test passes others, which fail or do half. Results are as io_uring
/// gives them: a negative errno value is a failure.
@safe struct FileCalls: Sendable {
    var read: @Sendable (Int32, UnsafePointer<iovec>, Int32, off_t) -> Int
    var write: @Sendable (Int32, UnsafePointer<iovec>, Int32, off_t) -> Int
    var synchronize: @Sendable (Int32) -> Int
    var allocate: @Sendable (Int32, Int32, off_t, off_t) -> Int
    var truncate: @Sendable (Int32, off_t) -> Int = { file, size in outcome(Int(ftruncate(file, size))) }
    /// Reads without waiting for a disk: `EAGAIN`, or fewer bytes, where it would have to.
    var readCached: @Sendable (Int32, UnsafePointer<iovec>, Int32, off_t) -> Int = { file, vectors, count, offset in
        // The pointer goes straight to the kernel, which reads `count` vectors.
        unsafe outcome(clinux_read_cached(file, vectors, count, offset))
    }
    /// Hears of work on bytes before it is done, in the engine's thread.
    var bulkWork: (@Sendable (BulkWork) -> Void)?

    /// The kernel's.
    static let host = unsafe FileCalls(
        // The pointers go straight to the kernel, which reads `count` vectors.
        read: { file, vectors, count, offset in unsafe outcome(preadv(file, vectors, count, offset)) },
        write: { file, vectors, count, offset in unsafe outcome(pwritev(file, vectors, count, offset)) },
        synchronize: { file in outcome(Int(fdatasync(file))) },
        allocate: { file, mode, offset, length in outcome(Int(clinux_fallocate(file, mode, offset, length))) })

    func read(_ file: Int32, _ segments: IOSegments, at offset: UInt64) -> Int {
        // As many vectors as there are.
        unsafe read(file, segments.vectors, Int32(clamping: segments.count), off_t(truncatingIfNeeded: offset))
    }

    func write(_ file: Int32, _ segments: IOSegments, at offset: UInt64) -> Int {
        // As above.
        unsafe write(file, segments.vectors, Int32(clamping: segments.count), off_t(truncatingIfNeeded: offset))
    }

    func readCached(_ file: Int32, _ segments: IOSegments, at offset: UInt64) -> Int {
        // As above.
        unsafe readCached(file, segments.vectors, Int32(clamping: segments.count), off_t(truncatingIfNeeded: offset))
    }

    /// Reads or writes one piece of memory.
    func transfer(_ file: Int32, _ memory: IOMemory, at offset: UInt64, isRead: Bool) -> Int {
        // One vector, which the calls use until they return.
        var vector = unsafe memory.vector
        return unsafe withUnsafePointer(to: &vector) { vector in
            let segments = unsafe IOSegments(vector, count: 1)
            return isRead ? read(file, segments, at: offset) : write(file, segments, at: offset)
        }
    }

    private static func outcome(_ result: Int) -> Int { result < 0 ? -Int(errno) : result }
}
