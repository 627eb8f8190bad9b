// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import DiskImage
internal import Glibc
internal import Linux
internal import Virtio

/// The file that gets metrics, and the thread that writes it: a thread that reports some never waits for a disk, or
/// for the reader of a pipe.
final class MetricsFile: Sendable {
    /// Texts that may wait for the file; more are dropped.
    private static let capacity = 4

    private let shared: Shared
    private let thread: Guarded<Thread?>

    /// - Parameter events: gets what the host refuses.
    init(_ target: consuming MetricsTarget, events: DeviceEvents) throws(SystemCallError) {
        let shared = Shared(target, events: events)
        self.shared = shared
        thread = Guarded(try Thread.start(name: "metrics") { shared.run() })
    }

    /// Has a text written. It does not wait.
    func write(_ text: String) { shared.add(Array(text.utf8), limit: Self.capacity) }

    /// Waits until all is written, but for no file that takes nothing for a second.
    func close() {
        guard let thread = thread.withLock({ $0.take() }) else { return }
        // A call that no signal interrupts, as on a file system whose server is gone, keeps its thread; the process's
        // end does not wait for it.
        if shared.close(waitingFor: 1000) { thread.join() } else { thread.detach() }
    }

    deinit { close() }

    private final class Shared: Sendable {
        private struct State {
            var texts: [[UInt8]] = []
            var isWriting = false
            var isClosing = false
            var hasEnded = false
        }

        private let target: MetricsTarget
        private let events: DeviceEvents
        private let monitor = Monitor()
        /// Changed within the monitor.
        private let state = Guarded(State())

        init(_ target: consuming MetricsTarget, events: DeviceEvents) {
            self.target = target
            self.events = events
        }

        func add(_ text: [UInt8], limit: Int) {
            let isTaken = monitor.locked {
                let isTaken = state.withLock { state in
                    guard state.texts.count < limit else { return false }
                    state.texts.append(text)
                    return true
                }
                monitor.broadcast()
                return isTaken
            }
            if !isTaken { report(EAGAIN, "reports were dropped: it accepts no more") }
        }

        /// - Returns: whether the thread has ended.
        func close(waitingFor milliseconds: Int) -> Bool {
            monitor.locked {
                state.withLock { $0.isClosing = true }
                monitor.broadcast()
                var turns = max(1, milliseconds / 10)
                while !state.withLock({ $0.hasEnded }), turns > 0 {
                    monitor.wait(milliseconds: 10)
                    turns -= 1
                }
                return state.withLock { $0.hasEnded }
            }
        }

        func run() {
            var isTorn = false
            while let text = next() {
                do throws(SystemCallError) { try write(text, &isTorn) } catch { report(error.errno, error.reason) }
            }
            monitor.locked {
                state.withLock { $0.hasEnded = true }
                monitor.broadcast()
            }
        }

        /// The next text; nil at the end.
        private func next() -> [UInt8]? {
            monitor.locked {
                while true {
                    let (text, isOver) = state.withLock { state -> ([UInt8]?, Bool) in
                        guard state.texts.isEmpty else { return (state.texts.removeFirst(), false) }
                        return (nil, state.isClosing)
                    }
                    if text != nil || isOver { return text }
                    monitor.wait()
                }
            }
        }

        /// - Parameter isTorn: what was written last is a part of a line.
        private func write(_ text: [UInt8], _ isTorn: inout Bool) throws(SystemCallError) {
            switch target.kind {
            case .replace(let replacement): try replacement.write(text)
            case .append:
                // A reader of lines finds the next one whole.
                var rest = (isTorn ? [UInt8(ascii: "\n")] : []) + text
                while !rest.isEmpty {
                    let taken = try writeSome(rest)
                    if taken > 0 { isTorn = rest[taken - 1] != UInt8(ascii: "\n") }
                    rest.removeFirst(taken)
                }
            }
        }

        private func writeSome(_ bytes: [UInt8]) throws(SystemCallError) -> Int {
            do throws(SystemCallError) { return try target.file.writeOnce(bytes[...]) } catch {
                guard error.errno == EINTR || error.errno == EAGAIN else { throw error }
                // A pipe whose reader is slow; the machine's end does not wait for it.
                if error.errno == EAGAIN, state.withLock({ $0.isClosing }) { throw error }
                var entry = pollfd(fd: target.file.rawValue, events: Int16(POLLOUT), revents: 0)
                // One entry, which the call fills.
                _ = unsafe poll(&entry, 1, 100)
                return 0
            }
        }

        private func report(_ error: Int32, _ reason: String) {
            events.report(
                .hostError(operation: 0, errno: error), .warning,
                "metrics cannot be written to \(target.path): \(reason)")
        }
    }
}

/// What metrics are written to, opened before the machine starts.
struct MetricsTarget: ~Copyable, Sendable {
    enum Kind: Sendable {
        case append
        case replace(Replacement)
    }

    let path: String
    /// The file, or the directory of a file that is replaced.
    let file: FileDescriptor
    let kind: Kind

    /// A file that gets lines at its end, or a pipe or character device. What they would destroy is refused: a block
    /// device, a file with other contents.
    static func appending(to path: String) throws(SystemCallError) -> MetricsTarget {
        // Non-blocking: neither the opening of a pipe nor a write waits for a reader.
        let flags = O_APPEND | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY
        let file: FileDescriptor
        do throws(SystemCallError) { file = try FileDescriptor.open(path, flags | O_WRONLY, mode: 0o600) } catch {
            guard error.errno == ENXIO else { throw error }
            // A pipe without a reader yet.
            file = try FileDescriptor.open(path, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY)
        }
        let kind = FileDescriptor.kind(of: file.rawValue)
        if kind == S_IFBLK { throw SystemCallError("open", errno: ENOTSUP) }
        // One that may be written but not read goes unseen.
        if kind == S_IFREG, let contents = try? FileDescriptor.open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK) {
            try checkContents(contents, beginning: "{")
        }
        return MetricsTarget(path: path, file: file, kind: .append)
    }

    /// A file that is replaced as a whole each time, so that a reader never sees a part. Only a regular file, or none,
    /// can be.
    static func replacing(_ path: String) throws(SystemCallError) -> MetricsTarget {
        let (directory, name) = split(path)
        guard !name.isEmpty, name != ".", name != ".." else { throw SystemCallError("open", errno: EISDIR) }
        let file = try FileDescriptor.open(directory, O_RDONLY | O_DIRECTORY)
        let replacement = Replacement(directory: file.rawValue, name: name)
        try replacement.check()
        return MetricsTarget(path: path, file: file, kind: .replace(replacement))
    }

    /// The file that takes the place of one that is replaced, while it is written.
    static func temporaryPath(_ path: String) -> String {
        let (directory, name) = split(path)
        return "\(directory)/\(temporaryName(name))"
    }

    /// Hidden, and without the suffix by which a collector finds its files.
    private static func temporaryName(_ name: String) -> String { ".\(name).swkvm" }

    private static func split(_ path: String) -> (directory: String, name: String) {
        let slash = path.lastIndex(of: "/")
        let directory = slash.map { $0 == path.startIndex ? "/" : String(path[..<$0]) } ?? "."
        return (directory, slash.map { String(path[path.index(after: $0)...]) } ?? path)
    }

    /// Refuses a file that is a disk of another process, or has something else than metrics.
    private static func checkContents(
        _ file: borrowing FileDescriptor, beginning: StaticString
    ) throws(SystemCallError) {
        if isImageInUse(file) { throw SystemCallError("open", errno: ETXTBSY) }
        let wanted = beginning.description.utf8
        var found = [UInt8](repeating: 0, count: wanted.count)
        let number = file.rawValue
        // The kernel writes within the array.
        let count = unsafe found.withUnsafeMutableBytes { unsafe pread(number, $0.baseAddress, $0.count, 0) }
        if count < 0 { throw .last("read") }
        if count > 0, !found.elementsEqual(wanted) { throw SystemCallError("open", errno: EEXIST) }
    }

    /// Replaces a file of a directory.
    struct Replacement: Sendable {
        /// A descriptor that is owned elsewhere.
        let directory: Int32
        let name: String

        private var temporaryName: String { MetricsTarget.temporaryName(name) }

        func write(_ bytes: [UInt8]) throws(SystemCallError) {
            let file = try create()
            do throws(SystemCallError) {
                var rest = bytes[...]
                while !rest.isEmpty { rest = rest.dropFirst(try file.writeOnce(rest)) }
                let renamed = temporaryName.withRawCString { from in
                    // Both strings end with a NUL and live for the call.
                    name.withRawCString { to in unsafe renameat(directory, from, directory, to) }
                }
                if renamed < 0 { throw SystemCallError.last("rename") }
            } catch {
                remove()
                throw error
            }
        }

        /// What is there is a regular file with metrics, and a file can be created beside it.
        func check() throws(SystemCallError) {
            var status = stat()
            let found = name.withRawCString { unsafe fstatat(directory, $0, &status, AT_SYMLINK_NOFOLLOW) }
            if found == 0, status.st_mode & S_IFMT != S_IFREG {
                let isDirectory = status.st_mode & S_IFMT == S_IFDIR, isLink = status.st_mode & S_IFMT == S_IFLNK
                throw SystemCallError("open", errno: isDirectory ? EISDIR : isLink ? ELOOP : ENOTSUP)
            }
            let number = name.withRawCString {
                unsafe openat(directory, $0, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)
            }
            if number >= 0 {
                try MetricsTarget.checkContents(FileDescriptor(owning: number), beginning: "# HELP swkvm_")
            }
            _ = try create()
            remove()
        }

        private func create() throws(SystemCallError) -> FileDescriptor {
            // One that a process left that was killed.
            remove()
            // Readable for the collector, which is another user; the umask may say otherwise.
            let number = temporaryName.withRawCString {
                unsafe openat(directory, $0, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0o644)
            }
            if number < 0 { throw SystemCallError.last("open") }
            return FileDescriptor(owning: number)
        }

        private func remove() { _ = temporaryName.withRawCString { unsafe unlinkat(directory, $0, 0) } }
    }
}
