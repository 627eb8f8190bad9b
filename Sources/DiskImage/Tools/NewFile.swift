// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// A file that gets its name only when it is complete; or a block device or a remote disk, which is written in place.
///
/// Where the file system can, it has no name until then (`O_TMPFILE`), so that not even SIGKILL leaves anything behind;
/// elsewhere it has a random one beginning with a dot in the same directory, which goes when this value goes.
struct NewFile: ~Copyable {
    /// As the user gave it.
    let path: String
    let descriptor: FileDescriptor
    /// The same file with `O_DIRECT`.
    private let direct: FileDescriptor?
    private let directNumber: Int32?
    /// Bytes from which on a write goes around the page cache.
    private let smallestDirect: Int
    /// `path`, or where it leads to when that is replaced.
    private let target: String
    private var temporaryName: String?
    /// The file that is replaced, locked as by a writer.
    private let replaced: FileDescriptor?
    /// Which file that is, or which device is written.
    let replacedIdentity: ImageFile.Identity?
    /// Bytes of what is there already and keeps its size: a block device, a remote disk; nil for a file.
    let deviceSize: UInt64?
    /// The remote disk that it is. The descriptor is for nothing then.
    let remote: NBDDisk?

    /// Transfers that bypass the page cache are aligned to this many bytes, the most that any file system requires.
    private static let directAlignment: UInt64 = 4096

    /// - Parameters:
    ///   - replacing: whether the name may be that of a regular file that is not in use. It keeps its contents until
    ///     ``publish(durably:)``, and its owner and permissions for good.
    ///   - cache: ``ToolCache/none`` writes around the page cache what is aligned, ``ToolCache/automatic`` what is also
    ///     large, where that is possible.
    init(path: String, replacing: Bool, cache: ToolCache = .writeback) throws(DiskImageError) {
        guard !NBDLocation.isAddress(path) else { throw .remoteNotPossible(path: path) }
        var replaced: FileDescriptor?
        var target = path
        var deviceSize: UInt64?
        var mode: mode_t = 0o600
        var status = fileStatus(ofPath: path)
        if status == nil, let own = fileStatus(ofPath: path, followsLinks: false) {
            // A link whose target is missing: what it names is not what was requested. A file was made meanwhile.
            guard own.st_mode & S_IFMT != S_IFLNK else { throw .linkToNothing(path: path) }
            status = own
        }
        // Symbolic links are followed: the link stays, what it leads to is replaced.
        if let found = status {
            guard replacing else { throw .exists(path: path) }
            guard [S_IFREG, S_IFBLK].contains(found.st_mode & S_IFMT) else { throw .notAFile(path: path) }
            let old = try openLocked(path, O_RDWR, writable: true)
            // Of the one that is locked, which may be another by now.
            let locked = try creating(path) { () throws(SystemCallError) in try old.status() }
            if locked.st_mode & S_IFMT == S_IFBLK {
                deviceSize = try creating(path) { () throws(SystemCallError) in try old.size() }
            }
            status = locked
            target = resolved(path) ?? path
            mode = locked.st_mode & 0o777
            replaced = consume old
        }
        let made: Made
        do throws(SystemCallError) {
            // Of a device O_EXCL means that the host has no use for it itself: a mounted file system would be
            // destroyed.
            made =
                try deviceSize != nil
                ? Made(FileDescriptor.open(path, O_RDWR | O_EXCL)) : Made(beside: target, mode: mode)
        } catch {
            throw error.errno == EBUSY && deviceSize != nil ? .deviceInUse(path: path) : .system(path: path, error)
        }
        if let status, deviceSize == nil {
            // The mask may have taken permissions away; another's file stays theirs where we may give it.
            _ = fchmod(made.descriptor.rawValue, mode)
            _ = fchown(made.descriptor.rawValue, status.st_uid, status.st_gid)
        }
        switch cache {
        case .writeback: direct = nil
        case .none: direct = try openDirectly(made.descriptor, O_RDWR, path)
        case .automatic: direct = try? openDirectly(made.descriptor, O_RDWR, path)
        }
        // Disks are slow with small writes, which the cache gathers.
        smallestDirect = cache == .none ? 0 : 128 << 10
        directNumber = number(of: direct)
        self.path = path
        self.target = target
        self.replaced = replaced
        replacedIdentity = status.map(ImageFile.Identity.init)
        self.deviceSize = deviceSize
        remote = nil
        temporaryName = made.name
        descriptor = made.take()
    }

    /// A remote disk: its server makes and keeps it, its contents are replaced.
    init(remote path: String, replacing: Bool) throws(DiskImageError) {
        guard replacing else { throw .exists(path: path) }
        let disk = try NBDDisk(path: path)
        guard !disk.export.isReadOnly else { throw .remoteReadOnly(path: path) }
        descriptor = try creating(path) { () throws(SystemCallError) in
            try FileDescriptor.duplicate(of: disk.descriptor)
        }
        direct = nil
        directNumber = nil
        smallestDirect = 0
        replaced = nil
        replacedIdentity = nil
        self.path = path
        target = path
        deviceSize = disk.export.size
        remote = disk
    }

    deinit {
        if let temporaryName { removeName(temporaryName) }
    }

    /// Gives the file its name. After an error it has none.
    /// - Parameter durably: when this returns, neither contents nor name can be lost to a power failure. What replaces
    ///   a file is always durable before, so that one of the two is there.
    mutating func publish(durably: Bool) throws(DiskImageError) {
        guard remote == nil else { return }
        let isReplacing = replacedIdentity != nil && deviceSize == nil
        if durably || isReplacing, fsync(descriptor.rawValue) < 0 { throw .system(path: path, .last("fsync")) }
        guard deviceSize == nil else { return }
        do throws(SystemCallError) {
            if temporaryName == nil, !isReplacing {
                try Made.link(descriptor, target)
            } else {
                // Only a named file can take the place of another.
                if temporaryName == nil { temporaryName = try Made.linkBeside(descriptor, target) }
                if let name = temporaryName {
                    let result = name.withRawCString { name in
                        target.withRawCString { target in
                            unsafe isReplacing ? rename(name, target) : clinux_rename_new(name, target)
                        }
                    }
                    if result < 0 { throw .last("rename") }
                }
                temporaryName = nil
            }
        } catch {
            if error.errno == EEXIST { throw .exists(path: path) }
            throw .system(path: path, error)
        }
        guard durably, let parent = try? FileDescriptor.open(DiskImage.directory(of: target), O_RDONLY) else { return }
        if fsync(parent.rawValue) < 0 { throw .system(path: path, .last("fsync")) }
    }

    // MARK: - Writing

    /// Writes all of a buffer, from any thread.
    func write(_ bytes: IOMemory, at offset: UInt64) throws(DiskImageError) {
        if let remote { return try remote.write(bytes, at: offset) }
        var number = descriptor.rawValue
        if let directNumber, bytes.count >= smallestDirect,
            (UInt64(bytes.bits) | offset) & (Self.directAlignment - 1) == 0
        {
            number = directNumber
        }
        do throws(MetadataError) {
            try MetadataFile(calls: .host, number: number).write(bytes, at: offset)
        } catch {
            if case .failed(let code) = error { throw .system(path: path, SystemCallError("pwrite", errno: code)) }
        }
    }

    func write(_ bytes: [UInt8], at offset: UInt64) throws(DiskImageError) {
        try bytes.withReadableIOMemory { (memory) throws(DiskImageError) in try write(memory, at: offset) }
    }

    /// Makes a range read as zeroes, in whatever way costs least.
    func clear(_ offset: UInt64, _ length: UInt64) throws(DiskImageError) {
        if let remote { return try remote.clear(offset, length) }
        let mode = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
        if clinux_fallocate(
            descriptor.rawValue, mode, off_t(truncatingIfNeeded: offset), off_t(truncatingIfNeeded: length)) == 0
        {
            return
        }
        try writeZeroes(offset, length)
    }

    func setSize(_ size: UInt64) throws(DiskImageError) {
        if ftruncate(descriptor.rawValue, off_t(truncatingIfNeeded: size)) < 0 {
            throw .system(path: path, .last("ftruncate"))
        }
    }

    /// Has the file system reserve space for a range, which reads as zeroes where it holds nothing yet.
    func reserve(_ offset: UInt64, _ length: UInt64) throws(DiskImageError) {
        guard length > 0 else { return }
        while clinux_fallocate(
            descriptor.rawValue, 0, off_t(truncatingIfNeeded: offset), off_t(truncatingIfNeeded: length)) < 0
        {
            if errno != EINTR { throw .system(path: path, .last("fallocate")) }
        }
    }

    /// Writes zeroes as data.
    /// - Parameter cipher: what encrypts them first, if anything does; the range is whole sectors then.
    func writeZeroes(_ offset: UInt64, _ length: UInt64, _ cipher: borrowing SectorCipher? = nil) throws(DiskImageError)
    {
        var zeroes = [UInt8](repeating: 0, count: Int(min(length, 1 << 20)))
        var done: UInt64 = 0
        while done < length {
            let piece = min(length - done, UInt64(zeroes.count))
            cipher?.encryptZeroes(&zeroes, place: offset + done)
            try write(piece == zeroes.count ? zeroes : Array(zeroes.prefix(Int(piece))), at: offset + done)
            done += piece
        }
    }
}

/// A new file as it was made: without a name, or with a temporary one.
private struct Made: ~Copyable {
    let descriptor: FileDescriptor
    let name: String?

    init(beside target: String, mode: mode_t) throws(SystemCallError) {
        if let file = try? FileDescriptor.open(DiskImage.directory(of: target), CLINUX_O_TMPFILE | O_RDWR, mode: mode),
            // A string for as long as the call lasts.
            unsafe access(file.path, F_OK) == 0
        {
            descriptor = file
            name = nil
            return
        }
        while true {
            let name = Self.temporaryName(beside: target)
            do throws(SystemCallError) {
                descriptor = try FileDescriptor.open(name, O_RDWR | O_CREAT | O_EXCL, mode: mode)
                self.name = name
                return
            } catch {
                if error.errno != EEXIST { throw error }
            }
        }
    }

    /// What is there already.
    init(_ file: consuming FileDescriptor) {
        descriptor = file
        name = nil
    }

    consuming func take() -> FileDescriptor { descriptor }

    /// Gives an unnamed file a name that is not in use.
    static func link(_ file: borrowing FileDescriptor, _ name: String) throws(SystemCallError) {
        let source = file.path
        if name.withRawCString({ unsafe linkat(AT_FDCWD, source, AT_FDCWD, $0, AT_SYMLINK_FOLLOW) }) < 0 {
            throw .last("linkat")
        }
    }

    static func linkBeside(_ file: borrowing FileDescriptor, _ target: String) throws(SystemCallError) -> String {
        while true {
            let name = temporaryName(beside: target)
            do throws(SystemCallError) {
                try link(file, name)
                return name
            } catch {
                if error.errno != EEXIST { throw error }
            }
        }
    }

    private static func temporaryName(beside target: String) -> String {
        DiskImage.directory(of: target) + "/.swkvm-" + String(UInt64.random(in: 0 ... .max), radix: 36)
    }
}

private func number(of file: borrowing FileDescriptor?) -> Int32? {
    switch file {
    case .some(let file): file.rawValue
    case nil: nil
    }
}

private func creating<Answer: ~Copyable>(
    _ path: String, _ body: () throws(SystemCallError) -> Answer
) throws(DiskImageError) -> Answer {
    do { return try body() } catch { throw .system(path: path, error) }
}
