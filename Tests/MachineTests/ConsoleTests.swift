// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

@testable import Machine

@Suite(.timed) struct EscapeKeyTests {
    private func bytes(_ text: String) -> [UInt8] { Array(text.utf8) }

    @Test(
        arguments: [
            ("plain", [.pass(Array("plain".utf8))]), ("", []), ("\u{1}x", [.quit]), ("\u{1}X", [.quit]),
            ("\u{1}h", [.help]), ("\u{1}?", [.help]),
            ("\u{1}c", [.status]), ("\u{1}p", [.pause]), ("\u{1}P", [.pause]), ("\u{1}r", [.resume]),
            ("\u{1}R", [.resume]), ("\u{1}:", [.prompt]), ("\u{1}a", [.pass([1])]), ("\u{1}\u{1}", [.pass([1])]),
            ("\u{1}q", [.pass([1, 0x71])]), ("\u{1}", []),
            (
                "ab\u{1}cde\u{1}xf",
                [.pass(Array("ab".utf8)), .status, .pass(Array("de".utf8)), .quit, .pass(Array("f".utf8))]
            ),
            ("\u{1}\u{1}x", [.pass([1, 0x78])]), ("\u{1}\u{1}\u{1}x", [.pass([1]), .quit]),
        ] as [(String, [EscapeKey.Action])])
    func finds(keys: String, actions: [EscapeKey.Action]) {
        var escape = EscapeKey()
        #expect(escape.filter(bytes(keys)) == actions)
    }

    /// Cut in two anywhere, the keys mean the same.
    @Test func inPieces() {
        let keys = bytes("ab\u{1}\u{1}c\u{1}cd\u{1}hx\u{1}z\u{1}x")
        func joined(_ actions: [EscapeKey.Action]) -> [EscapeKey.Action] {
            actions.reduce(into: []) { all, action in
                if case .pass(let more) = action, case .pass(let before)? = all.last {
                    all[all.count - 1] = .pass(before + more)
                } else {
                    all.append(action)
                }
            }
        }
        var whole = EscapeKey()
        let expected = joined(whole.filter(keys))
        for cut in 0...keys.count {
            var escape = EscapeKey()
            #expect(joined(escape.filter(Array(keys[..<cut])) + escape.filter(Array(keys[cut...]))) == expected)
        }
    }
}

@Suite(.timed) struct ConsoleInputTests {
    private func all(_ input: ConsoleInput) -> (bytes: [UInt8], isAtEnd: Bool) {
        var bytes: [UInt8] = []
        while true {
            switch input.read() {
            case .bytes(let more): bytes += more
            case .empty: return (bytes, false)
            case .end: return (bytes, true)
            }
        }
    }

    @Test func ofAPipe() throws {
        let content = (0..<1000).map { UInt8(truncatingIfNeeded: $0) }
        let reading: ConsoleInput
        do {
            var ends: [Int32] = [-1, -1]
            try #require(clinux_pipe_cloexec(&ends) == 0)
            let writing = FileDescriptor(owning: ends[1])
            let end = FileDescriptor(owning: ends[0])
            try end.setNonBlocking(true)
            reading = ConsoleInput(end)
            #expect(reading.isWaitable)
            #expect(all(reading) == ([], false))
            try writing.writeAll(content)
            #expect(all(reading) == (content, false))
        }
        #expect(all(reading) == ([], true))
    }

    /// A terminal that could not be opened anew is shared with the shell and waits in `read`; the event loop may not.
    @Test func ofADescriptorThatWaits() throws {
        var ends: [Int32] = [-1, -1]
        try #require(clinux_pipe_cloexec(&ends) == 0)
        let writing = FileDescriptor(owning: ends[1])
        let reading = ConsoleInput(FileDescriptor(owning: ends[0]))
        #expect(all(reading) == ([], false))
        try writing.writeAll([1, 2, 3])
        #expect(all(reading) == ([1, 2, 3], false))
    }

    @Test func ofARegularFile() throws {
        let file = try FileDescriptor.open("/proc/self/exe", O_RDONLY)
        let input = ConsoleInput(file)
        #expect(!input.isWaitable)
        guard case .bytes(let bytes) = input.read() else { Issue.record("nothing was read"); return }
        #expect(bytes.count == 256 && Array(bytes.prefix(4)) == [0x7f, 0x45, 0x4c, 0x46])
    }
}

@Suite(.timed) struct ConsoleOutputTests {
    @Test func withNobodyThereItIsDropped() throws {
        let output = try ConsoleOutput(nil)
        let bytes: [UInt8] = [1, 2, 3]
        let taken = output.take(bytes.span)
        #expect(taken == 3 && output.rawValue == nil)
    }

    @Test func aFullPipeRingsAndLosesNothing() throws {
        var ends: [Int32] = [-1, -1]
        try #require(clinux_pipe_cloexec(&ends) == 0)
        let reading = FileDescriptor(owning: ends[0])
        let writing = FileDescriptor(owning: ends[1])
        try writing.setNonBlocking(true)
        let output = try ConsoleOutput(writing)
        let bytes = [UInt8](repeating: 7, count: 1 << 20)
        let taken = output.take(bytes.span)
        #expect(taken > 0 && taken < bytes.count)
        #expect(output.attention.drain() > 0)
        try reading.setNonBlocking(true)
        var got = 0
        var buffer = [UInt8](repeating: 0, count: 1 << 16)
        while let count = try? buffer.withUnsafeMutableBytes({ try reading.read(into: $0) }), count > 0 { got += count }
        #expect(got == taken)
    }
}

@Suite(.timed) final class ClientOutputTests {
    private let reading: FileDescriptor
    private let output: ClientOutput

    init() throws {
        var ends: [Int32] = [-1, -1]
        try #require(socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends) == 0)
        reading = FileDescriptor(owning: ends[0])
        try reading.setNonBlocking(true)
        output = ClientOutput(FileDescriptor(owning: ends[1]))
    }

    private func read() -> [UInt8] {
        var all: [UInt8] = []
        var buffer = [UInt8](repeating: 0, count: 1 << 16)
        while let count = try? buffer.withUnsafeMutableBytes({ try reading.read(into: $0) }), count > 0 {
            all += buffer[..<count]
        }
        return all
    }

    /// All that the client reads, with the rest sent as it does.
    private func readAll() -> [UInt8] {
        var all: [UInt8] = []
        while true {
            output.drain()
            let more = read()
            if more.isEmpty { return all }
            all += more
        }
    }

    @Test func whatFitsIsKept() throws {
        var sent: [UInt8] = []
        var hasFallenBehind = 0
        // Byte by byte, as a guest writes: the socket has room for few of those.
        for index in 0..<ClientOutput.capacity / 2 {
            let bytes = [UInt8(truncatingIfNeeded: index &* 7 &+ index >> 8)]
            if output.take(bytes.span) { hasFallenBehind += 1 }
            sent += bytes
        }
        #expect(hasFallenBehind == 1 && output.pending > 0)
        #expect(readAll() == sent)
        #expect(output.pending == 0)
    }

    @Test func whatDoesNotFitIsCounted() throws {
        let first = [UInt8](repeating: 65, count: 2 << 20), second = [UInt8](repeating: 66, count: 1000)
        let isFirst = output.take(first.span)
        #expect(isFirst)
        let isAgain = output.take(second.span)
        #expect(!isAgain)
        let got = readAll()
        let kept = got.prefix { $0 == 65 }.count
        let lost = first.count - kept + second.count
        #expect(kept >= ClientOutput.capacity && lost > 0)
        let notice = "\r\n[swkvm: \(lost) bytes of output are missing here: this client did not read them in time]\r\n"
        #expect(String(decoding: got[kept...], as: UTF8.self) == notice)
        // From now on it gets all again.
        let isBehind = output.take(second.span)
        #expect(!isBehind && readAll() == second)
    }

    @Test func aClientThatHasGone() throws {
        shutdown(reading.rawValue, Int32(SHUT_RDWR))
        let bytes = [UInt8](repeating: 1, count: 2 << 20)
        for _ in 0..<3 { _ = output.take(bytes.span) }
        #expect(output.pending == 0)
    }
}

/// Outputs whose readers may stop: a vCPU thread in a `write` that waits could not be ended.
@Suite(.timed) struct ConsoleThatIsNotReadTests {
    @Test func aSocketThatWaits() throws {
        var ends: [Int32] = [-1, -1]
        try #require(socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends) == 0)
        let reading = FileDescriptor(owning: ends[0])
        let output = try ConsoleOutput(FileDescriptor(owning: ends[1]))
        let bytes = [UInt8](repeating: 7, count: 4 << 20)
        let taken = output.take(bytes.span)
        #expect(taken > 0 && taken < bytes.count)
        #expect(output.attention.drain() > 0)
        withExtendedLifetime(reading.rawValue) {}
    }

    /// A pipe that another process shares, and may make blocking at any time: a thread writes to it, nobody waits.
    @Test func aPipeThatBlocks() throws {
        var ends: [Int32] = [-1, -1]
        try #require(clinux_pipe_cloexec(&ends) == 0)
        let reading = FileDescriptor(owning: ends[0])
        try reading.setNonBlocking(true)
        let content = (0..<300_000).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ $0 >> 8) }
        var got: [UInt8] = []
        do {
            let output = try ConsoleOutput(FileDescriptor(owning: ends[1]), mayBlock: true)
            #expect(output.rawValue == nil)
            var done = output.take(content.span)
            #expect(done > 0 && done < content.count)
            var buffer = [UInt8](repeating: 0, count: 1 << 16)
            for _ in 0..<90_000 where got.count < content.count {
                if let count = try? buffer.withUnsafeMutableBytes({ try reading.read(into: $0) }) {
                    got += buffer[..<count]
                } else {
                    usleep(1_000)
                }
                // Refused, it rings when there is room.
                guard done < content.count, output.attention.drain() > 0 else { continue }
                let rest = Array(content[done...])
                done += output.take(rest.span)
            }
            #expect(got == content)
            for _ in 0..<90_000 where output.pending > 0 { usleep(1_000) }
            // The pipe is full, its thread waits in it, and the end comes all the same.
            let more = output.take(content.span)
            #expect(more > 0)
        }
    }

    /// Its thread has written some and is to ring just when the output goes.
    @Test func anOutputThatGoesWhileItsThreadWrites() throws {
        let bytes = [UInt8](repeating: 7, count: 1 << 17)
        for _ in 0..<100 {
            let output = try ConsoleOutput(FileDescriptor.open("/dev/null", O_WRONLY), mayBlock: true)
            let taken = output.take(bytes.span)
            #expect(taken > 0)
        }
    }

    /// Where nobody reads any more, or the disk is full, output is dropped and the guest goes on.
    @Test func anOutputThatTakesNothing() throws {
        let output = try ConsoleOutput(FileDescriptor.open("/dev/full", O_WRONLY), mayBlock: true)
        let bytes = [UInt8](repeating: 7, count: 1 << 16)
        for _ in 0..<20 {
            for _ in 0..<90_000 where output.pending > 0 { usleep(1_000) }
            let taken = output.take(bytes.span)
            #expect(taken == bytes.count)
        }
    }

    @Test func aNamedPipeAsAFile() throws {
        let pipe = try NamedPipe()
        let reading = try FileDescriptor.open(pipe.path, O_RDONLY | O_NONBLOCK)
        let output = try Console.open(.file(pipe.path)).output
        let mode = clinux_fcntl_value(try #require(output.rawValue), F_GETFL, 0)
        #expect(mode & O_NONBLOCK != 0)
        withExtendedLifetime(reading.rawValue) {}
    }

    @Test func aNamedPipeThatNobodyReadsIsAnError() throws {
        let pipe = try NamedPipe()
        let error = #expect(throws: MachineError.self) { _ = try Console.open(.file(pipe.path)) }
        #expect(error?.description == "the console \(pipe.path) cannot be opened: No such device or address (open)")
    }
}

/// A FIFO in a directory of its own, removed with the object.
private final class NamedPipe {
    let path: String
    private let directory: String

    init() throws {
        var template = Array("/tmp/swkvm-test.XXXXXX".utf8CString)
        try #require(mkdtemp(&template) != nil)
        directory = String(decoding: template.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
        path = directory + "/pipe"
        try #require(mkfifo(path, 0o600) == 0)
    }

    deinit {
        unlink(path)
        rmdir(directory)
    }
}

@Suite(.timed) struct ListenerTests {
    private func directory() throws -> String {
        var template = Array("/tmp/swkvm-test.XXXXXX".utf8CString)
        try #require(mkdtemp(&template) != nil)
        return String(decoding: template.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    @Test func theFileGoesWithTheListener() throws {
        let path = try directory() + "/socket"
        do {
            let listener = try Listener(path: path)
            #expect(access(path, F_OK) == 0)
            let client = listener.accept()
            let isAlone = client == nil
            #expect(isAlone)
            // The path is taken, and stays the first one's.
            #expect(throws: SystemCallError("bind", errno: EADDRINUSE)) { try Listener(path: path) }
            #expect(access(path, F_OK) == 0)
            // Also when its queue of clients is full.
            for _ in 0..<3 { #expect(throws: SystemCallError("bind", errno: EADDRINUSE)) { try Listener(path: path) } }
        }
        #expect(access(path, F_OK) != 0)
        rmdir(String(path.dropLast(7)))
    }

    @Test(arguments: ["", "/" + String(repeating: "x", count: 107), "a\u{0}b"]) func pathsThatCannotBe(path: String) {
        #expect(throws: SystemCallError("bind", errno: ENAMETOOLONG)) { try Listener(path: path) }
    }

    @Test func inADirectoryThatIsNotThere() {
        #expect(throws: SystemCallError("bind", errno: ENOENT)) { try Listener(path: "/nonexistent/socket") }
    }
}

@Suite(.timed) struct ConsoleErrorTests {
    @Test(arguments: [
        (
            Configuration.ConsoleKind.unix("/s"), EADDRINUSE,
            "the console's socket /s is in use: another process listens on it"
        ),
        (.unix("/s"), EEXIST, "the console's socket cannot be /s: a file that is not a socket has that name"),
        (.unix("/long"), ENAMETOOLONG, "the console's socket has a path of 5 bytes, the limit is 107"),
        (.unix("/s"), ENOENT, "the console /s cannot be opened: No such file or directory (bind)"),
        (.file("/f"), EACCES, "the console /f cannot be opened: Permission denied (bind)"),
        (.pty, ENOSPC, "the console cannot be opened: No space left on device (bind)"),
    ])
    func sentences(kind: Configuration.ConsoleKind, number: Int32, sentence: String) {
        #expect(MachineError.console(kind, SystemCallError("bind", errno: number)).description.hasPrefix(sentence))
    }

    @Test func aFileThatCannotBeWritten() {
        let error = #expect(throws: MachineError.self) { _ = try Console.open(.file("/nonexistent/file")) }
        #expect(
            error?.description == "the console /nonexistent/file cannot be opened: No such file or directory (open)")
    }
}

@Suite(.timed) struct MachineErrorTests {
    @Test func sentences() {
        #expect(
            MachineError.noCPUs(0).description == "0 vCPUs were requested, a machine needs at least 1: use `--cpus 1`")
        #expect(
            MachineError.tooManyDevices(wanted: 20, maximum: 16).description
                == "20 disks and other virtio devices were requested, but a machine has 16 slots: remove 4")
        #expect(
            MachineError.host(purpose: "start a thread", SystemCallError("clone", errno: EAGAIN)).description
                == "could not start a thread: Resource temporarily unavailable (clone)")
    }
}
