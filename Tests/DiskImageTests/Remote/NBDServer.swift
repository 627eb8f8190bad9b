// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import Testing

/// A server of a remote disk in another process, on a UNIX socket; killed when the value goes.
/// One thread at a time uses it: hence `Sendable`.
final class NBDServer: @unchecked Sendable {
    private let command: [String]
    private let socket: String
    private let listening: () -> SocketAddress?
    private var process: pid_t = 0
    private var stream: FileDescriptor?

    /// The address of the export without a name, or of another one.
    func address(_ export: String = "", _ options: String = "") -> String {
        "nbd+unix:///\(export)?socket=\(socket)\(options)"
    }

    /// - Parameter command: with `SOCKET` for the path of the socket.
    init(_ directory: TemporaryDirectory, _ command: [String], socket name: String = "socket") throws {
        socket = directory.file(name)
        let path = socket
        self.command = command.map { $0.replacing("SOCKET", with: path) }
        listening = { SocketAddress(unixPath: path) }
        try start()
    }

    /// A server that listens elsewhere.
    init(_ command: [String], listening: @escaping () -> SocketAddress?) throws {
        socket = ""
        self.command = command
        self.listening = listening
        try start()
    }

    /// `qemu-nbd` of a file.
    convenience init(
        _ directory: TemporaryDirectory, image: String, _ options: [String] = [], format: String = "raw"
    ) throws {
        try self.init(
            directory, ["qemu-nbd", "-t", "-k", "SOCKET", "-f", format, "--discard=unmap"] + options + [image])
    }

    /// `nbdkit`, with filters, a plugin and their parameters.
    convenience init(_ directory: TemporaryDirectory, nbdkit words: String..., socket: String = "socket") throws {
        try self.init(directory, ["nbdkit", "-f", "-U", "SOCKET"] + words, socket: socket)
    }

    deinit { kill() }

    func start() throws {
        unlink(socket)
        let program = try RunningProgram(command)
        process = program.process
        // The process is ours to wait for; its output is read by nobody, and is little.
        stream = try program.stream.duplicate()
        var attempts = 0
        while !isListening() {
            attempts += 1
            var status: Int32 = 0
            let isOver = waitpid(process, &status, WNOHANG) == process
            if isOver || attempts > 2000 {
                if isOver { process = 0 }
                let output = isOver ? output() : "still nothing"
                throw SystemCallError("\(command.joined(separator: " ")): \(output)", errno: ECONNREFUSED)
            }
            usleep(5000)
        }
    }

    /// As a server that crashes.
    func kill() {
        guard process > 0 else { return }
        defer { process = 0 }
        var status: Int32 = 0
        if waitpid(process, &status, WNOHANG) == process {
            // What a test says of a server is about one that lives. nbdkit (1.32) aborts now and then, when a client
            // has gone to whom one of its threads was about to answer: at the end of a test that is no concern of ours.
            let said = output()
            if status == SIGABRT, said.contains("raw_send_socket: Assertion") { return }
            Issue.record("\(command.joined(separator: " ")) has ended by itself with the status \(status): \(said)")
            return
        }
        Glibc.kill(process, SIGCONT)
        Glibc.kill(process, SIGKILL)
        waitpid(process, &status, 0)
    }

    /// It still has its connections, and says nothing any more when this returns.
    func stop() {
        Glibc.kill(process, SIGSTOP)
        // The kernel says so once the last thread has stopped; until then it may answer.
        var status: Int32 = 0
        let changed = waitpid(process, &status, WUNTRACED)
        #expect(changed == process && status & 0xff == 0x7f, "the server was to stop, and has the status \(status)")
    }
    func resume() { Glibc.kill(process, SIGCONT) }

    private func output() -> String {
        var bytes = [UInt8](repeating: 0, count: 4096)
        let got = bytes.withUnsafeMutableBytes { Glibc.read(stream?.rawValue ?? -1, $0.baseAddress, $0.count) }
        return String(decoding: bytes.prefix(max(0, got)), as: UTF8.self)
    }

    private func isListening() -> Bool {
        guard let address = listening() else { return false }
        let family: Int32 = socket.isEmpty ? AF_INET : AF_UNIX
        let descriptor = FileDescriptor(
            owning: Glibc.socket(family, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0))
        return address.withAddress { connect(descriptor.rawValue, $0, $1) } == 0
    }
}

/// What a remote disk's connection has reported.
final class Reports: @unchecked Sendable {
    private let monitor = Monitor()
    private var lines: [String] = []

    var all: [String] { monitor.locked { lines } }
    func add(_ line: String) { monitor.locked { lines.append(line) } }
}
