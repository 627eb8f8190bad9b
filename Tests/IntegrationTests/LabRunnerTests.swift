// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

/// The lab's runner (Tests/Lab/run), with scripts in place of emulators: when it takes one for hung, and that it leaves
/// none behind.
@Suite(.timed) struct LabRunnerTests {
    private static let path = Host.package + "/Tests/Lab/run"

    private let directory: TemporaryDirectory

    init() throws { directory = try TemporaryDirectory() }

    /// A leg whose emulator is a script, and what it does before it starts the emulator. A host has a second for its
    /// boot, and for each case a second more than its limit.
    private func leg(_ script: String, preparation: String = "", settings: String = "") throws -> String {
        try directory.write(Array(script.utf8), to: "emulator")
        let leg = """
            title=Script emulator=sh kernels= archives= slowness=1 noise='^$'
            limits='--boot 1 --silence 1' \(settings)
            emulate() {
                \(preparation)
                exec "${console[@]}" sh '\(directory("emulator"))' "$1"
            }
            """
        return try directory.write(Array(leg.utf8), to: "leg")
    }

    /// The runner with such a leg.
    private func runner(_ script: String, preparation: String = "", settings: String = "") throws -> Program {
        try Program([Self.path, try leg(script, preparation: preparation, settings: settings)])
    }

    /// An emulator that only SIGKILL ends.
    private static let stubborn = """
        trap '' HUP TERM INT
        echo '# begin a limit 1000'
        echo "# emulator $$"
        while :; do sleep 1; done
        """

    /// The emulator's process, which its script has printed.
    private func emulator(of runner: Program) throws -> pid_t {
        try runner.wait(for: "# emulator ")
        try runner.wait(for: "\n")
        let line = try #require(runner.output.lines.last { $0.hasPrefix("# emulator ") })
        return try #require(pid_t(line.dropFirst("# emulator ".count)))
    }

    @Test(arguments: [SIGKILL, SIGTERM, SIGHUP]) func aRunnerThatEndsLeavesNoEmulator(signal: Int32) throws {
        let runner = try runner(Self.stubborn)
        let emulator = try emulator(of: runner)
        runner.send(signal: signal)
        #expect(try eventually { kill(emulator, 0) != 0 })
    }

    /// An emulator inherits ignored signals from the parent of its runner.
    @Test(arguments: [SIGKILL, SIGHUP]) func aRunnerThatIgnoresTerminationLeavesNoEmulator(signal: Int32) throws {
        let leg = try leg(Self.stubborn)
        let runner = try Program(["sh", "-c", "trap '' TERM; exec \"$@\"", "sh", Self.path, leg])
        let emulator = try emulator(of: runner)
        runner.send(signal: signal)
        #expect(try eventually { kill(emulator, 0) != 0 })
    }

    /// Before Bochs starts, its leg writes an image to boot from, which takes seconds.
    @Test func aRunnerThatEndsBeforeItsEmulatorStartsLeavesNoEmulator() throws {
        let runner = try runner(
            "touch '\(directory("started"))'",
            preparation: "echo \"# emulator $BASHPID\"; until [ -e '\(directory("go"))' ]; do sleep 0.1; done")
        let emulator = try emulator(of: runner)
        runner.send(signal: SIGKILL)
        try runner.waitForExit()
        try directory.write([UInt8](), to: "go")
        #expect(try eventually { kill(emulator, 0) != 0 })
        #expect(try !directory.contents.contains("started"))
    }

    @Test(arguments: [SIGTERM, SIGHUP, SIGINT]) func aShellWhoseRunnerEndsRestoresTheTerminal(signal: Int32) throws {
        let terminal = try PseudoTerminal()
        let mode = terminal.mode
        let leg = try leg("stty raw -echo; echo \"# emulator $$\"; while :; do sleep 1; done")
        let runner = try Program([Self.path, leg, "shell"], terminal: terminal)
        let emulator = try emulator(of: runner)
        #expect(terminal.isRaw)
        runner.send(signal: signal)
        try runner.waitForExit()
        #expect(terminal.mode == mode)
        #expect(try eventually { kill(emulator, 0) != 0 })
    }

    @Test func anEmulatorThatTheMachineHasNoTimeForDoesNotHang() throws {
        let runner = try runner(
            "echo '# begin a limit 0'; echo \"# emulator $$\"; kill -STOP $$; echo 'ok 1 - a'; echo 1..1")
        let emulator = try emulator(of: runner)
        // Longer on the wall's clock than it may be silent on its own.
        usleep(3_000_000)
        #expect(kill(emulator, SIGCONT) == 0)
        try runner.expectEnd(0)
        #expect(runner.output.text.contains("Script lab: 1 passed, 0 failed"))
    }

    @Test(arguments: ["while :; do :; done", "sleep 1000"]) func anEmulatorThatIsSilentHangs(script: String) throws {
        let runner = try runner("echo '# begin a limit 0'; \(script)")
        try runner.expectEnd(1)
        #expect(
            runner.output.text.contains(
                "# the emulated host hung during a (sh's status 124): a failure of the emulation"))
        #expect(runner.output.text.contains("not ok - the emulated host hung during a"))
    }

    /// Only the start of a case begins a new limit.
    @Test(arguments: ["while :; do echo '# waits'; sleep 0.2; done", "yes '# waits'"])
    func anEmulatorThatPrintsForeverHangs(script: String) throws {
        let runner = try runner("echo '# begin a limit 0'; \(script)")
        try runner.expectEnd(1)
        #expect(runner.output.text.contains("not ok - the emulated host hung during a"))
    }

    @Test func theUnfinishedLastLineOfAnEmulatorThatHangsIsPrinted() throws {
        let runner = try runner("echo '# begin a limit 0'; printf 'a prompt> '; sleep 1000")
        try runner.expectEnd(1)
        #expect(runner.output.lines.contains("# emulated host> a prompt> "))
    }

    @Test func anEmulatorThatEndsTwiceDuringACaseIsAFailureWithItsStatus() throws {
        let runner = try runner("echo '# begin a limit 1'; exit 7")
        try runner.expectEnd(1)
        #expect(runner.output.text.contains("not ok - the emulated host ended during a (sh's status 7)"))
    }

    /// What was done before is not done again.
    @Test func anEmulatorThatEndsOnceGoesOnWithTheCase() throws {
        let runner = try runner(
            """
            case $1 in
                *from=b\\ count=2*) echo '# begin b limit 1'; echo 'ok 3 - b'; echo 1..3 ;;
                *from=*) echo "not ok - told $1" ;;
                *) echo '# begin a limit 1'; echo 'ok 1 - a'; echo 'ok 2 - a'; echo '# begin b limit 1'; exit 7 ;;
            esac
            """)
        try runner.expectEnd(0)
        #expect(runner.output.text.contains("Restarting it, from b on"))
        #expect(runner.output.lines.last?.contains("3 passed, 0 failed") == true)
    }

    /// A leg may allow some cases a second run, over restarts of its host too.
    @Test func casesThatWereRunASecondTimeAreCounted() throws {
        let runner = try runner(
            """
            case $1 in
                *repeats=1*from=b*) echo '# begin b limit 1'; echo 'ok 2 - b'; echo 1..2 ;;
                *repeats=2*)
                    echo '# begin a limit 1'; echo '# repeated a, which failed'; echo 'ok 1 - a'
                    echo '# begin b limit 1' ;;
                *) echo "not ok - told $1" ;;
            esac
            """, settings: "repeats=2")
        try runner.expectEnd(0)
        #expect(runner.output.lines.contains("# repeated a, which failed"))
        #expect(runner.output.lines.contains("# cases that were run a second time: 1"))
        #expect(runner.output.lines.last?.contains("2 passed, 0 failed") == true)
    }

    /// What a program draws on a screen is one line of a megabyte for a reader of lines.
    @Test func aLongLineOfEscapeSequencesIsRead() throws {
        let runner = try runner(
            """
            echo '# begin a limit 0'
            yes "$(printf '\\033[1;1H\\033[0;37mscreen\\033[5C')" | head -n 50000 | tr -d '\\n'
            printf '\\r\\n\\033cok 1 - a\\n1..1\\n'
            """)
        try runner.expectEnd(0)
        let screen = try #require(runner.output.lines.first { $0.hasPrefix("# emulated host> screenscreen") })
        #expect(screen.hasSuffix("bytes more]") && screen.utf8.count < 5000)
        #expect(runner.output.lines.contains("ok 1 - a"))
    }

    /// The end of a line ends every escape sequence, and so does the start of another one.
    @Test func aLineThatEndsWithinAnEscapeSequenceIsALine() throws {
        let runner = try runner(
            #"""
            printf 'ok 1 - a\033\nok 2 - b\033(\nok 3 - c\033[\nok 4 - d\033]\n'
            printf 'ok 5 - e\033(\033[0m\033\033[1mf\n1..5\n'
            """#)
        try runner.expectEnd(0)
        let results = runner.output.lines.filter { $0.hasPrefix("ok ") }
        #expect(results == ["ok 1 - a", "ok 2 - b", "ok 3 - c", "ok 4 - d", "ok 5 - ef"])
    }

    @Test func anEmulatorGetsTheSecondsThatItHad() throws {
        let runner = try runner(
            "echo '# begin a limit 3'; read -r first; read -r second; echo \"ok 1 - $((second - first))\"; echo 1..1",
            settings: "clock=/dev/null")
        try runner.expectEnd(0)
        #expect(runner.output.lines.contains("ok 1 - 1"))
    }
}
