// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

/// A guest that has as much under way as its disk announces that it takes: 64 reads of 1016 MiB over the same 4 MiB of
/// RAM. Neither a reset nor the end of the machine carries them out. The measure is CPU time, of which each read takes
/// the same.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct FloodTests {
    private let directory: TemporaryDirectory
    private var image: String { directory("disk.qcow2") }
    /// Where the disk has no cluster yet, in sectors.
    private static let tail = 1024 << 11

    /// - Parameter isAllocated: whether there is something for the host's kernel to read; otherwise swkvm makes zeroes.
    private func makeImage(isAllocated: Bool) throws {
        let options = "lazy_refcounts=on" + (isAllocated ? ",preallocation=metadata" : "")
        try shell(
            """
            cd '\(directory.path)'
            qemu-img create -q -f qcow2 -o \(options) disk.qcow2 1G
            qemu-img resize -q disk.qcow2 1088M
            """)
    }

    init() throws { directory = try TemporaryDirectory() }

    /// - Returns: the machine, and the CPU time that a read takes from its beginning to its end.
    private func machine(_ options: String) throws -> (Program, read: Double) {
        let machine = try Program.machineAtPrompt(["--disk", image + options])
        #expect(try machine.ask("write vda \(Self.tail) pattern 200") == ["written"])
        let before = try machine.processorTime
        let lines = try machine.ask("flood vda 1 wait")
        #expect(lines.first == "flood vda: 1 reads of 1065353216 bytes" && lines.count == 3, "\(lines)")
        return (machine, try machine.processorTime - before)
    }

    /// The image as it is when it has been closed: no lock, no mark of a writer, no error, and all that was written.
    private func expectClosed(_ sum: String) throws {
        // The header's incompatible features: the dirty bit.
        #expect(try shell("od -An -v -tx1 -j72 -N8 '\(image)'") == "\(String(repeating: " 00", count: 8))\n")
        let check = try Program([Host.swkvm, "image", "check", image])
        #expect(try check.waitForEnd() == .status(0), "\(check.story)")
        #expect(try shell("qemu-img check '\(image)'").contains("No errors were found"))
        let machine = try Program.machineAtPrompt(["--disk", image])
        #expect(try machine.ask("sum vda \(Self.tail) 200") == [sum])
        try machine.powerOff()
    }

    private static let cases = [(true, ",cache=none"), (true, ",cache=none,queues=2"), (false, "")]

    @Test(arguments: cases) func aResetDoesNotCarryOutWhatIsUnderWay(isAllocated: Bool, options: String) throws {
        try makeImage(isAllocated: isAllocated)
        let (machine, read) = try machine(options)
        let sum = try machine.ask("sum vda \(Self.tail) 200")
        let before = try machine.processorTime
        let lines = try machine.ask("flood vda 64 reset")
        #expect(lines.count == 2 && lines[0] == "flood vda: 64 reads of 1065353216 bytes", "\(lines)")
        #expect(lines.last?.hasPrefix("flood vda: reset within ") == true)
        let taken = try machine.processorTime - before
        #expect(taken < 8 * read, "\(taken) s of CPU time, and \(read) s for a read")
        // The device is as good as new.
        #expect(try machine.ask("sum vda \(Self.tail) 200") == sum)
        try machine.powerOff()
        try expectClosed(try #require(sum.first))
    }

    @Test(arguments: cases) func twoSignalsEndAMachineWhateverIsUnderWay(isAllocated: Bool, options: String) throws {
        try makeImage(isAllocated: isAllocated)
        let (machine, read) = try machine(options)
        let sum = try machine.ask("sum vda \(Self.tail) 200")
        try machine.type("flood vda 64 endless\n")
        try machine.wait(for: "in flight")
        machine.send(signal: SIGTERM)
        try machine.waitForError("asked the guest to power off")
        usleep(1_100_000)
        #expect(machine.isRunning, "\(machine.story)")
        let before = try machine.processorTime
        machine.send(signal: SIGTERM)
        try machine.expectEnd(143)
        let taken = try machine.processorTime - before
        #expect(taken < 8 * read, "\(taken) s of CPU time, and \(read) s for a read")
        try expectClosed(try #require(sum.first))
    }
}
