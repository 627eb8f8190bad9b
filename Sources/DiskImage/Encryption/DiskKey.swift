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

    fileprivate var sentenceName: String {
        switch self {
        case .file(let path): "the key from \(quoted(path))"
        case .descriptor(let number): "the key from descriptor \(number)"
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
    /// Where it was read, and which file that is; nil for a caller's bytes.
    private let file: (name: String, identity: ImageFile.Identity)?
    /// As ``DiskImageOptions/isInterrupted``.
    private let isInterrupted: @Sendable () -> Bool
    /// Keys of disks that this one has opened, so that an image that is opened again, or by several threads, costs that
    /// once.
    private let opened = OpenedKeys()

    /// Reads a key, which may wait for a user to type it.
    /// - Parameters:
    ///   - isInterrupted: as ``DiskImageOptions/isInterrupted``, for reading the key and for checking it.
    ///   - report: hears once, in a sentence, that nothing has come for about a second.
    public init(
        _ source: KeySource, isInterrupted: @escaping @Sendable () -> Bool = { false },
        report: ((String) -> Void)? = nil
    ) throws(DiskImageError) {
        self.isInterrupted = isInterrupted
        switch source {
        case .file(let path):
            let file: FileDescriptor
            // A named pipe without a writer is waited for where its bytes are.
            do throws(DiskImageError) { file = try openFile(path, O_RDONLY, isInterrupted: isInterrupted) } catch {
                guard case .system(_, let cause) = error else { throw error }
                throw .key(source, reason: "\(cause)")
            }
            (password, self.file) = try Self.read(file, source, isInterrupted, report)
        case .descriptor(let number):
            // The next file that is opened would have the number, and get what is written there: a disk would.
            guard number != STDOUT_FILENO, number != STDERR_FILENO else {
                throw .key(source, reason: "standard output and standard error cannot be a key's")
            }
            let flags = fcntl(number, F_GETFD)
            guard flags >= 0 else { throw .key(source, reason: "it is not open") }
            // What was passed on has come through an exec; all that this process opens would not.
            guard flags & FD_CLOEXEC == 0 else {
                throw .key(source, reason: "it was not passed on by the parent process, or has already been read")
            }
            guard fcntl(number, F_GETFL) & O_ACCMODE != O_WRONLY else {
                throw .key(source, reason: "it is not open for reading")
            }
            let descriptor =
                number == STDIN_FILENO ? try Self.takeStandardInput(source) : FileDescriptor(owning: number)
            (password, file) = try Self.read(descriptor, source, isInterrupted, report)
        }
    }

    /// Standard input, whose number stays in use: `/dev/null` has it from now on.
    private static func takeStandardInput(_ source: KeySource) throws(DiskImageError) -> FileDescriptor {
        do throws(SystemCallError) {
            let input = try FileDescriptor.duplicate(of: STDIN_FILENO)
            let null = try FileDescriptor.open("/dev/null", O_RDONLY)
            guard dup2(null.rawValue, STDIN_FILENO) >= 0 else { throw .last("dup2") }
            return input
        } catch { throw .key(source, reason: "\(error)") }
    }

    private static func read(
        _ file: borrowing FileDescriptor, _ source: KeySource, _ isInterrupted: () -> Bool,
        _ report: ((String) -> Void)?
    ) throws(DiskImageError) -> (SecretBytes, (name: String, identity: ImageFile.Identity)) {
        let status = try asking(source.name) { () throws(SystemCallError) in try file.status() }
        // Into memory of its own, as the size of a pipe's data is not known beforehand.
        var count = 0
        // Tenths of a second, up to what is reported.
        var waited = 0
        let room = try SecretBytes(maximumSize + 1, of: source.name) { (memory) throws(DiskImageError) in
            while count < memory.count {
                while !isReadable(file) {
                    if isInterrupted() { throw .openingInterrupted(path: source.name) }
                    waited += 1
                    if waited == 10 { report?("waiting for \(source.sentenceName), or its end") }
                }
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
        let password = try SecretBytes(count, of: source.name) { memory in
            room.withBytes { memory.copy(from: $0.prefix(count)) }
        }
        return (password, (source.name, ImageFile.Identity(status)))
    }

    /// Refuses to replace the file of a key by an image: nothing could be read with the key afterwards.
    static func check(_ target: String, isNoFileOf keys: [DiskKey]) throws(DiskImageError) {
        guard let identity = ImageFile.Identity(ofPath: target) else { return }
        for key in keys {
            guard let file = key.file, file.identity == identity else { continue }
            throw .impossible(path: target, reason: "it is the file of the key \(quoted(file.name))")
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
        file = nil
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
