// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// A directory that goes with the value.
final class TemporaryDirectory: Sendable {
    let path: String

    /// - Parameter inMemory: on a file system where qemu-img's waiting for the disk takes no time.
    init(inMemory: Bool = false) {
        let parent =
            unsafe inMemory && access("/dev/shm", W_OK) == 0
            ? "/dev/shm" : getenv("TMPDIR").map { unsafe String(cString: $0) } ?? P_tmpdir
        var template = Array("\(parent)/swkvm-disk.\(String(repeating: "X", count: 6))".utf8CString)
        path = unsafe template.withUnsafeMutableBufferPointer { unsafe String(cString: mkdtemp($0.baseAddress!)) }
    }

    deinit {
        #expect(run(["rm", "-rf", path]).status == 0)
    }

    func file(_ name: String) -> String { path + "/" + name }

    /// Writes a file and returns its path.
    @discardableResult
    func write(_ name: String, _ bytes: some Collection<UInt8>) throws -> String {
        let file = try FileDescriptor.open(file(name), O_WRONLY | O_CREAT | O_TRUNC, mode: 0o644)
        try file.writeAll(bytes)
        return self.file(name)
    }

    func read(_ name: String) throws -> [UInt8] {
        try readFile(file(name), limit: 1 << 30)
    }
}

/// A program of the host that runs, and the other end of its input and output.
struct RunningProgram: ~Copyable {
    let process: pid_t
    let stream: FileDescriptor

    /// Starts a program with both streams of output, and its input, at the other end.
    init(_ command: [String]) throws(SystemCallError) {
        // A socket pair rather than pipes: it is never passed on to programs that other tests start meanwhile.
        var ends: [Int32] = [0, 0]
        guard unsafe socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &ends) == 0 else {
            throw .last("socketpair")
        }
        let stream = FileDescriptor(owning: ends[0]), other = FileDescriptor(owning: ends[1])
        var actions = unsafe posix_spawn_file_actions_t()
        unsafe posix_spawn_file_actions_init(&actions)
        defer { unsafe posix_spawn_file_actions_destroy(&actions) }
        for number: Int32 in 0...2 { unsafe posix_spawn_file_actions_adddup2(&actions, other.rawValue, number) }
        var arguments: [UnsafeMutablePointer<CChar>?] =
            unsafe command.map { (word: String) in unsafe strdup(word) } + [nil]
        defer { for index in unsafe arguments.indices { unsafe free(arguments[index]) } }
        var child: pid_t = 0
        let status = unsafe posix_spawnp(&child, command[0], &actions, nil, &arguments, environ)
        guard status == 0 else { throw SystemCallError("posix_spawnp", errno: status) }
        process = child
        self.stream = stream
    }

    /// Ends the program's input.
    func endInput() { shutdown(stream.rawValue, Int32(SHUT_WR)) }

    /// The next output; nothing at its end.
    func read() -> [UInt8] {
        var chunk = [UInt8](repeating: 0, count: 4096)
        let got = unsafe chunk.withUnsafeMutableBytes { unsafe Glibc.read(stream.rawValue, $0.baseAddress, $0.count) }
        return Array(chunk.prefix(max(0, got)))
    }

    /// Waits for the end and returns the exit status, -1 after a signal.
    consuming func wait() -> Int32 {
        var result: Int32 = 0
        unsafe waitpid(process, &result, 0)
        return clinux_wait_exited(result) != 0 ? clinux_wait_status(result) : -1
    }
}

/// Runs a program of the host without input, and returns its exit status and what it wrote, both streams together.
///
/// An image that this process has closed can stay locked for a moment: a process that another test is starting has a
/// copy of the descriptor until its exec, and the kernel may put the file of an operation that has ended a little after
/// its completion. swkvm tries for a while until it takes a lock for held, QEMU's tools do not: they are run again
/// here. A lock that stays is what they report. They are run again, too, when the clock of their key derivation fails,
/// as it does now and then on a busy machine.
/// - Parameter outlastsLocks: false where the image is locked.
@discardableResult
func run(_ command: [String], outlastsLocks: Bool = true) -> (status: Int32, output: String) {
    let start = ContinuousClock.now
    var failuresOfClock = 0
    while true {
        let result = runOnce(command)
        // QEMU has not touched the image then.
        let isLocked =
            outlastsLocks && result.output.contains("Failed to get ") && result.output.contains(" lock")
        // Each attempt may take long on such a machine, so they are counted.
        if result.output.contains("accurate CPU usage"), failuresOfClock < 100 {
            failuresOfClock += 1
        } else if !isLocked || start.duration(to: .now) >= .seconds(10) {
            return result
        }
        usleep(20_000)
    }
}

private func runOnce(_ command: [String]) -> (status: Int32, output: String) {
    let program: RunningProgram
    do { program = try RunningProgram(command) } catch { return (-1, "\(command[0]): \(error)") }
    program.endInput()
    var output: [UInt8] = []
    while true {
        let more = program.read()
        if more.isEmpty { break }
        output += more
    }
    return (program.wait(), String(decoding: output, as: UTF8.self))
}

/// Runs qemu-img and expects it to succeed.
func qemuImage(_ arguments: String..., sourceLocation: SourceLocation = #_sourceLocation) {
    qemuImage(arguments, sourceLocation: sourceLocation)
}

func qemuImage(_ arguments: [String], sourceLocation: SourceLocation = #_sourceLocation) {
    let (status, output) = run(["qemu-img"] + arguments)
    #expect(status == 0, "qemu-img \(arguments.joined(separator: " ")): \(output)", sourceLocation: sourceLocation)
}

/// Runs commands of qemu-io on an image and expects them to succeed.
func qemuIO(
    _ path: String, _ commands: [String], format: String = "qcow2", sourceLocation: SourceLocation = #_sourceLocation
) {
    let (status, output) = run(["qemu-io", "-f", format] + commands.flatMap { ["-c", $0] } + [path])
    #expect(status == 0 && !output.contains("rror"), "qemu-io: \(output)", sourceLocation: sourceLocation)
}

typealias SeededGenerator = TestSupport.SeededGenerator

func randomBytes(_ count: Int, seed: UInt64) -> [UInt8] {
    var generator = SeededGenerator(seed: seed)
    let words = (count + 7) / 8
    // Tests are built without optimisation, where bytes one by one would take longer than the tests.
    return unsafe [UInt8](unsafeUninitializedCapacity: words * 8) { buffer, initialized in
        for index in 0..<words {
            unsafe UnsafeMutableRawPointer(buffer.baseAddress!).storeBytes(
                of: generator.next(), toByteOffset: index * 8, as: UInt64.self)
        }
        initialized = count
    }
}

extension DiskEngine {
    mutating func read(_ offset: UInt64, _ count: Int) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0xee, count: count)
        try unsafe bytes.withUnsafeMutableBytes { unsafe try perform(.read, at: offset, memory: $0) }
        return bytes
    }

    mutating func write(_ offset: UInt64, _ bytes: [UInt8]) throws {
        var bytes = bytes
        try unsafe bytes.withUnsafeMutableBytes { unsafe try perform(.write, at: offset, memory: $0) }
    }

    /// The whole disk, in requests of the given size.
    mutating func readAll(chunk: Int = 1 << 20) throws -> [UInt8] {
        var all: [UInt8] = []
        while UInt64(all.count) < image.size {
            all += try read(UInt64(all.count), min(chunk, Int(image.size) - all.count))
        }
        return all
    }
}

/// The error of an open that must fail.
func openError(
    _ path: String, _ options: DiskImageOptions = DiskImageOptions(), sourceLocation: SourceLocation = #_sourceLocation
) -> DiskImageError? {
    do throws(DiskImageError) {
        _ = try DiskImage(path: path, options: options)
        Issue.record("it opened", sourceLocation: sourceLocation)
        return nil
    } catch {
        return error
    }
}

let readOnly = DiskImageOptions(readOnly: true)
