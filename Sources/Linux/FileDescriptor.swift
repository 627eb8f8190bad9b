// SPDX-License-Identifier: Apache-2.0

public import CLinux
internal import Glibc

/// An open file, device or socket that belongs to its holder; closed when the value ends.
public struct FileDescriptor: ~Copyable, Sendable {
    /// The number, for calls that take one. It is valid while this value lives.
    public let rawValue: Int32

    /// Takes ownership of a descriptor, which nothing else may close.
    public init(owning rawValue: Int32) {
        self.rawValue = rawValue
    }

    deinit {
        // close's EINTR leaves the descriptor closed on Linux, so there is nothing to repeat.
        _ = close(rawValue)
    }

    /// Opens a path; `O_CLOEXEC` is always added.
    /// - Parameters:
    ///   - path: whose bytes, UTF-8 or not, are its ``Swift/String/rawBytes``.
    ///   - flags: `O_RDONLY`, `O_RDWR | O_CREAT`, …
    ///   - mode: permission bits of a file that is created, before the umask.
    public static func open(_ path: String, _ flags: Int32, mode: mode_t = 0) throws(SystemCallError) -> FileDescriptor
    {
        FileDescriptor(
            owning: try retryingInterrupts("open") {
                path.withRawCString { unsafe clinux_open($0, flags | O_CLOEXEC, mode) }
            })
    }

    /// The same for a path that stays below a directory: neither `..` nor symbolic links lead out of it (openat2(2),
    /// `RESOLVE_BENEATH`).
    /// - Throws: `EXDEV` when they would.
    public static func open(
        _ path: String, below directory: borrowing FileDescriptor, _ flags: Int32
    ) throws(SystemCallError) -> FileDescriptor {
        let number = directory.rawValue
        return FileDescriptor(
            owning: try retryingInterrupts("openat2") {
                path.withRawCString { unsafe clinux_open_below(number, $0, flags) }
            })
    }

    /// A second descriptor for the same open file.
    public func duplicate() throws(SystemCallError) -> FileDescriptor {
        FileDescriptor(owning: try retryingInterrupts("fcntl") { clinux_fcntl_value(rawValue, F_DUPFD_CLOEXEC, 0) })
    }

    /// A second descriptor for the open file of a descriptor that is not owned here, such as a standard stream.
    public static func duplicate(of number: Int32) throws(SystemCallError) -> FileDescriptor {
        FileDescriptor(owning: try retryingInterrupts("fcntl") { clinux_fcntl_value(number, F_DUPFD_CLOEXEC, 0) })
    }

    /// The type bits (`S_IFCHR`, `S_IFSOCK`, …) of what a number stands for, or nil when it is not open.
    public static func kind(of number: Int32) -> mode_t? {
        var status = stat()
        return unsafe fstat(number, &status) == 0 ? status.st_mode & S_IFMT : nil
    }

    /// Releases ownership of the number, without closing it.
    public consuming func release() -> Int32 {
        let number = rawValue
        discard self
        return number
    }

    /// Reads at most `buffer.count` bytes; 0 is the end of the file.
    /// - Throws: `EAGAIN` when the descriptor is non-blocking and nothing is there.
    public func read(into buffer: UnsafeMutableRawBufferPointer) throws(SystemCallError) -> Int {
        // The kernel writes within the buffer, whose validity the caller guarantees.
        try retryingInterrupts("read") { unsafe Glibc.read(rawValue, buffer.baseAddress, buffer.count) }
    }

    /// Writes at most `buffer.count` bytes and returns how many were accepted.
    public func write(_ buffer: UnsafeRawBufferPointer) throws(SystemCallError) -> Int {
        try retryingInterrupts("write") { unsafe Glibc.write(rawValue, buffer.baseAddress, buffer.count) }
    }

    /// Writes at most all of `bytes` in one call, and returns how many were accepted.
    /// - Throws: `EINTR` when a signal's handler has run before the first byte was taken.
    public func writeOnce(_ bytes: ArraySlice<UInt8>) throws(SystemCallError) -> Int {
        // The slice lives for the call.
        let taken = unsafe bytes.withUnsafeBytes { unsafe Glibc.write(rawValue, $0.baseAddress, $0.count) }
        if taken < 0 { throw .last("write") }
        return taken
    }

    /// Sends at most `buffer.count` bytes to a socket without waiting, whatever the socket's mode, and returns how many
    /// were taken.
    /// - Throws: `EAGAIN` when there is no room.
    public func sendNow(_ buffer: UnsafeRawBufferPointer) throws(SystemCallError) -> Int {
        try retryingInterrupts("send") {
            unsafe send(rawValue, buffer.baseAddress, buffer.count, Int32(MSG_DONTWAIT | MSG_NOSIGNAL))
        }
    }

    /// Reads at a position; 0 is the end of the file.
    public func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(SystemCallError) -> Int {
        try retryingInterrupts("pread") {
            unsafe pread(rawValue, buffer.baseAddress, buffer.count, off_t(truncatingIfNeeded: offset))
        }
    }

    /// Writes at a position and returns how many bytes were accepted.
    public func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(SystemCallError) -> Int {
        try retryingInterrupts("pwrite") {
            unsafe pwrite(rawValue, buffer.baseAddress, buffer.count, off_t(truncatingIfNeeded: offset))
        }
    }

    /// Writes all of `bytes`, in as many calls as it takes.
    public func writeAll(_ bytes: some Collection<UInt8>) throws(SystemCallError) {
        var rest = Array(bytes)[...]
        while !rest.isEmpty {
            let taken = try retryingInterrupts("write") {
                unsafe rest.withUnsafeBytes { unsafe Glibc.write(rawValue, $0.baseAddress, $0.count) }
            }
            rest = rest.dropFirst(taken)
        }
    }

    /// `ioctl` with an integer argument, or none.
    @discardableResult
    public func ioctl(_ request: UInt, _ value: UInt = 0, named call: String) throws(SystemCallError) -> Int32 {
        try retryingInterrupts(call) { clinux_ioctl_value(rawValue, request, value) }
    }

    /// `ioctl` with the address of a structure.
    @discardableResult
    public func ioctl<Argument>(
        _ request: UInt, _ argument: inout Argument, named call: String
    ) throws(SystemCallError) -> Int32 {
        // The request's number carries the size of the structure that the kernel expects; callers pair the two.
        try retryingInterrupts(call) {
            unsafe withUnsafeMutablePointer(to: &argument) { unsafe clinux_ioctl(rawValue, request, $0) }
        }
    }

    /// `ioctl` with the address of a structure that ends in an array.
    @discardableResult
    public func ioctl(
        _ request: UInt, buffer: UnsafeMutableRawPointer, named call: String
    ) throws(SystemCallError) -> Int32 {
        try retryingInterrupts(call) { unsafe clinux_ioctl(rawValue, request, buffer) }
    }

    /// Size in bytes of a regular file, or of a block device.
    public func size() throws(SystemCallError) -> UInt64 {
        let status = try self.status()
        guard status.st_mode & S_IFMT == S_IFBLK else { return UInt64(clamping: status.st_size) }
        var bytes: UInt64 = 0
        try ioctl(CLINUX_BLKGETSIZE64, &bytes, named: "BLKGETSIZE64")
        return bytes
    }

    /// Returns the result of `fstat`.
    public func status() throws(SystemCallError) -> stat {
        var status = stat()
        _ = try retryingInterrupts("fstat") { unsafe fstat(rawValue, &status) }
        return status
    }

    /// Switches `O_NONBLOCK`.
    public func setNonBlocking(_ on: Bool) throws(SystemCallError) {
        let flags = try retryingInterrupts("fcntl") { clinux_fcntl_value(rawValue, F_GETFL, 0) }
        let wanted = on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK
        _ = try retryingInterrupts("fcntl") { clinux_fcntl_value(rawValue, F_SETFL, Int(wanted)) }
    }
}

/// Reads a whole file, at most `limit` bytes of it.
/// - Throws: `EFBIG` when the file is longer than `limit`.
public func readFile(_ path: String, limit: Int) throws(SystemCallError) -> [UInt8] {
    try readFile(try FileDescriptor.open(path, O_RDONLY), limit: limit)
}

/// The same for a file that is open, from its beginning, whatever was read of it before; any thread.
public func readFile(_ file: borrowing FileDescriptor, limit: Int) throws(SystemCallError) -> [UInt8] {
    // The files of /proc come a page at a time, whatever room they are given, and most of them have less.
    var contents = [UInt8](repeating: 0, count: 4096)
    var count = 0
    while true {
        if count == contents.count { contents += [UInt8](repeating: 0, count: max(count, 60 << 10)) }
        let got = try retryingInterrupts("read") {
            // The room behind the bytes that are there already.
            unsafe contents.withUnsafeMutableBytes {
                unsafe Glibc.pread(file.rawValue, $0.baseAddress! + count, $0.count - count, off_t(count))
            }
        }
        count += got
        if count > limit { throw SystemCallError("read", errno: EFBIG) }
        if got == 0 {
            return Array(contents[..<count])
        }
    }
}

/// Reads what is left of an open file, which may be a pipe, at most `limit` bytes of it.
/// - Throws: `EFBIG` when there is more.
public func readStream(_ file: borrowing FileDescriptor, limit: Int) throws(SystemCallError) -> [UInt8] {
    var contents: [UInt8] = []
    var room = [UInt8](repeating: 0, count: 16 << 10)
    while true {
        let got = try retryingInterrupts("read") {
            // As many bytes as the array has room for.
            unsafe room.withUnsafeMutableBytes { unsafe Glibc.read(file.rawValue, $0.baseAddress, $0.count) }
        }
        if got == 0 { return contents }
        contents += room[..<got]
        if contents.count > limit { throw SystemCallError("read", errno: EFBIG) }
    }
}
