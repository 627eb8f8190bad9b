// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// `--vsock`: the host's side of its socket. Data in both directions is the lab's, with a guest that has a driver.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct VsockTests {
    @Test(arguments: [[], ["--bus", "pci", "--virtqueues", "packed"], ["--sandbox", "off"]])
    func itsSocketIsTheOwnersAndGoesWithTheMachine(_ more: [String]) throws {
        let directory = try TemporaryDirectory()
        let path = directory("v.sock")
        let machine = try Program.machineAtPrompt(["--vsock", "cid=3,path=" + path] + more)
        let status = try #require(fileStatus(ofPath: path))
        #expect(status.st_mode & S_IFMT == S_IFSOCK && status.st_mode & 0o777 == 0o600)
        // The bundled guest has no driver: its clients wait, and a reset or an end of the machine ends them.
        let client = try connect(toSocket: path)
        try client.writeAll(Array("CONNECT 1\n".utf8))
        try machine.type("poweroff\n")
        #expect(try machine.waitForEnd() == .status(0))
        #expect(try directory.contents.isEmpty)
        var byte: UInt8 = 0
        #expect(recv(client.rawValue, &byte, 1, 0) <= 0)
    }

    @Test func aSocketThatWasLeftBehindIsReplaced() throws {
        let directory = try TemporaryDirectory()
        let path = directory("v.sock")
        let first = try Program.machineAtPrompt(["--vsock", "cid=3,path=" + path, "--sandbox", "off"])
        let second = try Program.machine(["--vsock", "cid=4,path=" + path])
        try second.expectEnd(71)
        #expect(second.errors.text.contains("\(path) is in use: another process listens on it"))
        first.send(signal: SIGKILL)
        #expect(try first.waitForEnd() == .signal(SIGKILL))
        #expect(try directory.contents == ["v.sock"])
        let third = try Program.machineAtPrompt(["--vsock", "cid=3,path=" + path])
        try third.powerOff()
        #expect(try directory.contents.isEmpty)
    }

    @Test func whatIsNoSocketIsNotReplaced() throws {
        let directory = try TemporaryDirectory()
        let path = try directory.write(Array("precious".utf8), to: "file")
        let machine = try Program.machine(["--vsock", "cid=3,path=" + path])
        try machine.expectEnd(71)
        #expect(machine.errors.text.contains("cannot be \(path): a file that is not a socket has that name"))
        #expect(try readFile(path, limit: 64) == Array("precious".utf8))
    }

    @Test func pathsThatAreImpossible() throws {
        let directory = try TemporaryDirectory()
        let none = try Program.machine(["--vsock", "cid=3,path=" + directory("none/v.sock")])
        try none.expectEnd(66)
        #expect(none.errors.text.contains("No such file or directory"))
        let long = try Program.machine(["--vsock", "cid=3,path=/tmp/" + String(repeating: "x", count: 92)])
        try long.expectEnd(64)
        #expect(long.errors.text.contains("has 97 bytes, the limit is 96"))
    }
}
