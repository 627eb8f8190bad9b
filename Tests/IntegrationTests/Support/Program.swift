// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import Testing

/// A process that a test has started. What it prints is read only while the test waits for something, so a test that
/// does not wait is a slow reader. It never outlives its object.
final class Program {
    /// Where a standard stream of the process goes.
    enum Stream {
        /// A pipe to the test.
        case pipe
        case null
        /// Not open at all.
        case closed
        /// A descriptor of the test's, which stays the test's.
        case descriptor(Int32)
        case file(String, Int32)
    }

    /// How a process ended.
    enum End: Equatable {
        case status(Int32)
        case signal(Int32)
    }

    let name: String
    let pid: pid_t
    /// What was read so far.
    private(set) var output = Transcript()
    private(set) var errors = Transcript()
    private var end: End?
    private var usage = rusage()
    private let hasTerminal: Bool
    private var input: FileDescriptor?
    private var outputEnd: FileDescriptor?
    private var errorEnd: FileDescriptor?

    /// A process that has gone is an error of `write`, not the end of all tests.
    private static let brokenPipes: Void = { signal(SIGPIPE, SIG_IGN) }()

    /// No test may hang. The limit is for a machine that is busy with other things.
    static let patience = 90

    /// Starts `arguments[0]`, which is searched in PATH.
    /// - Parameters:
    ///   - namespace: the network namespace to start it in.
    ///   - passing: the test's descriptors that the process gets, and under which numbers.
    ///   - terminal: becomes all three standard streams and the controlling terminal; the streams named are ignored.
    init(
        _ arguments: [String], input: Stream = .null, output: Stream = .pipe, errors: Stream = .pipe,
        in namespace: Namespace? = nil,
        passing: [(descriptor: Int32, number: Int32)] = [], terminal: PseudoTerminal? = nil
    ) throws {
        name = arguments.joined(separator: " ")
        hasTerminal = terminal != nil
        _ = Self.brokenPipes
        var plan = Plan()
        if let terminal {
            plan.isSessionLeader = true
            // The first terminal that a session leader opens becomes its controlling terminal.
            for number in Int32(0)...2 { plan.open(terminal.path, O_RDWR, as: number) }
            self.input = try terminal.master.duplicate()
            outputEnd = try terminal.master.duplicate()
        } else {
            self.input = try plan.connect(input, as: 0)
            outputEnd = try plan.connect(output, as: 1)
            errorEnd = try plan.connect(errors, as: 2)
        }
        for (descriptor, number) in passing { plan.duplicate(descriptor, as: number) }
        // Its own copy of the plan goes to the thread in the namespace; the plan keeps the descriptors open until the
        // process has them.
        let start = { [plan] () throws -> pid_t in try plan.start(arguments) }
        pid = try namespace.map { try $0.run(start) } ?? start()
        for end in [outputEnd?.rawValue, errorEnd?.rawValue] { if let end { try Self.setNonBlocking(end) } }
    }

    deinit {
        guard end == nil else { return }
        kill(pid, SIGKILL)
        waitpid(pid, nil, 0)
    }

    // MARK: Talking

    /// Types into the process's standard input, reading its output meanwhile.
    func type(_ text: String) throws {
        var rest = Array(text.utf8)[...]
        guard let number = input?.rawValue else { throw TestFailure("\(name) has no input to type into") }
        try Self.setNonBlocking(number)
        try pump("to take its input", whileWriting: number) {
            while !rest.isEmpty {
                let taken = rest.withUnsafeBytes { write(number, $0.baseAddress, $0.count) }
                if taken < 0 { return errno != EAGAIN }
                rest = rest.dropFirst(taken)
            }
            return true
        }
        if !rest.isEmpty { throw TestFailure("\(name) did not take its input; \(story)") }
    }

    /// The end of its input.
    func closeInput() { input = nil }

    /// Waits until the process has printed `text` once more.
    func wait(for text: String) throws {
        try pump("to print \"\(text)\"") { output.advance(past: text) }
    }

    /// The same on its standard error.
    func waitForError(_ text: String) throws {
        try pump("to say \"\(text)\"") { errors.advance(past: text) }
    }

    /// Waits until the machine has a vCPU; a signal before that ends the process as it would any other.
    func waitUntilRunning() throws {
        let name = Array("vcpu0\n".utf8)
        try pump("to run") { (try? threads().contains { $0.name == name }) == true }
    }

    /// The ID of its thread of that name, as the kernel has it.
    func thread(named name: String) throws -> pid_t {
        let wanted = Array("\(name)\n".utf8)
        guard let thread = try threads().first(where: { $0.name == wanted }) else {
            throw TestFailure("\(self.name) has no thread \(name); \(story)")
        }
        return thread.number
    }

    private func threads() throws -> [(number: pid_t, name: [UInt8])] {
        guard let directory = opendir("/proc/\(pid)/task") else { return [] }
        defer { closedir(directory) }
        var threads: [(number: pid_t, name: [UInt8])] = []
        while let entry = readdir(directory) {
            let number = withUnsafePointer(to: &entry.pointee.d_name) {
                $0.withMemoryRebound(to: CChar.self, capacity: 256) { atoi($0) }
            }
            if number > 0 { threads.append((number, try readFile("/proc/\(pid)/task/\(number)/comm", limit: 64))) }
        }
        return threads
    }

    func send(signal: Int32) { kill(pid, signal) }

    /// Waits for the end of the process and of what it prints; a terminal outlives it.
    @discardableResult
    func waitForEnd() throws -> End {
        try pump("to end") { (hasTerminal || outputEnd == nil && errorEnd == nil) && reap() }
        readAll()
        // No test has a machine make a call that its list lacks.
        for line in errors.lines + output.lines where line.contains("sandbox: the thread") {
            Issue.record("\(name): \(line)")
        }
        return try required(end)
    }

    /// The same when another process may still hold its streams.
    @discardableResult
    func waitForExit() throws -> End {
        try pump("to end") { reap() }
        return try required(end)
    }

    /// Whether it has not ended yet.
    var isRunning: Bool { !reap() }

    /// Seconds of CPU time that all its threads have taken so far, those of the kernel that do its I/O too.
    var processorTime: Double {
        get throws {
            if reap() {
                return [usage.ru_utime, usage.ru_stime].reduce(0) { $0 + Double($1.tv_sec) + Double($1.tv_usec) / 1e6 }
            }
            var clock: clockid_t = 0, time = timespec()
            guard clock_getcpuclockid(pid, &clock) == 0, clock_gettime(clock, &time) == 0 else {
                throw TestFailure("no CPU clock of \(name)")
            }
            return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
        }
    }

    /// Everything that is known, for a failure's text.
    var story: String {
        "\(name) printed:\n\(output.tail)\nand on standard error:\n\(errors.tail)\nand \(end.map { "ended with \($0)" } ?? "has not ended")"
    }

    // MARK: Reading

    private func reap() -> Bool {
        if end != nil { return true }
        var status: Int32 = 0
        guard wait4(pid, &status, WNOHANG, &usage) == pid else { return false }
        end =
            clinux_wait_exited(status) != 0 ? .status(clinux_wait_status(status)) : .signal(clinux_wait_signal(status))
        return true
    }

    /// Reads what there is until `isDone`. When the limit is over, or nothing more can come, it is a failure.
    private func pump(_ purpose: String, whileWriting writing: Int32? = nil, until isDone: () -> Bool) throws {
        let limit = ContinuousClock.now + .seconds(Self.patience)
        while true {
            readAll()
            if isDone() { return }
            let isQuiet = outputEnd == nil && errorEnd == nil
            if isQuiet, reap(), !isDone() { throw TestFailure("\(name) was expected \(purpose); \(story)") }
            if ContinuousClock.now > limit {
                kill(pid, SIGKILL)
                throw TestFailure("\(name) was expected \(purpose) within \(Self.patience) seconds; \(story)")
            }
            var entries = [outputEnd?.rawValue, errorEnd?.rawValue].compactMap { $0 }.map {
                pollfd(fd: $0, events: Int16(POLLIN), revents: 0)
            }
            if let writing { entries.append(pollfd(fd: writing, events: Int16(POLLOUT), revents: 0)) }
            // The end of a process that has closed its streams is not an event of theirs.
            poll(&entries, nfds_t(entries.count), 20)
        }
    }

    private func readAll() {
        if let number = outputEnd?.rawValue, !output.read(from: number) { outputEnd = nil }
        if let number = errorEnd?.rawValue, !errors.read(from: number) { errorEnd = nil }
    }

    private func required(_ end: End?) throws -> End {
        guard let end else { throw TestFailure("\(name) has not ended") }
        return end
    }

    private static func setNonBlocking(_ number: Int32) throws {
        let flags = clinux_fcntl_value(number, F_GETFL, 0)
        guard flags >= 0, clinux_fcntl_value(number, F_SETFL, Int(flags | O_NONBLOCK)) >= 0 else {
            throw SystemCallError.last("fcntl")
        }
    }
}

/// What a stream has brought, and how far a test has looked at it.
struct Transcript {
    var bytes: [UInt8] = []
    var position = 0
    /// What was not found before here.
    private var missed: (text: String, end: Int) = ("", 0)

    var text: String { String(decoding: bytes, as: UTF8.self) }
    /// Lines without their ends.
    var lines: [String] { bytes.split { $0 == 0x0a || $0 == 0x0d }.map { String(decoding: $0, as: UTF8.self) } }
    /// The last of it, for a failure's text.
    var tail: String { String(decoding: bytes.suffix(4000), as: UTF8.self) }

    /// Moves on to the end of the next `text`, if it is there, whole or cut by messages.
    mutating func advance(past text: String) -> Bool {
        let wanted = Array(text.utf8)
        let start = missed.text == text ? max(missed.end, position) : position
        let whole = Self.search(for: wanted, in: bytes, from: start).map { $0 + wanted.count }
        guard let end = [whole, endOfCut(wanted)].compactMap({ $0 }).min() else {
            missed = (text, max(start, bytes.count - wanted.count + 1))
            return false
        }
        position = end
        return true
    }

    /// Where the next `wanted` ends that is whole only without the messages.
    private func endOfCut(_ wanted: [UInt8]) -> Int? {
        let cuts = cuts(from: position)
        guard !cuts.isEmpty, let first = Self.search(for: wanted, in: remains(from: position, without: cuts), from: 0)
        else { return nil }
        return cuts.reduce(position + first + wanted.count) { $1.lowerBound < $0 ? $0 + $1.count : $0 }
    }

    /// What has come from `start` on, without messages that cut a line of the guest's, which thus is whole again.
    func guestText(from start: Int) -> String {
        String(decoding: remains(from: start, without: cuts(from: start)), as: UTF8.self)
    }

    /// On a terminal, a message of swkvm's can begin in the middle of a line of the guest's, which goes on behind it.
    private func cuts(from start: Int) -> [Range<Int>] {
        var cuts: [Range<Int>] = []
        var next = start
        while let first = Self.search(for: Self.message, in: bytes, from: next),
            let end = bytes[first...].firstIndex(of: 0x0a)
        {
            next = end + 1
            if first > start, bytes[first - 1] != 0x0a { cuts.append(first..<next) }
        }
        return cuts
    }

    private func remains(from start: Int, without cuts: [Range<Int>]) -> [UInt8] {
        var remains: [UInt8] = []
        var next = start
        for cut in cuts {
            remains += bytes[next..<cut.lowerBound]
            next = cut.upperBound
        }
        return remains + bytes[next...]
    }

    /// How each message of swkvm's begins.
    private static let message = Array("swkvm: ".utf8)

    /// - Returns: where the first `wanted` at or behind `start` begins.
    private static func search(for wanted: [UInt8], in bytes: [UInt8], from start: Int) -> Int? {
        bytes.withUnsafeBytes { bytes in
            var start = start
            while start + wanted.count <= bytes.count {
                let last = bytes.count - wanted.count
                guard let first = memchr(bytes.baseAddress! + start, Int32(wanted[0]), last - start + 1) else { break }
                if memcmp(first, wanted, wanted.count) == 0 { return UnsafeRawPointer(first) - bytes.baseAddress! }
                start = UnsafeRawPointer(first) - bytes.baseAddress! + 1
            }
            return nil
        }
    }

    /// Reads until there is no more for now; false at the end of the stream.
    mutating func read(from number: Int32) -> Bool {
        while true {
            let before = bytes.count
            bytes.append(contentsOf: repeatElement(0, count: 16 << 10))
            let count = bytes.withUnsafeMutableBytes { Glibc.read(number, $0.baseAddress! + before, 16 << 10) }
            bytes.removeLast(16 << 10 - max(count, 0))
            if count > 0 { continue }
            // EIO is the end of a pseudo-terminal.
            return count < 0 && (errno == EAGAIN || errno == EINTR)
        }
    }
}

struct TestFailure: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}

/// What a process is started with.
private struct Plan: @unchecked Sendable {
    private enum Step {
        case duplicate(Int32, as: Int32)
        case open(String, Int32, as: Int32)
        case close(Int32)
    }

    var isSessionLeader = false
    private var steps: [Step] = []
    /// The process's ends of pipes.
    private var ends: [Holder<FileDescriptor>] = []

    mutating func duplicate(_ descriptor: Int32, as number: Int32) { steps.append(.duplicate(descriptor, as: number)) }
    mutating func open(_ path: String, _ flags: Int32, as number: Int32) {
        steps.append(.open(path, flags, as: number))
    }

    /// - Returns: the test's end of a pipe, if it is one.
    mutating func connect(_ stream: Program.Stream, as number: Int32) throws -> FileDescriptor? {
        switch stream {
        case .null: open("/dev/null", number == 0 ? O_RDONLY : O_WRONLY, as: number)
        case .file(let path, let flags): open(path, flags, as: number)
        case .closed: steps.append(.close(number))
        case .descriptor(let descriptor): duplicate(descriptor, as: number)
        case .pipe:
            let (reading, writing) = try makePipe()
            let (theirs, ours) = number == 0 ? (reading, writing) : (writing, reading)
            let end = Holder(FileDescriptor(owning: theirs))
            duplicate(theirs, as: number)
            ends.append(end)
            return FileDescriptor(owning: ours)
        }
        return nil
    }

    func start(_ arguments: [String]) throws -> pid_t {
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        for step in steps {
            switch step {
            case .duplicate(let descriptor, let number): posix_spawn_file_actions_adddup2(&actions, descriptor, number)
            case .open(let path, let flags, let number):
                posix_spawn_file_actions_addopen(&actions, number, path, flags, 0o644)
            case .close(let number): posix_spawn_file_actions_addclose(&actions, number)
            }
        }
        var attributes = posix_spawnattr_t()
        posix_spawnattr_init(&attributes)
        defer { posix_spawnattr_destroy(&attributes) }
        // Threads of the tests may have signals blocked or ignored; a process is started as a shell would.
        var signals = sigset_t()
        sigemptyset(&signals)
        posix_spawnattr_setsigmask(&attributes, &signals)
        sigfillset(&signals)
        posix_spawnattr_setsigdefault(&attributes, &signals)
        let newSession: Int32 = 0x80  // POSIX_SPAWN_SETSID
        posix_spawnattr_setflags(
            &attributes, Int16(POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | (isSessionLeader ? newSession : 0)))

        var pointers = arguments.map { strdup($0) } + [nil]
        defer { for pointer in pointers { free(pointer) } }
        var pid: pid_t = 0
        let failure = posix_spawnp(&pid, arguments[0], &actions, &attributes, &pointers, environ)
        guard failure == 0 else { throw SystemCallError("posix_spawn of \(arguments[0])", errno: failure) }
        return pid
    }
}

/// A pipe that no process inherits by chance.
func makePipe() throws -> (reading: Int32, writing: Int32) {
    var ends: [Int32] = [-1, -1]
    guard clinux_pipe_cloexec(&ends) == 0 else { throw SystemCallError.last("pipe2") }
    return (ends[0], ends[1])
}
