// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// Encrypted disks: the guest sees what it is to see, QEMU reads with the key what the guest has written, and without
/// the key there is no machine.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct EncryptedDiskTests {
    private let directory: TemporaryDirectory
    private static let sectors = 2 << 11

    /// Bytes with a newline at the end, which belongs to the key.
    private static let password = "open sesame\n"

    init() throws {
        directory = try TemporaryDirectory()
        try directory.write(Array(Self.password.utf8), to: "key")
        try directory.write(Array("open barley\n".utf8), to: "wrong")
        try shell("cd '\(directory.path)' && head -c 2M /dev/urandom >disk.raw")
    }

    /// QEMU's words for the image in a place for `IMAGE`.
    @discardableResult
    private func qemu(_ words: String) throws -> String {
        let image = "driver=qcow2,file.filename=disk.qcow2,encrypt.key-secret=s"
        return try shell(
            "cd '\(directory.path)' && "
                + words.replacing("SECRET", with: "--object secret,id=s,file=key").replacing(
                    "IMAGE", with: "--image-opts \(image)"))
    }

    enum Maker: CaseIterable { case swkvm, qemu }
    enum Way: CaseIterable { case file, descriptor }

    /// An image of 16 MiB, which begins with what `disk.raw` has.
    private func make(_ maker: Maker) throws {
        switch maker {
        case .swkvm:
            try shell(
                """
                cd '\(directory.path)' && '\(Host.swkvm)' image create -q --encrypt --iterations 1000 --key-file key disk.qcow2 16M
                """)
        case .qemu:
            // On a busy machine its clock for key derivation fails now and then.
            try shell(
                """
                cd '\(directory.path)'
                for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
                    if qemu-img create -q --object secret,id=s,file=key -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,cluster_size=4k disk.qcow2 16M 2>create.log
                    then exit 0; fi
                    grep -q 'accurate CPU usage' create.log
                done
                exit 1
                """)
        }
        try qemu("qemu-io SECRET IMAGE -c 'write -q -s disk.raw 0 2M'")
    }

    /// Starts a machine with the disk, and its key by a file or a descriptor.
    private func machine(
        _ way: Way, key: String = "key",
        _ start: (_ arguments: [String], _ passing: [(descriptor: Int32, number: Int32)]) throws -> Program
    ) throws -> Program {
        let disk = directory("disk.qcow2")
        switch way {
        case .file: return try start(["--disk", "\(disk),key-file=\(directory(key))"], [])
        case .descriptor:
            let file = try FileDescriptor.open(directory(key), O_RDONLY)
            return try start(["--disk", "\(disk),key-fd=9"], [(file.rawValue, 9)])
        }
    }

    /// The guest's own tests write to the last MiB, attack the device, and find all else as it was.
    @Test(arguments: Maker.allCases, Way.allCases) func theGuestsOwnDiskTests(maker: Maker, way: Way) throws {
        try make(maker)
        let machine = try machine(way) { try Program.machine($0 + ["--cmdline", "test=disk,hostile"], passing: $1) }
        try machine.expectSelfTestsPassed()
        #expect(try qemu("qemu-img check SECRET IMAGE").contains("No errors were found"))
        try qemu("qemu-img convert SECRET IMAGE -O raw whole && cmp -n 2097152 whole disk.raw")
    }

    /// Both directions, sector by sector: the guest's sums are those of what QEMU wrote, and QEMU reads what the guest
    /// wrote.
    @Test(arguments: Way.allCases) func theGuestAndQEMUReadEachOther(way: Way) throws {
        try make(.qemu)
        let content = try readFile(directory("disk.raw"), limit: 8 << 20)
        let guest = try machine(way) { try Program.machineAtPrompt($0, passing: $1) }
        for (start, count) in [(0, 1), (7, 9), (2047, 2), (Self.sectors - 1, 1), (0, Self.sectors)] {
            let sum = crc32(content[start * 512..<(start + count) * 512])
            #expect(try guest.ask("sum vda \(start) \(count)") == ["crc32 vda \(start) \(count) \(hexadecimal(sum))"])
        }
        let text = "written by the guest"
        for sector in [3, 9000] { #expect(try guest.ask("write vda \(sector) \(text)") == ["written"]) }
        try guest.powerOff()
        try qemu("qemu-img check -q SECRET IMAGE && qemu-img convert SECRET IMAGE -O raw whole")
        var expected = content + [UInt8](repeating: 0, count: 14 << 20)
        for sector in [3, 9000] {
            expected.replaceSubrange(
                sector * 512..<(sector + 1) * 512,
                with: Array(text.utf8) + [UInt8](repeating: 0, count: 512 - text.utf8.count))
        }
        let whole = try readFile(directory("whole"), limit: 32 << 20)
        #expect(whole.elementsEqual(expected))
        // Encrypted is what is in the file.
        try shell("! grep -qaF '\(text)' '\(directory("disk.qcow2"))'")
    }

    /// A machine that is not started says why, in a line, and no guest has run.
    private func expectRefused(
        _ machine: Program, _ reason: String, status: Int32 = 66, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        try machine.expectEnd(status, sourceLocation: sourceLocation)
        #expect(machine.errors.text == "swkvm: \(reason)\n", sourceLocation: sourceLocation)
        #expect(machine.output.bytes.isEmpty, sourceLocation: sourceLocation)
    }

    @Test(arguments: Way.allCases) func aWrongKeyStartsNothing(way: Way) throws {
        try make(.swkvm)
        let disk = directory("disk.qcow2"), before = try readFile(disk, limit: 32 << 20)
        let refused = try machine(way, key: "wrong") { try Program.machine($0, passing: $1) }
        try expectRefused(
            refused, "disk \"\(disk)\": the key is wrong; every byte of a key file counts, including a trailing newline"
        )
        #expect(try readFile(disk, limit: 32 << 20) == before)
        // Nor is the image left locked.
        try machine(way) { try Program.machine($0 + ["--cmdline", "test=none"], passing: $1) }.expectEnd(0)
    }

    /// The number stays in use: the image would get it otherwise, and be taken for the console's input.
    @Test func aKeyFromStandardInput() throws {
        try make(.swkvm)
        let disk = directory("disk.qcow2"), key = try FileDescriptor.open(directory("key"), O_RDONLY)
        let machine = try Program.machine(
            ["--disk", "\(disk),key-fd=0", "--kernel", "bundled"], input: .descriptor(key.rawValue))
        try machine.wait(for: Program.prompt)
        let input = try Program(["readlink", "/proc/\(machine.pid)/fd/0"])
        try input.expectEnd(0)
        #expect(input.output.lines == ["/dev/null"])
        machine.send(signal: SIGTERM)
        try machine.expectEnd(0)
        let writing = try FileDescriptor.open("/dev/null", O_WRONLY)
        try expectRefused(
            try Program.machine(["--disk", "\(disk),key-fd=9"], passing: [(writing.rawValue, 9)]),
            "key descriptor 9: it is not open for reading", status: 66)
    }

    /// A key that does not come is waited for, which is said; Ctrl-C ends that.
    @Test func aKeyThatDoesNotComeIsNamed() throws {
        try make(.swkvm)
        let disk = directory("disk.qcow2")
        var ends: [Int32] = [0, 0]
        #expect(pipe(&ends) == 0)
        let reading = FileDescriptor(owning: ends[0]), writing = FileDescriptor(owning: ends[1])
        let machine = try Program.machine(["--disk", "\(disk),key-fd=9"], passing: [(reading.rawValue, 9)])
        try machine.waitForError("waiting for the key from descriptor 9, or its end")
        machine.send(signal: SIGINT)
        #expect(try machine.waitForEnd() != .status(0), "\(machine.story)")
        let tool = try Program(
            [Host.swkvm, "image", "bench", "--key-fd", "9", disk], passing: [(reading.rawValue, 9)])
        try tool.waitForError("waiting for the key from descriptor 9, or its end")
        tool.send(signal: SIGINT)
        #expect(try tool.waitForEnd() != .status(0), "\(tool.story)")
        _ = consume writing
    }

    @Test func whatIsNoKeyStartsNothing() throws {
        try make(.swkvm)
        try directory.write([], to: "empty")
        let disk = directory("disk.qcow2"), raw = directory("disk.raw")
        for (option, reason) in [
            (
                "",
                "disk \"\(disk)\": it is encrypted (LUKS) and no key was given: specify key-file=PATH or key-fd=N"
            ),
            (",key-file=\(directory("none"))", "key file \"\(directory("none"))\": open: No such file or directory"),
            (",key-file=\(directory("empty"))", "key file \"\(directory("empty"))\": it is empty"),
            (",key-fd=77", "key descriptor 77: it is not open"),
            (",key-fd=1", "key descriptor 1: standard output and standard error cannot be a key's"),
            (",key-fd=2", "key descriptor 2: standard output and standard error cannot be a key's"),
            (
                ",key-file=\(directory("key")),key-file=\(directory("key"))",
                "disk \"\(disk)\": 2 keys were given, but of the image and its backing files 1 is encrypted"
            ),
        ] {
            let isUsage = reason.contains("no key was given") || reason.contains("keys were given")
            try expectRefused(try Program.machine(["--disk", disk + option]), reason, status: isUsage ? 64 : 66)
        }
        try expectRefused(
            try Program.machine(["--disk", "\(raw),key-file=\(directory("key"))"]),
            "disk \"\(raw)\": 1 key was given, but of the image and its backing files none is encrypted", status: 64)
    }
}
