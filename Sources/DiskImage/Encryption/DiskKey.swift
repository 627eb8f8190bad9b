// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// The source of a key.
public enum KeySource: Sendable, Equatable {
    /// A file's contents.
    case file(String)
    /// The rest of an open descriptor, which is closed afterwards.
    case descriptor(Int32)

    fileprivate var name: String {
        switch self {
        case .file(let path): path
        case .descriptor(let number): "descriptor \(number)"
        }
    }
}

/// The key of an encrypted image: a password, or, with legacy AES encryption, the key itself.
///
/// It is the exact bytes of a file; a newline at its end belongs to it, as with QEMU's `secret` objects.
public final class DiskKey: Sendable, Equatable {
    /// The most bytes of a key.
    public static let maximumSize = 1 << 20

    let password: SecretBytes
    /// As ``DiskImageOptions/isInterrupted``.
    private let isInterrupted: @Sendable () -> Bool
    /// Keys of disks that this one has opened, so that an image that is opened again, or by several threads, costs that once.
    private let opened = OpenedKeys()

    /// Reads a key, which may wait for a user to type it.
    /// - Parameter isInterrupted: as ``DiskImageOptions/isInterrupted``, for reading the key and for checking it.
    public init(_ source: KeySource, isInterrupted: @escaping @Sendable () -> Bool = { false }) throws(DiskImageError) {
        self.isInterrupted = isInterrupted
        switch source {
        case .file(let path):
            let file: FileDescriptor
            // A named pipe without a writer is waited for where its bytes are.
            do throws(DiskImageError) { file = try openFile(path, O_RDONLY, isInterrupted: isInterrupted) } catch {
                guard case .system(_, let cause) = error else { throw error }
                throw .key(source, reason: "\(cause)")
            }
            password = try Self.read(file, source, isInterrupted)
        case .descriptor(let number):
            let flags = fcntl(number, F_GETFD)
            guard flags >= 0 else { throw .key(source, reason: "it is not open") }
            // What was passed on has come through an exec; all that this process opens would not.
            guard flags & FD_CLOEXEC == 0 else {
                throw .key(source, reason: "it was not passed on by the parent process, or has already been read")
            }
            password = try Self.read(FileDescriptor(owning: number), source, isInterrupted)
        }
    }

    private static func read(
        _ file: borrowing FileDescriptor, _ source: KeySource, _ isInterrupted: () -> Bool
    ) throws(DiskImageError) -> SecretBytes {
        // Into memory of its own, as the size of a pipe's data is not known beforehand.
        var count = 0
        let room = try SecretBytes(maximumSize + 1, of: source.name) { (memory) throws(DiskImageError) in
            while count < memory.count {
                while !isReadable(file) { if isInterrupted() { throw .openingInterrupted(path: source.name) } }
                // The rest of the memory.
                let got = unsafe Glibc.read(file.rawValue, memory.from(count).start, memory.count - count)
                if got < 0, errno == EINTR || errno == EAGAIN { continue }
                if got < 0 { throw .key(source, reason: "\(SystemCallError.last("read"))") }
                if got == 0 { break }
                count += got
            }
        }
        guard count > 0 else { throw .key(source, reason: "it is empty") }
        guard count <= maximumSize else { throw .key(source, reason: "it has more than \(maximumSize) bytes") }
        return try SecretBytes(count, of: source.name) { memory in
            room.withBytes { memory.copy(from: $0.prefix(count)) }
        }
    }

    /// Waits for a key's bytes, or their end, for a tenth of a second.
    private static func isReadable(_ file: borrowing FileDescriptor) -> Bool {
        var entry = pollfd(fd: file.rawValue, events: Int16(POLLIN), revents: 0)
        // One entry of its own.
        return unsafe poll(&entry, 1, 100) != 0 && entry.revents != 0
    }

    /// Bytes of the caller's.
    init(_ bytes: [UInt8]) throws(DiskImageError) {
        isInterrupted = { false }
        password = try SecretBytes(bytes, of: "")
    }

    public static func == (left: DiskKey, right: DiskKey) -> Bool { left === right }

    /// The key of a LUKS disk.
    func unlock(
        _ header: LUKSHeader, path: String, material: (LUKSHeader.Slot) throws(DiskImageError) -> [UInt8]
    ) throws(DiskImageError) -> SecretBytes {
        try opened.key(of: header) { () throws(DiskImageError) in
            guard let key = try LUKSVolume.unlock(header, password, path: path, isInterrupted, material: material)
            else { throw .wrongKey(path: path) }
            return key
        }
    }

    /// The key of a disk with legacy AES: the first 16 bytes, or as many as there are with zeroes behind them.
    func legacyKey(path: String) throws(DiskImageError) -> SecretBytes {
        try SecretBytes(CipherSpecification.legacy.keySize, of: path) { memory in
            let count = min(memory.count, password.count)
            password.withBytes { memory.prefix(count).copy(from: $0) }
        }
    }
}

/// Keys of disks by the headers that they were found with.
private final class OpenedKeys: @unchecked Sendable {
    // Used within the monitor only: hence `Sendable`.
    private let monitor = Monitor()
    private var keys: [(header: LUKSHeader, key: SecretBytes)] = []

    func key(
        of header: LUKSHeader, _ make: () throws(DiskImageError) -> SecretBytes
    ) throws(DiskImageError) -> SecretBytes {
        try monitor.locked { () throws(DiskImageError) in
            if let known = keys.first(where: { $0.header == header }) { return known.key }
            let key = try make()
            keys.append((header, key))
            return key
        }
    }
}
