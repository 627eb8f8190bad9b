// SPDX-License-Identifier: Apache-2.0

import Glibc

/// An error message.
struct BenchError: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}

/// The monotonic clock, in seconds.
func now() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
}

/// The duration of `body`, in seconds.
func time(_ body: () throws -> Void) rethrows -> Double {
    let start = now()
    try body()
    return now() - start
}

/// Runs the bodies in turn, A B C A B C …, so that other load on the host affects all equally, after one uncounted
/// round.
func interleave(_ rounds: Int, _ bodies: [() throws -> Double]) throws -> [[Double]] {
    for body in bodies { _ = try body() }
    var results = bodies.map { _ in [Double]() }
    for _ in 0..<rounds {
        for (index, body) in bodies.enumerated() { results[index].append(try body()) }
    }
    return results
}

func readFile(_ path: String) throws -> [UInt8] {
    let file = open(path, O_RDONLY | O_CLOEXEC)
    guard file >= 0 else { throw BenchError("cannot read \(path)") }
    defer { close(file) }
    var bytes: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 1 << 16)
    while true {
        let count = read(file, &buffer, buffer.count)
        if count <= 0 { return bytes }
        bytes += buffer[..<count]
    }
}

func writeFile(_ path: String, _ bytes: [UInt8]) throws {
    let file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o644)
    guard file >= 0 else { throw BenchError("cannot write \(path)") }
    defer { close(file) }
    var done = 0
    while done < bytes.count {
        let count = bytes[done...].withUnsafeBytes { write(file, $0.baseAddress, $0.count) }
        guard count > 0 else { throw BenchError("cannot write \(path)") }
        done += count
    }
}

func fileSize(_ path: String) throws -> Int {
    var status = stat()
    guard stat(path, &status) == 0 else { throw BenchError("\(path) does not exist") }
    return Int(status.st_size)
}

/// A running program with its standard output and error in pipes, and empty input.
final class Child {
    let pid: pid_t
    let started: Double
    /// The time of the first byte of its output.
    private(set) var firstByte: Double?
    /// Its CPU time until then.
    private var cpuToFirstByte: Double?
    private(set) var output: [UInt8] = []
    private(set) var errors: [UInt8] = []
    private var pipes: [Int32]
    private var isRunning = true
    private let command: String

    /// The time limit of the program, in seconds.
    private let patience: Double

    init(_ words: [String], patience: Double = 60) throws {
        self.patience = patience
        command = words.joined(separator: " ")
        let (outputEnd, output) = try Self.makePipe()
        let (errorsEnd, errors) = try Self.makePipe()
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
        posix_spawn_file_actions_adddup2(&actions, output, 1)
        posix_spawn_file_actions_adddup2(&actions, errors, 2)
        defer { posix_spawn_file_actions_destroy(&actions) }
        var arguments: [UnsafeMutablePointer<CChar>?] = words.map { strdup($0) } + [nil]
        defer { for argument in arguments { free(argument) } }
        var child: pid_t = 0
        started = now()
        let result = posix_spawnp(&child, words[0], &actions, nil, &arguments, environ)
        close(output)
        close(errors)
        pipes = [outputEnd, errorsEnd]
        pid = child
        guard result == 0 else {
            isRunning = false
            throw BenchError("\(words[0]) cannot be started: \(String(cString: strerror(result)))")
        }
    }

    /// The reading and the writing end.
    private static func makePipe() throws -> (Int32, Int32) {
        var ends: [Int32] = [0, 0]
        guard pipe(&ends) == 0 else { throw BenchError("cannot create a pipe") }
        for end in ends { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
        return (ends[0], ends[1])
    }

    deinit {
        if isRunning {
            kill(pid, SIGKILL)
            waitpid(pid, nil, 0)
        }
        for pipe in pipes where pipe >= 0 { close(pipe) }
    }

    /// Reads output until `isEnough`, or to the end of both pipes.
    func collect(until isEnough: ([UInt8]) -> Bool = { _ in false }) throws {
        var buffer = [UInt8](repeating: 0, count: 1 << 16)
        while !isEnough(output), pipes.contains(where: { $0 >= 0 }) {
            // poll ignores a negative descriptor.
            var waiting = pipes.map { pollfd(fd: $0, events: Int16(POLLIN), revents: 0) }
            guard now() - started < patience, poll(&waiting, nfds_t(waiting.count), 1000) >= 0 else {
                throw BenchError("\(command): not finished after \(Int(patience)) s\n\(text)")
            }
            for index in 0..<2 where waiting[index].revents != 0 {
                let count = read(pipes[index], &buffer, buffer.count)
                if count <= 0 {
                    close(pipes[index])
                    pipes[index] = -1
                } else if index == 0 {
                    if firstByte == nil {
                        firstByte = now()
                        cpuToFirstByte = cpuTime()
                    }
                    output += buffer[..<count]
                } else {
                    errors += buffer[..<count]
                }
            }
        }
    }

    /// Reads output until a line begins with `mark`; an error if it ends without one.
    func collect(untilLine mark: String) throws {
        let bytes = Array(mark.utf8)
        // Where the last complete line ends.
        var seen = 0
        var isFound = false
        try collect { output in
            while !isFound, let end = output[seen...].firstIndex(of: UInt8(ascii: "\n")) {
                isFound = output[seen..<end].starts(with: bytes)
                seen = end + 1
            }
            return isFound
        }
        guard isFound else { throw BenchError("\(command): no line '\(mark)'\n\(text)") }
    }

    private func cpuTime() -> Double? {
        var clock: clockid_t = 0
        var time = timespec()
        guard clock_getcpuclockid(pid, &clock) == 0, clock_gettime(clock, &time) == 0 else { return nil }
        return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
    }

    struct End {
        /// Seconds from exec to the first byte of output, and to the end.
        var firstByte: Double
        var total: Double
        /// User and system time in seconds.
        var cpu: Double
        /// The same, to the first byte of output.
        var cpuToFirstByte: Double
        var status: Int32
    }

    func wait() -> End {
        var status: Int32 = 0
        var usage = rusage()
        wait4(pid, &status, 0, &usage)
        let end = now()
        isRunning = false
        func seconds(_ time: timeval) -> Double { Double(time.tv_sec) + Double(time.tv_usec) / 1e6 }
        let cpu = seconds(usage.ru_utime) + seconds(usage.ru_stime)
        return End(
            firstByte: (firstByte ?? end) - started, total: end - started, cpu: cpu,
            cpuToFirstByte: cpuToFirstByte ?? cpu, status: status)
    }

    var text: String { String(decoding: output, as: UTF8.self) + String(decoding: errors, as: UTF8.self) }

    /// Runs a program to its end.
    static func run(
        _ words: [String], wanted: String? = nil, status: Int32 = 0
    ) throws -> (end: End, output: String, errors: String) {
        let child = try Child(words)
        try child.collect()
        let end = child.wait()
        guard end.status == status << 8, wanted.map({ child.text.contains($0) }) ?? true else {
            throw BenchError(
                "\(words.joined(separator: " ")): status 0x\(String(end.status, radix: 16)), output:\n\(child.text)")
        }
        return (end, String(decoding: child.output, as: UTF8.self), String(decoding: child.errors, as: UTF8.self))
    }
}

/// The number that follows `key` in `text`.
func number(after key: String, in text: String) throws -> Double {
    guard let rest = text.rest(after: key),
        let value = Double(rest.drop { $0 == " " }.prefix { "0123456789.e+-".contains($0) })
    else { throw BenchError("no \(key) in: \(text)") }
    return value
}

extension String {
    /// The text after the first occurrence of `key`.
    func rest(after key: String) -> Substring? {
        var place = startIndex
        while place < endIndex {
            if self[place...].hasPrefix(key) { return self[place...].dropFirst(key.count) }
            place = index(after: place)
        }
        return nil
    }
}
