// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

/// The bundled guest's prompt: what keys do to a line.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct PromptTests {
    private static let up = "\u{1b}[A", down = "\u{1b}[B", right = "\u{1b}[C", left = "\u{1b}[D"

    /// Types keys and the end of the line, and returns the answer's last line.
    private func answer(_ machine: Program, _ keys: String) throws -> String {
        try machine.type(keys + "\r")
        try machine.wait(for: Program.prompt)
        let lines = machine.output.lines
        return lines.count > 1 ? lines[lines.count - 2] : ""
    }

    @Test func keysMoveInTheLineAndChangeIt() throws {
        let machine = try Program.machineAtPrompt()
        for (keys, line) in [
            ("echo ac\(Self.left)b", "abc"),
            ("eco one\(Self.left)\(Self.left)\(Self.left)\(Self.left)\(Self.left)h", "one"),
            ("cho two\u{1b}[He", "two"), ("cho three\u{1b}OHe\u{1b}OF!", "three!"),
            ("cho four\u{1b}[1~e\u{1b}[4~!", "four!"),
            ("xecho five\u{1}\u{4}", "five"), ("xecho six\u{1b}[7~\u{1b}[3~\u{1b}[8~!", "six!"),
            ("echo seven of them\u{17}\u{17}", "seven "),
            ("echo eight nine\u{2}\u{2}\u{2}\u{2}\u{2}\u{b}", "eight"), ("what\u{15}echo nine", "nine"),
            ("echo tenn\u{7f}\u{8}n", "ten"),
            ("echo ab\(Self.left)\(Self.left)\(Self.right)-\u{5}!", "a-b!"),
            ("echo \(Self.right)\(Self.right)x\u{6}y", "xy"),
        ] {
            // Ctrl-A is swkvm's only on a terminal.
            #expect(try answer(machine, keys) == line, "\(keys.debugDescription)")
        }
        try machine.powerOff()
        // What is drawn is letters, backspaces and spaces.
        #expect(!machine.output.bytes.contains(0x1b))
    }

    @Test func earlierLinesComeBack() throws {
        let machine = try Program.machineAtPrompt()
        for word in ["one", "two", "two", "three"] { #expect(try answer(machine, "echo \(word)") == word) }
        #expect(try answer(machine, Self.up) == "three")
        // A line that is given twice in a row is kept once, and an empty one not at all.
        _ = try answer(machine, "")
        #expect(try answer(machine, Self.up + Self.up) == "two")
        #expect(try answer(machine, Self.up + Self.up + Self.up + Self.up + Self.up + Self.up + Self.up) == "one")
        // The new line is still there behind the last.
        #expect(try answer(machine, "echo new\(Self.up)\(Self.up)\(Self.down)\(Self.down)\(Self.down)er") == "newer")
        #expect(try answer(machine, "\u{10}\u{10}\u{e}") == "newer")
        // An earlier line can be changed, and its shorter successor leaves nothing of it.
        #expect(try answer(machine, "echo a much longer line than the others") == "a much longer line than the others")
        #expect(try answer(machine, "\(Self.up)\(Self.up)!") == "newer!")
        try machine.powerOff()
    }

    /// Keys that mean nothing here, whatever their sequence looks like, leave no part of it in the line.
    @Test func noEscapeSequenceGetsIntoTheLine() throws {
        let machine = try Program.machineAtPrompt()
        for sequence in [
            "\u{1b}[5~", "\u{1b}[6~", "\u{1b}[2~", "\u{1b}[15~", "\u{1b}[1;5C", "\u{1b}[1;2P", "\u{1b}OP", "\u{1b}OS",
            "\u{1b}[200~", "\u{1b}[201~", "\u{1b}[Z",
            "\u{1b}[<0;10;10M", "\u{1b}[?62;c", "\u{1b}b", "\u{1b}\u{1b}[A\u{e}", "\t", "\u{1b}[99999999999999999999~",
        ] {
            #expect(try answer(machine, "echo x\(sequence)y") == "xy", "\(sequence.debugDescription)")
        }
        // In two pieces, as a slow line brings it.
        try machine.type("echo ac\u{1b}")
        #expect(machine.isRunning)
        #expect(try answer(machine, "[Db") == "abc")
        // Cut short: the end of the line is one.
        #expect(try answer(machine, "echo z\u{1b}[") == "z")
        try machine.powerOff()
        #expect(!machine.output.bytes.contains(0x1b))
    }

    @Test(arguments: [("exit\r", 0), ("exit 7\r", 7), ("exit 63\r", 63), ("\u{4}", 0)] as [(String, Int32)])
    func exitEndsTheMachine(keys: String, status: Int32) throws {
        let machine = try Program.machineAtPrompt()
        try machine.type(keys)
        try machine.expectEnd(status)
    }

    @Test func exitWithAStatusThatIsNone() throws {
        let machine = try Program.machineAtPrompt()
        for words in ["exit 64", "exit -1", "exit now", "exit 1 2"] {
            #expect(try machine.ask(words) == ["usage: exit [STATUS], 0 to 63"])
        }
        try machine.powerOff()
    }

    /// The bundled guest reads all of its command line, as long as it may be.
    @Test func theLastWordsOfALongCommandLine() throws {
        let filling = String(repeating: "x", count: 60_000)
        let machine = try Program.machine(["--cmdline", "\(filling) run='echo the last word'"])
        try machine.expectEnd(0)
        #expect(machine.output.lines.last == "the last word")
    }
}
