// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

/// swkvm as a job of a shell: in the background, stopped, and in the foreground again.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct JobTests {
    private let terminal: PseudoTerminal
    private let shell: Program
    private let cooked: [UInt8]

    init() throws {
        terminal = try PseudoTerminal()
        shell = try Program(
            ["env", "PS1=READY\\n", "bash", "--norc", "--noprofile", "--noediting", "-i"], terminal: terminal)
        try shell.wait(for: "READY\r\n")
        cooked = terminal.mode
    }

    private var machine: pid_t? {
        (try? IntegrationTests.shell("pgrep -P \(shell.pid) -x swkvm")).flatMap {
            $0.split(separator: "\n").compactMap { pid_t($0) }.first
        }
    }

    private func bringToTheForeground() throws {
        try shell.type("fg\r")
        #expect(try eventually { terminal.isRaw }, "\(shell.story)")
        #expect(try shell.ask("echo in the foreground").contains("in the foreground"))
    }

    private func end() throws {
        try shell.type("poweroff\r")
        try shell.wait(for: "READY\r\n")
        #expect(terminal.mode == cooked)
        try shell.type("exit\r")
        _ = try shell.waitForEnd()
    }

    /// The shell sends a job that runs no signal when it brings it to the foreground.
    @Test func fromTheBackgroundToTheForeground() throws {
        try shell.type("\(Host.swkvm) run --mem 64M &\r")
        try shell.wait(for: Program.prompt)
        #expect(terminal.mode == cooked)
        try bringToTheForeground()
        try end()
    }

    @Test(arguments: [SIGSTOP, SIGTSTP]) func stoppedAndContinued(signal: Int32) throws {
        try shell.type("\(Host.swkvm) run --mem 64M\r")
        try shell.wait(for: Program.prompt)
        #expect(terminal.isRaw)
        for _ in 0..<2 {
            let machine = try #require(machine)
            kill(machine, signal)
            try shell.wait(for: "READY\r\n")
            #expect(try eventually { terminal.mode == cooked })
            try bringToTheForeground()
        }
        try end()
    }

    /// The whole group is killed, as a shell or `pkill -g` does it: the guardian is in none.
    @Test func theGroupIsKilled() throws {
        try shell.type("\(Host.swkvm) run --mem 64M\r")
        try shell.wait(for: Program.prompt)
        let machine = try #require(machine)
        #expect(getpgid(machine) == machine)
        // The shell would repair the mode itself; it has to wait until the guardian has.
        kill(shell.pid, SIGSTOP)
        kill(-machine, SIGKILL)
        #expect(try eventually { terminal.mode == cooked })
        kill(shell.pid, SIGCONT)
        kill(shell.pid, SIGKILL)
    }

    /// In the background the terminal is the shell's, also when the machine is killed there.
    @Test func killedInTheBackground() throws {
        try shell.type("\(Host.swkvm) run --mem 64M &\r")
        try shell.wait(for: Program.prompt)
        try bringToTheForeground()
        let machine = try #require(machine)
        kill(machine, SIGSTOP)
        try shell.wait(for: "READY\r\n")
        try shell.type("bg\r")
        try shell.wait(for: "READY\r\n")
        try shell.type("stty -echo\r")
        try shell.wait(for: "READY\r\n")
        let mode = terminal.mode
        kill(machine, SIGKILL)
        #expect(
            try eventually {
                kill(machine, 0) != 0
                    || (try? IntegrationTests.shell("cat /proc/\(machine)/stat"))?.contains(") Z ") == true
            })
        usleep(200_000)
        #expect(terminal.mode == mode)
        try shell.type("exit\r")
        _ = try shell.waitForEnd()
    }
}
