// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import DiskImage
internal import Glibc
internal import Linux

/// A file that a serial port's output is appended to, and those of older output beside it.
struct OutputFile: ~Copyable {
    let path: String
    let descriptor: FileDescriptor
    /// Writes may wait: a thread has to make them.
    let mayBlock: Bool
    /// nil without a bound.
    let rotation: FileRotation?
    /// The files that were not there before.
    let createdPaths: [String]

    /// Opens or creates them.
    /// - Throws: `ENOTSUP` for a block device, `ETXTBSY` for a machine's disk, `ESPIPE` for something with a bound that
    ///   is no regular file, `EAGAIN` for one that another machine writes with a bound.
    init(_ path: String, _ limits: Configuration.ConsoleLimits) throws(SystemCallError) {
        self.path = path
        // Non-blocking for a FIFO or a terminal, whose reader may not be there, or stop; a regular file does not heed
        // it. One that is rotated is read then.
        let flags = O_APPEND | O_NONBLOCK | O_NOCTTY | (limits.file == nil ? O_WRONLY : O_RDWR)
        var created: [String] = []
        let descriptor = try Self.create(path, flags, &created)
        do throws(SystemCallError) {
            if let bound = limits.file {
                rotation = try Self.rotation(descriptor, bound, limits.names(path).dropFirst(), &created)
                mayBlock = true
            } else {
                let kind = FileDescriptor.kind(of: descriptor.rawValue) ?? 0
                try Self.checkUse(descriptor, kind)
                rotation = nil
                mayBlock = kind != S_IFIFO && kind != S_IFCHR
            }
        } catch {
            for path in created { removeName(path) }
            throw error
        }
        self.descriptor = descriptor
        createdPaths = created
    }

    private static func rotation(
        _ file: borrowing FileDescriptor, _ bound: Configuration.ConsoleLimits.File, _ names: ArraySlice<String>,
        _ created: inout [String]
    ) throws(SystemCallError) -> FileRotation {
        try checkForRotation(file)
        let rotation = FileRotation(limit: bound.size, size: try file.size())
        for name in names {
            // Symbolic links there are not followed.
            let backup = try create(name, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, &created)
            try checkForRotation(backup)
            rotation.add(backup)
        }
        return rotation
    }

    /// Refuses what output would destroy: a block device, another process's disk.
    private static func checkUse(_ file: borrowing FileDescriptor, _ kind: mode_t) throws(SystemCallError) {
        if kind == S_IFBLK { throw SystemCallError("open", errno: ENOTSUP) }
        if kind == S_IFREG, isImageInUse(file) { throw SystemCallError("open", errno: ETXTBSY) }
    }

    /// Only a regular file can be rotated, and only by one machine.
    private static func checkForRotation(_ file: borrowing FileDescriptor) throws(SystemCallError) {
        guard (FileDescriptor.kind(of: file.rawValue) ?? 0) == S_IFREG else {
            throw SystemCallError("rotate", errno: ESPIPE)
        }
        try checkUse(file, S_IFREG)
        // A conflict has to last a fifth of a second to be one: a process that is just being forked has the files of a
        // machine that ended until its exec.
        var attempts = 0
        while flock(file.rawValue, LOCK_EX | LOCK_NB) < 0 {
            attempts += 1
            guard errno == EWOULDBLOCK || errno == EINTR, attempts < 20 else { throw .last("flock") }
            usleep(10_000)
        }
    }

    /// Opens a file.
    /// - Parameter created: gets its path if it was not there before.
    private static func create(
        _ path: String, _ flags: Int32, _ created: inout [String]
    ) throws(SystemCallError) -> FileDescriptor {
        if let new = try? FileDescriptor.open(path, flags | O_CREAT | O_EXCL, mode: 0o600) {
            created.append(path)
            return new
        }
        return try FileDescriptor.open(path, flags | O_CREAT, mode: 0o600)
    }
}
