// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Synchronization

/// A file with a process's number that the process keeps locked for as long as it runs.
///
/// The lock, not the number, tells whether the process runs: the kernel releases it however the process ends, so a file
/// that a crash has left behind misleads nobody. It is a record lock of fcntl(2), of which the kernel knows the owner;
/// a forked process does not inherit it.
public final class ProcessFile: Sendable {
    /// Why there is no such file for this process.
    public enum Refusal: Error, Equatable {
        /// That process has it; 0 if the process is not visible from here.
        case taken(process: Int32)
        /// There is a file with other contents than a process's number, which is not replaced.
        case foreign
        case system(SystemCallError)
    }

    private let descriptor: FileDescriptor
    /// The file's directory, for another process that removes the file.
    public let directory: FileDescriptor
    private let name: String
    private let device: dev_t
    private let inode: ino_t
    private let isDelegated = Atomic<Bool>(false)

    /// Creates the file, readable by its owner only, and writes this process's number to it. One that no process has
    /// locked is replaced if it is empty or has a number: the end of the process that left it may still be about to
    /// remove that one.
    public init(_ path: String) throws(Refusal) {
        let parts = path.directoryAndName
        let place: FileDescriptor
        do throws(SystemCallError) {
            place = try FileDescriptor.open(parts.directory, CLINUX_O_PATH | O_DIRECTORY)
        } catch { throw .system(error) }
        let file = try Self.lockNew(path, in: place, parts.name)
        do throws(SystemCallError) {
            let status = try file.status()
            (device, inode) = (status.st_dev, status.st_ino)
            try file.writeAll(Array("\(getpid())\n".utf8))
        } catch { throw .system(error) }
        directory = place
        name = parts.name
        descriptor = file
    }

    /// Creates and locks a file that the name leads to when both is done: another process may do the same meanwhile.
    private static func lockNew(
        _ path: String, in directory: borrowing FileDescriptor, _ name: String
    ) throws(Refusal) -> FileDescriptor {
        // A symbolic link is not followed: the directory may be one where others can create files.
        let flags = O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY
        for _ in 0..<100 {
            do throws(SystemCallError) {
                let new = try FileDescriptor.open(path, flags | O_CREAT | O_EXCL, mode: 0o600)
                if try lock(new, in: directory, name) { return new }
            } catch {
                guard error.errno == EEXIST else { throw refusal(error) }
            }
            do throws(SystemCallError) {
                let old = try FileDescriptor.open(path, flags)
                guard FileDescriptor.kind(of: old.rawValue) == S_IFREG else {
                    throw SystemCallError("open", errno: EEXIST)
                }
                guard try lock(old, in: directory, name) else { continue }
                guard try hasNumber(old) else { throw SystemCallError("open", errno: ENOTUNIQ) }
                if name.withRawCString({ unsafe unlinkat(directory.rawValue, $0, 0) }) < 0 { throw .last("unlinkat") }
            } catch {
                guard error.errno == ENOENT else { throw refusal(error) }
            }
        }
        throw .taken(process: 0)
    }

    /// Locks a file.
    /// - Returns: whether the name still leads to it.
    /// - Throws: `EAGAIN` if another process has locked it; `call` is its number.
    private static func lock(
        _ file: borrowing FileDescriptor, in directory: borrowing FileDescriptor, _ name: String
    ) throws(SystemCallError) -> Bool {
        guard clinux_lock_process_file(file.rawValue) == 0 else {
            let error = SystemCallError.last("fcntl")
            guard error.errno == EAGAIN || error.errno == EACCES else { throw error }
            throw SystemCallError("\(max(0, clinux_process_file_owner(file.rawValue)))", errno: EAGAIN)
        }
        var named = stat()
        let number = directory.rawValue
        // It writes no more than the structure.
        let found = name.withRawCString { unsafe fstatat(number, $0, &named, AT_SYMLINK_NOFOLLOW) }
        let own = try file.status()
        return found == 0 && own.st_ino == named.st_ino && own.st_dev == named.st_dev
    }

    /// Indicates whether a file is empty, or has a line with a process's number, as a process that was killed leaves
    /// it.
    private static func hasNumber(_ file: borrowing FileDescriptor) throws(SystemCallError) -> Bool {
        guard try file.size() < 16 else { return false }
        var line = try readFile(file, limit: 16)
        if line.last == UInt8(ascii: "\n") { line.removeLast() }
        return line.allSatisfy { (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) }
    }

    private static func refusal(_ error: SystemCallError) -> Refusal {
        switch error.errno {
        case EAGAIN: .taken(process: Int32(error.call) ?? 0)
        case ENOTUNIQ: .foreign
        default: .system(error)
        }
    }

    /// Leaves it to another process to remove the file, which calls ``removeName()``.
    public func delegateRemoval() { isDelegated.store(true, ordering: .relaxed) }

    /// Removes the file's name if it still leads to the file. Called by another process, or at the end of this one.
    public func removeName() {
        var named = stat()
        // It writes no more than the structure.
        let found = name.withRawCString { unsafe fstatat(directory.rawValue, $0, &named, AT_SYMLINK_NOFOLLOW) }
        guard found == 0, named.st_ino == inode, named.st_dev == device else { return }
        _ = name.withRawCString { unsafe unlinkat(directory.rawValue, $0, 0) }
    }

    // The name first: a process that creates the file anew has another file.
    deinit { if !isDelegated.load(ordering: .relaxed) { removeName() } }

    /// The process that has locked such a file; nil if none has.
    /// - Throws: when the file is there and cannot be opened; `ESRCH` of `fcntl` when a process has locked it that has
    ///   no number here: one of another PID namespace, or of another host that shares the file system.
    public static func owner(_ path: String) throws(SystemCallError) -> RunningProcess? {
        let file: FileDescriptor
        do throws(SystemCallError) { file = try FileDescriptor.open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY) } catch {
            guard error.errno == ENOENT || error.errno == ENOTDIR else { throw error }
            return nil
        }
        // The process may end, and its number be used again, until the descriptor of it is there: then it no longer
        // has the lock.
        for _ in 0..<3 {
            let number = clinux_process_file_owner(file.rawValue)
            guard number != 0 else { return nil }
            guard number > 0 else { throw .last("fcntl") }
            let descriptor = clinux_pidfd_open(number)
            guard descriptor >= 0 else {
                if errno == ESRCH { continue }
                throw .last("pidfd_open")
            }
            let process = RunningProcess(number: number, descriptor: FileDescriptor(owning: descriptor))
            if clinux_process_file_owner(file.rawValue) == number { return process }
        }
        return nil
    }
}

/// A process that cannot be confused with a later one of the same number.
public struct RunningProcess: ~Copyable, Sendable {
    public let number: Int32
    private let descriptor: FileDescriptor

    fileprivate init(number: Int32, descriptor: consuming FileDescriptor) {
        self.number = number
        self.descriptor = descriptor
    }

    /// - Throws: `ESRCH` after its end, `EPERM` for another user's.
    public func send(signal: Int32) throws(SystemCallError) {
        guard clinux_pidfd_send_signal(descriptor.rawValue, signal) == 0 else { throw .last("pidfd_send_signal") }
    }

    /// Waits for its end.
    /// - Parameter milliseconds: -1 waits without a limit.
    /// - Returns: whether it has ended.
    public func waitForEnd(milliseconds: Int32) -> Bool {
        let end = TimerFD.now &+ UInt64(max(0, milliseconds))
        while true {
            let now = TimerFD.now
            let left = milliseconds < 0 ? -1 : Int32(clamping: end > now ? end - now : 0)
            var entry = pollfd(fd: descriptor.rawValue, events: Int16(POLLIN), revents: 0)
            // One entry.
            let count = unsafe poll(&entry, 1, left)
            if count > 0 { return true }
            guard count < 0, errno == EINTR else { return false }
        }
    }
}

extension String {
    /// A path's directory, as `.` if it has none, and the name in it.
    package var directoryAndName: (directory: String, name: String) {
        guard let slash = utf8.lastIndex(of: UInt8(ascii: "/")) else { return (".", self) }
        let name = utf8.index(after: slash)
        return (String(self[..<name]), String(self[name...]))
    }
}

/// A process that goes on in the background, of which the one that started it has not ended yet.
public struct BackgroundStart: ~Copyable {
    private let descriptor: FileDescriptor

    /// Forks, and goes on in the child: in a session of its own, with a file as standard output and error. The process
    /// that was called waits until ``finish()`` or the child's end, prints what the child has added to the file, and
    /// ends with status 0, or with the child's.
    /// - Precondition: there is no other thread.
    public init(messages: borrowing FileDescriptor) throws(SystemCallError) {
        let number = clinux_detach(messages.rawValue)
        guard number >= 0 else { throw .last("fork") }
        descriptor = FileDescriptor(owning: number)
    }

    /// Lets the other process end.
    /// - Returns: false when it has ended before: its user did not want to wait, and nobody knows of this process.
    public consuming func finish() -> Bool { (try? descriptor.writeAll([1])) != nil }
}
