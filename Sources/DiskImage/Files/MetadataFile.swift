// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// What keeps metadata from being changed.
enum MetadataError: Error, Equatable {
    /// The caches are full of changes: a commit makes room.
    case needsCommit
    /// An errno value.
    case failed(Int32)
    /// An errno value. What the host could not store it may have lost, also of other writers: later writes could not be
    /// relied upon.
    case lost(Int32)

    /// The errno value.
    var code: Int32 {
        switch self {
        case .needsCommit: EIO
        case .failed(let error), .lost(let error): error
        }
    }

    /// What becomes of a request for it.
    var lookup: RangeLookup {
        switch self {
        case .needsCommit: .commit
        case .failed(let error), .lost(let error): .failed(error)
        }
    }

    func asError(_ path: String, _ call: String) -> DiskImageError {
        .system(path: path, SystemCallError(call, errno: code))
    }
}

/// The file of an image for the small, rare reads and writes of metadata that are done synchronously, through the page
/// cache.
struct MetadataFile {
    let calls: FileCalls
    let number: Int32
    /// The file's number in its image.
    var file = 0
    /// Learns of what the host refuses.
    var failures: MetadataFailures?

    private static let maximumRetries = 1000

    func read(into memory: IOMemory, at offset: UInt64) throws(MetadataError) {
        try transfer(memory, offset, isRead: true)
    }

    func write(_ memory: IOMemory, at offset: UInt64) throws(MetadataError) {
        try transfer(memory, offset, isRead: false)
    }

    func write(_ bytes: [UInt8], at offset: UInt64) throws(MetadataError) {
        try bytes.withReadableIOMemory { (memory) throws(MetadataError) in try write(memory, at: offset) }
    }

    /// - Throws: ``MetadataError/lost(_:)``.
    func synchronize() throws(MetadataError) {
        var result = calls.synchronize(number)
        while result == -Int(EINTR) { result = calls.synchronize(number) }
        if result < 0 { throw .lost(refused(.synchronize, -result)) }
    }

    /// Frees the space of a range. Best effort: a failure costs space and nothing else.
    func punch(_ offset: UInt64, _ length: UInt64) {
        let mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        _ = calls.allocate(number, mode, off_t(truncatingIfNeeded: offset), off_t(truncatingIfNeeded: length))
    }

    /// Bytes of the file, or of the device.
    func size() throws(MetadataError) -> UInt64 {
        let end = lseek(number, 0, SEEK_END)
        if end < 0 { throw .failed(errno) }
        return UInt64(end)
    }

    /// Gives a range the host's blocks, and the file its end if it is longer.
    func reserve(_ offset: UInt64, _ length: UInt64) throws(MetadataError) {
        var result = -Int(EINTR)
        while result == -Int(EINTR) {
            result = calls.allocate(number, 0, off_t(truncatingIfNeeded: offset), off_t(truncatingIfNeeded: length))
        }
        if result < 0 { throw .failed(refused(.allocate, at: offset, -result)) }
    }

    /// Makes the file longer by a hole, or shorter.
    func truncate(to size: UInt64) throws(MetadataError) {
        var result = calls.truncate(number, off_t(truncatingIfNeeded: size))
        while result == -Int(EINTR) { result = calls.truncate(number, off_t(truncatingIfNeeded: size)) }
        if result < 0 { throw .failed(refused(.truncate, at: size, -result)) }
    }

    /// Notes what the host has refused. Returns the errno value.
    private func refused(_ call: FailedAccess.Call, at offset: UInt64 = 0, _ error: Int) -> Int32 {
        let error = Int32(clamping: error)
        failures?.note(FailedAccess(call: call, file: file, offset: offset), error)
        return error
    }

    /// Bytes of `count` from a place of the file.
    func read(_ count: Int, at offset: UInt64) throws(MetadataError) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        try bytes.withIOMemory { (memory) throws(MetadataError) in try read(into: memory, at: offset) }
        return bytes
    }

    private func transfer(_ memory: IOMemory, _ offset: UInt64, isRead: Bool) throws(MetadataError) {
        let count = memory.count
        var done = 0, retries = 0
        while done < count {
            let result = calls.transfer(number, memory.from(done), at: offset &+ UInt64(done), isRead: isRead)
            if result > 0 {
                done += min(result, count - done)
                continue
            }
            guard result == -Int(EINTR) || result == -Int(EAGAIN), retries < Self.maximumRetries else {
                // Nothing more where there should be: the file was cut, or takes no more.
                throw .failed(
                    refused(isRead ? .read : .write, at: offset &+ UInt64(done), result == 0 ? Int(EIO) : -result))
            }
            retries += 1
        }
    }
}
