// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// `swkvm define` of machines that exist already, and of documents that are no files.
@Suite(.timed) struct DomainVerbTests {
    private let home: MachineHome
    private let uuid = "b1cb3b23-1bb9-4a31-9c5e-9a0a5a0d5c01"

    init() throws {
        home = try MachineHome()
        try home.swkvm("create", "web", "--mem", "64M", "--uuid", uuid)
    }

    /// The document of the machine, with other words in it.
    private func document(replacing old: String, by new: String) throws -> String {
        let text = try home.swkvm("dumpxml", "web").output.text
        let parts = text.split(separator: old, omittingEmptySubsequences: false)
        try #require(parts.count == 2, "\(old) in \(text)")
        try home.directory.write(Array(parts.joined(separator: new).utf8), to: "web.xml")
        return home.directory("web.xml")
    }

    @Test func aStoppedMachineGetsTheNewDefinition() throws {
        let file = try document(replacing: ">1</vcpu>", by: ">2</vcpu>")
        #expect(try home.swkvm("define", "--strict", file).output.text == "web: defined\n")
        #expect(try home.definition(of: "web").contains("cpus = 2"))
        #expect(try home.states == ["web stopped"])
    }

    @Test func aMachineWithAnotherUUIDIsAnotherOne() throws {
        let before = try home.definition(of: "web")
        let file = try document(replacing: "<uuid>b1cb3b23", by: "<uuid>b1cb3b24")
        #expect(
            try home.swkvm("define", file, status: 1).errors.text
                == "swkvm: web was not defined: there is a machine of this name with another UUID, \(uuid): delete it first, or give the XML that UUID\n"
        )
        #expect(try home.definition(of: "web") == before)
    }

    @Test(.enabled(if: Host.isFit, Host.needed)) func aRunningMachineKeepsItsDefinition() throws {
        let before = try home.definition(of: "web")
        let file = try document(replacing: ">1</vcpu>", by: ">2</vcpu>")
        try home.swkvm("start", "web")
        let errors = try home.swkvm("define", file, status: 1).errors.text
        #expect(errors.hasPrefix("swkvm: web was not defined: web is running (process "), "\(errors)")
        #expect(try home.definition(of: "web") == before)
        try home.swkvm("stop", "--force", "web")
        try home.swkvm("define", file)
        #expect(try home.definition(of: "web").contains("cpus = 2"))
    }

    /// Firmware is what boots: nothing is added to it on the way to XML and back.
    @Test func aMachineWithFirmware() throws {
        try home.directory.write([UInt8](repeating: 0x90, count: 64 << 10), to: "bios.bin")
        try home.swkvm("create", "old", "--firmware", home.directory("bios.bin"), "--bus", "pci")
        let text = try home.swkvm("dumpxml", "old").output.text
        #expect(text.contains("<loader type='rom'>\(home.directory("bios.bin"))</loader>"), "\(text)")
        try home.directory.write(Array(text.utf8), to: "old.xml")
        try home.swkvm("define", "--strict", home.directory("old.xml"))
        #expect(try home.swkvm("dumpxml", "old").output.text == text)
        // An image that only firmware boots.
        try home.directory.write([UInt8](repeating: 0, count: 1 << 20), to: "disk.raw")
        try home.swkvm("create", "other", home.directory("disk.raw"), "--firmware", home.directory("bios.bin"))
        let definition = try home.definition(of: "other")
        #expect(
            definition.contains("firmware = \"\(home.directory("bios.bin"))\"") && !definition.contains("boot ="),
            "\(definition)")
    }

    @Test(arguments: ["-", "/dev/stdin"]) func aPipe(name: String) throws {
        let program = "SWKVM_HOME='\(home.path)' '\(Host.swkvm)'"
        let output = try shell(
            "\(program) dumpxml web | sed 's/<name>web</<name>db</' | \(program) define --strict \(name) 2>&1")
        #expect(output == "db: defined\n")
        #expect(try home.states == ["db stopped", "web stopped"])
    }

    @Test func aDocumentThatIsTooLong() throws {
        let output = try shell(
            "head -c 1048577 /dev/zero | tr '\\0' ' ' | SWKVM_HOME='\(home.path)' '\(Host.swkvm)' define - 2>&1 || true"
        )
        #expect(output == "swkvm: standard input: it is longer than 1 MiB\n")
    }
}
