// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

/// Consoles that are elsewhere: nowhere, in a file, on a pseudo-terminal, on a socket.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct ConsolePlaceTests {
    @Test func consoleNone() throws {
        let machine = try Program.machine(["--console", "none", "--cmdline", "test=irq"], input: .pipe)
        try machine.expectEnd(0)
        #expect(machine.output.bytes.isEmpty && machine.errors.bytes.isEmpty)
    }

    @Test func consoleFile() throws {
        let directory = try TemporaryDirectory()
        try directory.write(Array("kept\n".utf8), to: "log")
        let machine = try Program.machine(["--console", "file:" + directory("log"), "--cmdline", "test=irq"])
        try machine.expectEnd(0)
        #expect(machine.output.bytes.isEmpty)
        let text = String(decoding: try readFile(directory("log"), limit: 1 << 20), as: UTF8.self)
        #expect(text.hasPrefix("kept\nswkvm guest\r\n") && text.hasSuffix("1..2\r\n"))
    }

    @Test func consolePseudoTerminal() throws {
        let machine = try Program.machine(["--console", "pty"])
        try machine.waitForError("the console is the terminal ")
        try machine.waitForError("\n")
        let path = try #require(machine.errors.text.split(separator: " ").last.map { String($0.dropLast()) })
        let client = try Client(FileDescriptor.open(path, O_RDWR | O_NOCTTY | O_NONBLOCK))
        try client.talk()
        try machine.expectEnd(0)
        #expect(machine.output.bytes.isEmpty)
    }

    @Test func aPseudoTerminalWithoutAClient() throws {
        let machine = try Program.machine(["--console", "pty", "--cmdline", "test=memory,irq"])
        try machine.expectEnd(0)
    }

    @Test func consoleSocket() throws {
        let directory = try TemporaryDirectory()
        let path = directory("socket")
        let machine = try Program.machine(["--console", "unix:" + path])
        try machine.waitForError("the console is the socket \(path)\n")
        // Clients come and go; the machine stays, and holds no descriptor of theirs.
        func descriptorCount() throws -> Int {
            try shell("ls /proc/\(machine.pid)/fd | wc -l").split(separator: "\n").compactMap { Int($0) }[0]
        }
        let alone = try descriptorCount()
        var descriptors: [Int] = []
        for round in 0..<20 {
            do {
                let client = try Client(socket: path)
                try client.ask("echo round \(round)", "\nround \(round)")
                descriptors.append(try descriptorCount())
            }
            // One at a time: the next one comes when the machine has seen this one go.
            #expect(try eventually { try descriptorCount() == alone })
        }
        #expect(Set(descriptors).count == 1, "\(descriptors)")
        try Client(socket: path).talk()
        try machine.expectEnd(0)
        #expect(try directory.contents.isEmpty, "the socket is still there")
    }

    /// `echo poweroff | nc -U -N` and its like close their sending side and read on.
    @Test func aClientThatHasClosedItsSendingSideStillGetsOutput() throws {
        let directory = try TemporaryDirectory()
        let machine = try Program.machine(["--console", "unix:" + directory("socket")])
        try machine.waitForError("the console is the socket")
        let client = try Client(socket: directory("socket"))
        try client.say("echo half a connection\n")
        try client.closeSending()
        try client.wait(for: "\nhalf a connection")
        // The keyboard is free, and what the next one types is seen by both.
        let next = try Client(socket: directory("socket"))
        try next.ask("echo of the next", "\nof the next")
        try client.wait(for: "\nof the next")
        client.close()
        try next.talk()
        try machine.expectEnd(0)
    }

    /// The one before has gone, and what it has sent is more than the guest has taken.
    @Test func aClientThatReconnectsAtOnceIsLetIn() throws {
        let directory = try TemporaryDirectory()
        // The guest takes no input.
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.talking), to: "kernel")
        let machine = try Program.machine(["--kernel", kernel, "--console", "unix:" + directory("socket")])
        try machine.waitForError("the console is the socket")
        for _ in 0..<5 {
            let client = try Client(socket: directory("socket"))
            try client.say(String(repeating: "typed ahead ", count: 100))
            try client.wait(for: "xxx")
            client.close()
        }
        try Client(socket: directory("socket")).wait(for: "xxx")
        machine.send(signal: SIGTERM)
        try machine.waitForError("asked the guest to power off")
        machine.sendOneMore(signal: SIGTERM)
        try machine.expectEnd(143)
    }

    /// What `kill -9` leaves behind does not stop the next start.
    @Test func aSocketThatWasLeftBehindIsReplaced() throws {
        let directory = try TemporaryDirectory()
        for option in ["--console", "--gdb"] {
            let path = directory("socket")
            // In the sandbox there is a process that removes it.
            let first = try Program.machine([option, "unix:" + path, "--sandbox", "off"])
            try first.waitForError(option == "--gdb" ? "target remote" : "the console is the socket")
            // The listener keeps it.
            let second = try Program.machine([option, "unix:" + path])
            try second.expectEnd(71)
            #expect(
                second.errors.text.contains("\(path) is in use: another process listens on it"), "\(second.errors.text)"
            )
            first.send(signal: SIGKILL)
            #expect(try first.waitForEnd() == .signal(SIGKILL))
            #expect(try directory.contents == ["socket"])
            let third = try Program.machine([option, "unix:" + path, "--stop-timeout", "0"])
            try third.waitForError(option == "--gdb" ? "target remote" : "the console is the socket")
            third.send(signal: SIGTERM)
            _ = try third.waitForEnd()
            #expect(try directory.contents.isEmpty)
        }
    }

    @Test func whatIsNoSocketIsNotReplaced() throws {
        let directory = try TemporaryDirectory()
        let path = try directory.write(Array("precious".utf8), to: "file")
        let machine = try Program.machine(["--console", "unix:" + path])
        try machine.expectEnd(71)
        #expect(
            machine.errors.text
                == "swkvm: the console's socket cannot be \(path): a file that is not a socket has that name; choose another path or remove it\n"
        )
        #expect(try readFile(path, limit: 64) == Array("precious".utf8))
    }

    /// Another process's socket, which took the name of one that was removed, stays at the machine's end.
    @Test func onlyTheMachinesOwnSocketIsRemoved() throws {
        let directory = try TemporaryDirectory()
        let path = directory("socket")
        let first = try Program.machine(["--console", "unix:" + path])
        try first.waitForError("the console is the socket")
        #expect(unlink(path) == 0)
        let second = try Program.machine(["--console", "unix:" + path])
        try second.waitForError("the console is the socket")
        first.send(signal: SIGTERM)
        try first.expectEnd(0)
        #expect(try directory.contents == ["socket"])
        try Client(socket: path).talk()
        try second.expectEnd(0)
        #expect(try directory.contents.isEmpty)
    }

    @Test func socketsAndFilesAreForTheirOwnerAlone() throws {
        let directory = try TemporaryDirectory()
        let before = umask(0)
        defer { umask(before) }
        let machine = try Program.machine(["--console", "unix:" + directory("socket")])
        try machine.waitForError("the console is the socket")
        let other = try Program.machine(["--console", "file:" + directory("file"), "--cmdline", "test=none"])
        try other.expectEnd(0)
        try Program([Host.swkvm, "image", "create", directory("image.qcow2"), "1M"]).expectEnd(0)
        for name in ["socket", "file", "image.qcow2"] {
            var status = stat()
            #expect(stat(directory(name), &status) == 0 && status.st_mode & 0o777 == 0o600, "\(name)")
        }
    }

    /// All see what the guest prints, and the first has the keyboard until it has gone.
    @Test func severalClientsOfTheSocket() throws {
        let directory = try TemporaryDirectory()
        let machine = try Program.machine(["--console", "unix:" + directory("socket")])
        try machine.waitForError("the console is the socket")
        let first = try Client(socket: directory("socket"))
        try first.ask("echo one", "\none")
        let second = try Client(socket: directory("socket")), third = try Client(socket: directory("socket"))
        for client in [second, third] {
            try client.wait(for: "\r\n[swkvm: read-only: another client has the keyboard]\r\n")
        }
        // What those type is not kept for later either.
        try second.say("poweroff\n")
        try first.ask("echo two", "\ntwo")
        for client in [second, third] { try client.wait(for: "\ntwo") }
        first.close()
        try second.wait(for: "\r\n[swkvm: the keyboard is yours now]\r\n")
        try second.ask("echo three", "\nthree")
        try third.wait(for: "\nthree")
        second.close()
        try third.wait(for: "\r\n[swkvm: the keyboard is yours now]\r\n")
        try third.talk()
        try machine.expectEnd(0)
    }

    /// One that does not read stops neither the guest nor another client, and is told what it has missed.
    @Test func aClientThatDoesNotRead() throws {
        let directory = try TemporaryDirectory()
        let content = (0..<200 * 512).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ $0 >> 9) }
        let disk = try directory.write(content, to: "disk.raw")
        let machine = try Program.machine(["--disk", disk + ",ro", "--console", "unix:" + directory("socket")])
        try machine.waitForError("the console is the socket")
        // It has the keyboard, too.
        let sleeper = try Client(socket: directory("socket"))
        try sleeper.ask("echo ready", "\nready")
        let reader = try Client(socket: directory("socket"))
        try reader.wait(for: "read-only")
        // Half a MiB of text, twice what is kept for a client.
        try sleeper.say("read vda 0 200\necho at the end\n")
        try reader.wait(for: "\nat the end")
        try sleeper.wait(for: " bytes of output are missing here: this client did not read them in time]\r\n")
        try sleeper.talk()
        try machine.expectEnd(0)
    }

    @Test func tooManyClients() throws {
        let directory = try TemporaryDirectory()
        let machine = try Program.machine(["--console", "unix:" + directory("socket")])
        try machine.waitForError("the console is the socket")
        var clients: [Client] = []
        for _ in 0..<16 {
            let client = try Client(socket: directory("socket"))
            if !clients.isEmpty { try client.wait(for: "read-only") }
            clients.append(client)
        }
        let refused = try Client(socket: directory("socket"))
        try refused.wait(for: "[swkvm: the console has 16 clients already]")
        #expect(try refused.isAtEnd())
        // One that goes makes room.
        clients.removeLast().close()
        try Client(socket: directory("socket")).wait(for: "read-only")
        try clients[0].talk()
        try machine.expectEnd(0)
    }
}

/// A user at a console that is elsewhere.
private final class Client {
    private let descriptor: FileDescriptor
    private var transcript = Transcript()

    init(_ descriptor: consuming FileDescriptor) { self.descriptor = descriptor }

    convenience init(socket path: String) throws {
        self.init(try connect(toSocket: path))
    }

    /// Says something and waits for an answer.
    func ask(_ text: String, _ answer: String) throws {
        try descriptor.writeAll((text + "\n").utf8)
        for _ in 0..<9_000 {
            let goesOn = transcript.read(from: descriptor.rawValue)
            if transcript.advance(past: answer) { return }
            if !goesOn { break }
            wait()
        }
        throw TestFailure("the console was asked \"\(text)\", expected \"\(answer)\", got:\n\(transcript.tail)")
    }

    func say(_ text: String) throws { try descriptor.writeAll(text.utf8) }

    func wait(for text: String) throws {
        for _ in 0..<9_000 {
            let goesOn = transcript.read(from: descriptor.rawValue)
            if transcript.advance(past: text) { return }
            if !goesOn { break }
            wait()
        }
        throw TestFailure("the console was expected to bring \"\(text)\", got:\n\(transcript.tail)")
    }

    /// No more will be sent.
    func closeSending() throws {
        guard shutdown(descriptor.rawValue, Int32(SHUT_WR)) == 0 else { throw SystemCallError.last("shutdown") }
    }

    /// The end of the connection, also where a program that was started meanwhile has a copy of the descriptor until
    /// its exec.
    func close() { shutdown(descriptor.rawValue, Int32(SHUT_RDWR)) }

    /// A talk with the guest, at the end of which it powers off.
    func talk() throws {
        try ask("echo hello", "\nhello")
        try descriptor.writeAll("poweroff\n".utf8)
    }

    /// Whether the other side closes, as it should.
    func isAtEnd() throws -> Bool {
        for _ in 0..<9_000 {
            if !transcript.read(from: descriptor.rawValue) { return true }
            wait()
        }
        return false
    }

    private func wait() {
        var entry = pollfd(fd: descriptor.rawValue, events: Int16(POLLIN), revents: 0)
        poll(&entry, 1, 10)
    }
}
