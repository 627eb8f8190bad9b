// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Opens a file that may be something else: a named pipe does not keep us waiting for its other end.
/// - Parameters:
///   - access: `O_RDONLY` or `O_RDWR`.
///   - isInterrupted: as ``DiskImageOptions/isInterrupted``.
func openFile(
    _ path: String, _ access: Int32, isInterrupted: () -> Bool = { false }
) throws(DiskImageError) -> FileDescriptor {
    try waitingForLease(path, isInterrupted) { () throws(SystemCallError) in
        try FileDescriptor.open(path, access | O_NONBLOCK)
    }
}

/// The same for a file that has to be below a directory, when it is found as well as when it is opened.
/// - Parameter root: that directory, without symbolic links.
/// - Returns: nil for a file that is not there.
func openFile(
    _ path: String, _ access: Int32, below root: String, isInterrupted: () -> Bool = { false }
) throws(DiskImageError) -> FileDescriptor? {
    guard let file = resolved(path) else { throw .system(path: path, .last("open")) }
    // As bytes: names that Unicode takes for equal are others to the kernel.
    let start = (root == "/" ? root : root + "/").rawBytes, place = file.rawBytes
    guard place.starts(with: start) else { return nil }
    // Looked up again from the root, as what was found may have been replaced.
    let relative = String(raw: place.dropFirst(start.count))
    let top = try asking(path) { () throws(SystemCallError) in
        try FileDescriptor.open(root, CLINUX_O_PATH | O_DIRECTORY)
    }
    do throws(DiskImageError) {
        return try waitingForLease(path, isInterrupted) { () throws(SystemCallError) in
            try FileDescriptor.open(relative, below: top, access | O_NONBLOCK)
        }
    } catch {
        if case .system(_, let cause) = error, cause.errno == EXDEV { return nil }
        throw error
    }
}

/// Opens a regular file or a block device and locks it, as a reader or a writer does.
///
/// Nothing that is known of a file before the lock is held can be relied upon: another process may have changed it
/// until then, or have put another in its place. So what has the name now is the file that is locked, or it is opened
/// again; all else, its size first, is for the caller to ask for afterwards.
func openLocked(
    _ path: String, _ access: Int32, of image: (NamingImage, NamedFiles)? = nil, writable: Bool, locking: Bool = true,
    isInterrupted: () -> Bool = { false }
) throws(DiskImageError) -> FileDescriptor {
    for _ in 0..<maximumReplacements {
        let file =
            if let (image, rule) = image {
                try rule.open(path, access, of: image, isInterrupted: isInterrupted)
            } else {
                try openFile(path, access, isInterrupted: isInterrupted)
            }
        let status: stat
        do throws(SystemCallError) {
            try file.setNonBlocking(false)
            status = try file.status()
        } catch { throw .system(path: path, error) }
        let kind = status.st_mode & S_IFMT
        guard kind == S_IFREG || kind == S_IFBLK else { throw .notAFile(path: path) }
        guard locking else { return file }
        try lockImage(file, path: path, writable: writable)
        if ImageFile.Identity(ofPath: path) == ImageFile.Identity(status) { return file }
    }
    throw .locked(path: path, forWriting: true)
}

/// So often a file may be replaced between its opening and its lock: more would be a process that does nothing else.
private let maximumReplacements = 100

/// A process may have a lease on a file (fcntl(2)): the host's NFS or SMB server for a client, which has locks that no
/// other process sees yet. The kernel asks for it back, says EAGAIN so long, and takes it after `lease-break-time` (45
/// seconds, unless the host's administrator says otherwise).
private func waitingForLease(
    _ path: String, _ isInterrupted: () -> Bool, _ open: () throws(SystemCallError) -> FileDescriptor
) throws(DiskImageError) -> FileDescriptor {
    let nap: UInt32 = 10_000, longest = 90_000_000 / nap
    var naps: UInt32 = 0
    while true {
        do throws(SystemCallError) { return try open() } catch {
            guard error.errno == EAGAIN, naps < longest else { throw .system(path: path, error) }
        }
        if isInterrupted() { throw .openingInterrupted(path: path) }
        naps += 1
        usleep(nap)
    }
}

/// Opens an open file once more, with `O_DIRECT`.
func openDirectly(
    _ file: borrowing FileDescriptor, _ access: Int32, _ path: String
) throws(DiskImageError) -> FileDescriptor {
    do throws(SystemCallError) { return try FileDescriptor.open(file.path, access | CLINUX_O_DIRECT) } catch {
        throw .directUnavailable(path: path, error)
    }
}

/// A path without symbolic links, or nil when it leads nowhere (errno).
func resolved(_ path: String) -> String? {
    guard let text = path.withRawCString({ unsafe realpath($0, nil) }) else { return nil }
    defer { unsafe free(text) }
    // libc's own text, which ends in NUL.
    return unsafe String(raw: UnsafeBufferPointer(start: text, count: strlen(text)).map { UInt8(bitPattern: $0) })
}

extension DiskImage {
    /// That of a file.
    static func directory(of path: String) -> String {
        switch path.directoryLength {
        case 0: "."
        case 1: "/"
        case let length: String(decoding: path.utf8.prefix(length - 1), as: UTF8.self)
        }
    }

    /// The bytes of a path behind its last slash.
    static func name(of path: String) -> [UInt8] {
        String(decoding: path.utf8.dropFirst(path.directoryLength), as: UTF8.self).rawBytes
    }
}

extension String {
    /// Bytes of a path up to its last slash, and with it. To the kernel a slash is a byte; to Unicode it can be one
    /// character with what follows.
    fileprivate var directoryLength: Int {
        utf8.lastIndex(of: UInt8(ascii: "/")).map { utf8.distance(from: utf8.startIndex, to: $0) + 1 } ?? 0
    }

    /// A name as it is in the directory of a file.
    func beside(_ file: String) -> String {
        String(decoding: Array(file.utf8.prefix(file.directoryLength)) + utf8, as: UTF8.self)
    }
}

extension FileDescriptor {
    /// A path of the open file itself, whatever has become of its names.
    var path: String { "/proc/self/fd/\(rawValue)" }
}
