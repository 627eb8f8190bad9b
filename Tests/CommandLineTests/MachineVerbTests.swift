// SPDX-License-Identifier: Apache-2.0

import Glibc
import HostNetwork
import Inventory
import TestSupport
import Testing

@testable import swkvm

/// What `swkvm create` stores, and what `swkvm start` makes of it.
@Suite(.timed) struct MachineVerbTests {
    private typealias Option = Definition.Option

    private var here: String { String(cString: getcwd(nil, 0)) }

    private func options(_ words: String...) throws -> [Option] {
        try CreateCommand.Request(["web"] + words).definition.options
    }

    @Test func optionsAreStoredInTheirOrder() throws {
        #expect(
            try options("--cpus", "2", "--prealloc", "--mem=2G", "--hugepages", "--rng", "max-bytes=1K", "--shared")
                == [
                    Option("cpus", "2"), Option("prealloc"), Option("mem", "2G"), Option("hugepages"),
                    Option("rng", "max-bytes=1K"), Option("shared"),
                ])
        let request = try CreateCommand.Request([
            "web", "a.qcow2,queues=2", "--disk-size=20G", "--copy", "--cpus", "2", "--start",
        ])
        #expect(request.image == "a.qcow2,queues=2" && request.copies && request.starts)
        #expect(request.size?.bytes == 20 << 30)
        #expect(request.definition.options == [Option("cpus", "2")])
        #expect(try CreateCommand.Request(["web", "--disk-size", "1.5G"]).size?.bytes == 3 << 29)
    }

    /// The machine is started from another directory.
    @Test func pathsAreMadeAbsolute() throws {
        #expect(
            try options(
                "--kernel", "k", "--initrd=i", "--disk", "d.raw,key-file=key,ro", "--disk", "a,,b.raw,backing-dir=e,,f",
                "--disk", "/abs.raw", "--disk", "nbd://host/x", "--ssh-key", "id.pub", "--metrics", "m",
                "--console", "unix:s,,t,log=l", "--gdb", "unix:g") == [
                    Option("kernel", here + "/k"), Option("initrd", here + "/i"),
                    Option("disk", "\(here)/d.raw,key-file=\(here)/key,ro"),
                    Option("disk", "\(here)/a,,b.raw,backing-dir=\(here)/e,,f"), Option("disk", "/abs.raw"),
                    Option("disk", "nbd://host/x"), Option("ssh-key", here + "/id.pub"), Option("metrics", here + "/m"),
                    Option("console", "unix:\(here)/s,,t,log=\(here)/l"), Option("gdb", "unix:\(here)/g"),
                ])
        #expect(try options("--firmware", "f,,w") == [Option("firmware", "\(here)/f,,w")])
        #expect(
            try options("--kernel", "bundled", "--gdb", "1234", "--console", "pty") == [
                Option("kernel", "bundled"), Option("gdb", "1234"), Option("console", "pty"),
            ])
    }

    @Test(arguments: [
        ["--name", "x"], ["--daemon", "x"], ["--pid-file", "x"], ["--console", "stdio"], ["--copy"], ["--disk-size"],
        ["--disk-size", "big"], ["--cpus", "two"], ["--no-such"], ["a.raw", "b.raw"], ["a.raw", "--boot", "list"],
        ["--disk", "a.raw", "--boot", "list"], ["--copy=yes", "a.raw"], ["--net", "fd=5"], ["a.raw,key-fd=5"],
        ["--disk", "a.raw,key-fd=7"],
    ]) func whatDefinesNoMachine(words: [String]) {
        #expect(throws: (any Error).self) { try CreateCommand.Request(["web"] + words) }
    }

    @Test func theNameComesFirst() {
        #expect(throws: (any Error).self) { try CreateCommand.Request([]) }
        #expect(throws: (any Error).self) { try CreateCommand.Request(["--cpus", "2", "web"]) }
    }

    /// A value that looks like an option stays a value, and the machine's own files are named.
    @Test func theStartHasTheWords() throws {
        let directories = Directories(definitions: "/d", data: "/m", runtime: "/r,s")
        let files = try Inventory(directories).testFiles("web")
        let words = StartCommand.words(Definition([Option("cmdline", "-x --y"), Option("prealloc")]), files)
        #expect(
            words == [
                "--name=web", "--cmdline=-x --y", "--prealloc",
                "--console=unix:/r,,s/web/console,log=/m/web/console.log,size=4M,keep=1",
                "--daemon=/m/web/messages.log", "--pid-file=/m/web/pid",
            ])
        let command = try RunCommand.parse(words)
        #expect(command.cmdline == "-x --y" && command.pidFile == "/m/web/pid" && command.name == "web")
        #expect(command.configuration.consoleLimits.log == "/m/web/console.log")
        #expect(StartCommand.words(Definition([Option("console", "pty")]), files).count == 4)
    }

    @Test func publishedPorts() {
        let definition = Definition([
            Option("net", "user,publish=2222:22,publish=10.0.0.1:8080:80,publish=53:53/udp,mac=52:54:00:12:34:56"),
            Option("net", "tap=t0"),
        ])
        let ports = PublishedPort.all(in: definition)
        #expect(ports.map(\.guestPort) == [22, 80] && ports.map(\.port) == [2222, 8080])
        #expect(ports.map(\.address) == ["127.0.0.1", "10.0.0.1"])
    }

    @Test(
        arguments: [
            (0, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "59 min"), (3600, "1 h 0 min"), (90_061, "1 d 1 h"),
        ] as [(UInt64, String)]) func durations(seconds: UInt64, text: String)
    {
        #expect(MachineState.duration(seconds) == text)
    }

    @Test func sshGetsThePortAndTheUser() throws {
        let files = try Inventory(Directories(definitions: "/d", data: "/m", runtime: "/r")).testFiles("web")
        let definition = Definition([Option("net", "user,publish=2222:22"), Option("user", "debian")])
        let port = try #require(PublishedPort.all(in: definition).first)
        let words = SSHCommand.arguments(port.address, port.port, files, definition)
        #expect(words.suffix(3) == ["-l", "debian", "127.0.0.1"])
        #expect(words.starts(with: ["-p", "2222"]) && words.contains("UserKnownHostsFile=\"/m/web/known_hosts\""))
    }
}

extension Inventory {
    /// The files of a machine, whether it is defined or not.
    fileprivate func testFiles(_ name: String) throws -> MachineFiles {
        MachineFiles(try MachineName(name), directories)
    }
}
