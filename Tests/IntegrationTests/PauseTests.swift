// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// A machine that is paused and resumed by a key, over and over.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct PauseTests {
    private let directory: TemporaryDirectory
    private let host: Namespace
    private let terminal: PseudoTerminal
    private static let key = "\u{1}p"

    init() throws {
        directory = try TemporaryDirectory()
        host = try Namespace()
        terminal = try PseudoTerminal()
        try host.shell("ip link add br0 type bridge; ip addr add 192.168.77.1/24 dev br0; ip link set br0 up")
    }

    private func machine(_ disks: [String], cpus: Int = 2) throws -> Program {
        try Program.machineAtPrompt(
            ["--cpus", "\(cpus)", "--net", "tap=tap0,bridge=br0"] + disks.flatMap { ["--disk", $0] },
            words: "ip=192.168.77.2/24", in: host,
            terminal: terminal)
    }

    private func pauseAndResume(_ machine: Program) throws {
        try machine.type(Self.key)
        try machine.wait(for: "swkvm: the machine is paused")
        try machine.type(Self.key)
        try machine.wait(for: "swkvm: the machine is running")
    }

    /// What the guest has printed, without line ends: a message may be between any two of its letters.
    private func letters(of machine: Program) -> String {
        var letters = machine.output.text.filter { !$0.isNewline }
        for message in ["swkvm: the machine is paused", "swkvm: the machine is running"] {
            while letters.firstOccurrence(of: message) != nil { letters = letters.replacing(first: message, with: "") }
        }
        return letters
    }

    /// What the guest's driver has counted.
    private func frames(_ machine: Program) throws -> (received: Int, sent: Int, dropped: Int) {
        // eth0: received 3, sent 3, dropped 0
        let line = try machine.ask("net").last ?? ""
        let numbers = line.split(whereSeparator: { !$0.isNumber }).dropFirst().compactMap { Int($0) }
        try #require(numbers.count == 3, "\(line)")
        return (numbers[0], numbers[1], numbers[2])
    }

    /// 200 pauses while the guest writes one sector after the other and answers the host's packets: every packet is
    /// answered, and the disk is the one that a machine writes that is not paused.
    @Test(arguments: [("raw", ""), ("qcow2", ""), ("qcow2", ",queues=2")]) func underLoad(
        format: String, options: String
    ) throws {
        let swkvm = Host.swkvm
        let paused = directory("paused.\(format)"), plain = directory("plain.\(format)")
        for path in [paused, plain] { try shell("\(swkvm) image create -f \(format) \(path) 1100M") }
        let machine = try machine(["\(paused)\(options)", plain])
        let before = try frames(machine)
        let pings = try Program(["ping", "-q", "-c", "1000", "-i", "0.005", "-W", "60", "192.168.77.2"], in: host)
        try machine.type("write vda 0 pattern 3000\r")
        for _ in 0..<150 { try pauseAndResume(machine) }
        // Comes behind the command, which may have ended among the pauses: then messages may be between its letters.
        #expect(try machine.ask("echo first").last == "first")
        #expect(letters(of: machine).contains("written"))
        // Large requests, several at a time.
        try machine.type("flood vda 2 wait\r")
        for _ in 0..<50 { try pauseAndResume(machine) }
        #expect(try machine.ask("echo second").last == "second")
        // ping itself does not wait for its last answers when they take longer than the others.
        try pings.waitForEnd()
        #expect(
            try eventually {
                let now = try frames(machine)
                return now.received >= before.received + 1000 && now.sent >= before.sent + 1000
            })
        let after = try frames(machine)
        #expect(after.dropped == 0)
        #expect(
            try eventually { try Int(host.shell("awk '$1 == \"tap0:\" { printf $3 }' /proc/net/dev")) == after.sent })
        try machine.type("write vdb 0 pattern 3000\r")
        try machine.wait(for: "written")
        #expect(try machine.ask("ping 192.168.77.1 2").last?.contains("2 of 2 came back") == true)
        try machine.powerOff()
        try shell("\(swkvm) image compare \(paused) \(plain)")
    }

    /// A paused guest does nothing, and takes up what has come meanwhile.
    @Test func whatComesInAPause() throws {
        try directory.write([UInt8](repeating: 7, count: 1 << 20), to: "disk.raw")
        let machine = try machine([directory("disk.raw")])
        try machine.type(Self.key)
        try machine.wait(for: "swkvm: the machine is paused")
        #expect(try host.shell("ping -q -c 3 -i 0.1 -W 1 192.168.77.2 || true").contains("0 received"))
        try machine.type("echo typed in the pause\r")
        try machine.type(Self.key)
        try machine.wait(for: "swkvm: the machine is running")
        // The guest may have been quicker than that message.
        #expect(try machine.ask("echo over").last == "over")
        #expect(letters(of: machine).contains("echo typed in the pausetyped in the pause"))
        #expect(try host.shell("ping -q -c 3 -i 0.1 -W 60 192.168.77.2").contains("3 received"))
        try machine.powerOff()
    }

    @Test func endsWhilePaused() throws {
        for keys in ["\u{1}x", "signal"] {
            let machine = try machine([])
            try machine.type(Self.key)
            try machine.wait(for: "swkvm: the machine is paused")
            if keys == "signal" {
                machine.send(signal: SIGTERM)
                try machine.wait(for: "the machine is paused: the guest can power off only after it has been resumed")
                machine.sendOneMore(signal: SIGTERM)
                try machine.expectEnd(143)
            } else {
                try machine.type(keys)
                try machine.expectEnd(104)
            }
        }
    }

    /// A power button that is pressed in a pause is seen after it.
    @Test func powersOffAfterAPause() throws {
        let machine = try machine([])
        try machine.type(Self.key)
        try machine.wait(for: "swkvm: the machine is paused")
        machine.send(signal: SIGTERM)
        try machine.wait(for: "after it has been resumed")
        try machine.type(Self.key)
        try machine.expectEnd(0)
    }
}
