import Glibc
import Linux
import Testing

/// Remote disks as a machine and the tools meet them: over NBD, from a server that comes and goes.
@Suite(.enabled(if: Host.isFit, Host.needed)) struct RemoteDiskTests {
    private let directory: TemporaryDirectory

    init() throws {
        directory = try TemporaryDirectory()
        try shell("cd '\(directory.path)'; head -c 3145728 /dev/urandom >disk.raw; truncate -s 64M scratch.raw")
    }

    private func address(_ options: String = "") -> String { "nbd+unix:///disk?socket=\(directory("socket"))\(options)" }

    /// Starts a server, which listens when this returns.
    private func serve(_ file: String, _ options: [String] = []) throws -> Program {
        let server = try Program(["qemu-nbd", "-t", "-f", "raw", "-x", "disk", "-k", directory("socket")] + options + [directory(file)])
        #expect(try eventually { (try? connect(toSocket: directory("socket"))) != nil })
        return server
    }

    private func kill(_ server: Program) throws {
        server.send(signal: SIGKILL)
        _ = try server.finish()
    }

    @Test func theGuestUsesARemoteDisk() throws {
        let server = try serve("disk.raw")
        let machine = try Program.machineAtPrompt(["--disk", address() + ",serial=far"])
        #expect(try machine.ask("disks")[0].hasPrefix("vda: 6144 sectors, read-write"))
        let sum = crc32(try readFile(directory("disk.raw"), limit: 8 << 20))
        #expect(try machine.ask("sum vda 0 6144") == ["crc32 vda 0 6144 \(hexadecimal(sum))"])
        #expect(try machine.ask("write vda 3 written by the guest") == ["written"])
        let file = try readFile(directory("disk.raw"), limit: 8 << 20)
        #expect(file[3 * 512..<3 * 512 + 20] == Array("written by the guest".utf8)[...])
        try machine.powerOff()
        try kill(server)
    }

    @Test func aReadOnlyExportIsReadOnly() throws {
        let server = try serve("disk.raw", ["-r"])
        let refused = try Program.machine(["--disk", address()])
        try refused.expectEnd(71)
        #expect(refused.errors.text.contains("the server offers it read-only; or add ,ro"))
        let machine = try Program.machineAtPrompt(["--disk", address() + ",ro"])
        #expect(try machine.ask("write vda 5 no") != ["written"])
        try machine.powerOff()
        try kill(server)
    }

    /// The guest's own test of its disk, while the server is killed and comes again: the guest notices nothing.
    @Test func theServerIsKilledUnderAWorkload() throws {
        var server = try serve("scratch.raw")
        let machine = try Program.machine(["--cmdline", "test=disk", "--disk", address("&reconnect=60")])
        try machine.waitUntilRunning()
        for _ in 0..<5 {
            try kill(server)
            server = try serve("scratch.raw")
        }
        try machine.expectSelfTestsPassed()
        try kill(server)
    }

    @Test func aServerThatIsGone() throws {
        let server = try serve("disk.raw")
        let machine = try Program.machineAtPrompt(["--disk", address() + ",reconnect=0"])
        try kill(server)
        try machine.waitForError("connection lost")
        // The guest gets its error, and its machine ends as it should.
        #expect(try machine.ask("write vda 5 lost") != ["written"])
        let again = try serve("disk.raw")
        try machine.waitForError("connected again")
        #expect(try machine.ask("write vda 5 there") == ["written"])
        // With a server that says nothing the machine ends too.
        again.send(signal: SIGSTOP)
        try machine.type("write vda 6 nowhere\n")
        try machine.wait(for: "write vda 6")
        #expect(try eventually {
            machine.send(signal: SIGTERM)
            return !machine.isRunning
        })
        again.send(signal: SIGCONT)
        try kill(again)
    }

    /// A server that never answers holds no tool up whose user ends it.
    @Test func anInterruptedConversionLeavesNothing() throws {
        let server = try Program([
            "nbdkit", "-f", "-U", directory("socket"), "--filter=delay", "file", directory("disk.raw"), "delay-read=3600",
        ])
        #expect(try eventually { (try? connect(toSocket: directory("socket"))) != nil })
        let before = try directory.contents
        let tool = try Program([
            Host.swkvm, "image", "convert", "--progress", "nbd+unix:///?socket=\(directory("socket"))", directory("new.qcow2"),
        ])
        try tool.waitForError("%")
        tool.send(signal: SIGTERM)
        try tool.expectEnd(1)
        #expect(tool.errors.text.contains("interrupted; nothing was made"))
        #expect(try directory.contents == before)
        try kill(server)
    }
}
