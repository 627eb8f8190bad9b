// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// One open file of an image: its descriptors and what was found out about it when it was opened.
struct ImageFile: ~Copyable, Sendable {
    /// What makes two paths the same file.
    struct Identity: Equatable, Sendable {
        let device: UInt64
        let inode: UInt64

        init(_ status: stat) {
            device = UInt64(status.st_dev)
            inode = UInt64(status.st_ino)
        }

        /// That of a remote disk, by a number that its address has.
        init(remote number: UInt64) {
            device = .max
            inode = number
        }

        /// Nil where nothing has the name.
        init?(ofPath path: String) {
            guard let status = fileStatus(ofPath: path) else { return nil }
            self.init(status)
        }
    }

    let path: String
    let identity: Identity
    /// Bytes when it was opened, or when they were last asked for.
    private(set) var size: UInt64
    /// A file, and no block device.
    let isRegular: Bool
    /// The file through the page cache. It carries the lock.
    let descriptor: FileDescriptor
    /// The same file with `O_DIRECT`, for what is aligned to ``directAlignment``.
    private let direct: FileDescriptor?
    private let directAlignment: UInt

    /// Indicates whether to try the page cache before a read bypasses it.
    let asksCacheFirst: Bool

    /// Opens a regular file or a block device, and locks it.
    init(path: String, writable: Bool, _ options: DiskImageOptions) throws(DiskImageError) {
        try self.init(path: path, of: nil, writable: writable, options)
    }

    /// The same for a file that an image names, which is where such files may be; or, without an image, the user.
    init(path: String, of image: NamingImage?, writable: Bool, _ options: DiskImageOptions) throws(DiskImageError) {
        try self.init(
            path: path, of: image.map { ($0, options.namedFiles) }, writable: writable, cache: options.cache,
            locking: options.locking,
            sparesCache: options.sparesCache, isInterrupted: options.isInterrupted)
    }

    init(
        path: String, of image: (NamingImage, NamedFiles)? = nil, writable: Bool, cache: CacheMode, locking: Bool,
        sparesCache: Bool = false,
        isInterrupted: () -> Bool = { false }
    ) throws(DiskImageError) {
        // Where a remote disk can be used, it was requested before.
        guard !NBDLocation.isAddress(path) else { throw .remoteNotPossible(path: path) }
        let access = writable ? O_RDWR : O_RDONLY
        // Its size, too, is read under the lock: another process may have made the file longer until then.
        let file = try openLocked(
            path, access, of: image, writable: writable, locking: locking, isInterrupted: isInterrupted)
        let (status, size) = try asking(path) { () throws(SystemCallError) in (try file.status(), try file.size()) }
        let kind = status.st_mode & S_IFMT
        let direct =
            try cache == .none
            ? openDirectly(file, access, path) : sparesCache ? try? openDirectly(file, access, path) : nil

        // 4 KiB satisfies every file system; a device reports its requirement.
        var sector: Int32 = 4096
        if kind == S_IFBLK { _ = try? file.ioctl(CLINUX_BLKSSZGET, &sector, named: "BLKSSZGET") }
        self.path = path
        identity = Identity(status)
        self.size = size
        isRegular = kind == S_IFREG
        asksCacheFirst = cache != .none && sparesCache
        descriptor = file
        self.direct = direct
        directAlignment = UInt(max(512, sector))
    }

    /// A file without a path, which no other process has open and which is not locked.
    /// - Parameter name: what messages call it.
    init(name: String, _ file: consuming FileDescriptor) throws(DiskImageError) {
        path = name
        let status = try asking(name) { () throws(SystemCallError) in try file.status() }
        identity = Identity(status)
        size = UInt64(clamping: status.st_size)
        isRegular = true
        descriptor = file
        direct = nil
        directAlignment = 512
        asksCacheFirst = false
    }

    /// What stands for a remote disk among the files of an image. Its descriptor is for nothing but to have a number.
    init(_ remote: NBDDisk) throws(DiskImageError) {
        path = remote.path
        // No file's; two names of one disk are two.
        var hash: UInt64 = 0xcbf2_9ce4_8422_2325
        for byte in remote.path.utf8 { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01b3 }
        identity = Identity(remote: hash)
        size = remote.export.size
        isRegular = false
        descriptor = try asking(remote.path) { () throws(SystemCallError) in
            try FileDescriptor.duplicate(of: remote.descriptor)
        }
        direct = nil
        directAlignment = 512
        asksCacheFirst = false
    }

    /// Asks again how long the file is.
    mutating func measure() throws(DiskImageError) {
        do { size = try descriptor.size() } catch { throw .system(path: path, error) }
    }

    /// Bytes that it takes on the host's disk.
    func allocated() throws(DiskImageError) -> UInt64 {
        // In units of 512 bytes, whatever the file system's blocks.
        do { return UInt64(clamping: try descriptor.status().st_blocks) << 9 } catch {
            throw .system(path: path, error)
        }
    }

    /// The descriptor for a transfer between `offset` and the memory of `vectors`.
    func number(for segments: IOSegments, offset: UInt64) -> Int32 { number(for: segments.bits, offset: offset) }

    /// The same for one piece of memory.
    func number(for memory: IOMemory, offset: UInt64) -> Int32 { number(for: memory.bits, offset: offset) }

    private func number(for bits: @autoclosure () -> UInt, offset: UInt64) -> Int32 {
        guard let number = directNumber else { return descriptor.rawValue }
        return (UInt(truncatingIfNeeded: offset) | bits()) & (directAlignment &- 1) == 0 ? number : descriptor.rawValue
    }

    /// Reads a range in full, as is needed when an image is opened.
    /// - Parameter what: what is read, for the error that the file ends before it does.
    func read(_ what: String, into buffer: IOMemory, at offset: UInt64) throws(DiskImageError) {
        let (end, overflow) = offset.addingReportingOverflow(UInt64(buffer.count))
        guard !overflow, end <= size else {
            throw .truncated(path: path, what: what, needed: overflow ? .max : end, size: size)
        }
        var done = 0
        while done < buffer.count {
            let got: Int
            do {
                // All of the piece's bytes.
                got = try unsafe descriptor.read(into: buffer.from(done).bytes, at: offset &+ UInt64(done))
            } catch {
                throw .system(path: path, error)
            }
            // It shrank since its size was asked.
            guard got > 0 else { throw .truncated(path: path, what: what, needed: end, size: offset &+ UInt64(done)) }
            done += got
        }
    }

    /// As above, into an array. `count` is bounded by the caller before it is an allocation here.
    func read(_ what: String, count: Int, at offset: UInt64) throws(DiskImageError) -> [UInt8] {
        guard UInt64(count) <= size else {
            throw .truncated(path: path, what: what, needed: offset &+ UInt64(count), size: size)
        }
        var bytes = [UInt8](repeating: 0, count: count)
        try bytes.withIOMemory { (memory) throws(DiskImageError) in try read(what, into: memory, at: offset) }
        return bytes
    }

    private var directNumber: Int32? {
        switch direct {
        case .some(let file): file.rawValue
        case nil: nil
        }
    }
}

func asking<Answer: ~Copyable>(
    _ path: String, _ body: () throws(SystemCallError) -> Answer
) throws(DiskImageError) -> Answer {
    do { return try body() } catch { throw .system(path: path, error) }
}
