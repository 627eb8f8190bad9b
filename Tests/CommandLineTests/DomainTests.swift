// SPDX-License-Identifier: Apache-2.0

import Foundation
import Inventory
import Linux
import TestSupport
import Testing

@testable import DomainXML
@testable import swkvm

/// Definitions of documents that libvirt's own programs have written, and back.
struct DomainTests {
    private let host = Libvirt()

    /// virt-install's words, what has to be in the definition, and what has to be reported.
    struct Case: Sendable, CustomTestStringConvertible {
        let words: [String]
        let options: [String]
        let notes: [String]
        var testDescription: String { words.joined(separator: " ") }
    }

    static let cases = [
        Case(
            words: [
                "--import", "--disk",
                "DIR/web.qcow2,bus=virtio,driver.type=qcow2,cache=none,driver.io=native,driver.discard=unmap,serial=A1,driver.queues=2,iotune.total_bytes_sec=1000000",
                "--network",
                "bridge=br0,model=virtio,mac=52:54:00:12:34:56,mtu.size=1400,driver.queues=2,target.dev=web0",
                "--rng", "/dev/urandom", "--controller", "type=usb,model=none",
            ],
            options: [
                "bus=pci", "cpus=2", "mem=1G", "boot=default",
                "disk=DIR/web.qcow2,format=qcow2,cache=none,serial=A1,queues=2,bps=1000000",
                "net=tap=web0,bridge=br0,mac=52:54:00:12:34:56,mtu=1400,queues=2", "rng",
            ],
            notes: [
                "ignored: devices/disk/driver/@io: native: disks use io_uring", "ignored: devices/emulator",
                "os/type/@machine: missing; libvirt would take i440fx; swkvm has PCI Express (bus=pci), and no other devices of a PC",
                "features/acpi: missing; libvirt would make a machine without ACPI; swkvm's has it",
            ]),
        Case(
            words: [
                "--boot", "kernel=DIR/vmlinuz,initrd=DIR/initrd,kernel_args=root=/dev/vda1 quiet", "--disk",
                "DIR/a.raw,bus=sata", "--network", "type=user", "--serial", "file,path=/srv/a.log", "--cdrom",
                "DIR/seed.iso", "--watchdog", "i6300esb", "--metadata", "title=A",
            ],
            options: [
                "kernel=DIR/vmlinuz", "initrd=DIR/initrd", "cmdline=root=/dev/vda1 quiet", "disk=DIR/a.raw,format=raw",
                "disk=DIR/seed.iso,format=raw,ro", "console=file:/srv/a.log",
            ],
            notes: [
                "ignored: title", "ignored: devices/watchdog",
                "ignored: devices/disk[1]/target/@bus: sata: the guest has a virtio disk",
                "devices/disk[1]/driver/@type: missing; libvirt would take raw; the file's name says raw",
                "ignored: devices/interface/model/@type: e1000: the guest has a virtio network interface",
            ]),
        Case(
            words: [
                "--import", "--disk",
                "source.dev=/dev/null,type=block,bus=virtio,driver.type=raw,readonly=on,shareable=on", "--disk",
                "source.protocol=nbd,source.host0.name=store,source.host0.port=10810,source.name=a/b,bus=virtio,driver.type=raw",
                "--cpu", "host-passthrough,cell0.cpus=0,cell0.memory=524288,cell1.cpus=1,cell1.memory=524288",
                "--numatune", "memnode0.cellid=0,memnode0.mode=strict,memnode0.nodeset=0", "--memorybacking",
                "hugepages=on,access.mode=shared,source.type=memfd,allocation.mode=immediate", "--network",
                "type=direct,source=eth0,source.mode=bridge,model=virtio", "--network", "network=default,model=virtio",
                "--events", "on_reboot=destroy", "--serial", "unix,path=/srv/s.sock,mode=bind,log.file=/srv/s.log",
            ],
            options: [
                "disk=/dev/null,format=raw,ro,lock=off", "disk=nbd://store:10810/a/b,format=raw",
                "numa=mem=512M,cpus=0,host=0", "numa=mem=512M,cpus=1", "hugepages=2M", "prealloc", "shared",
                "on-reboot=exit", "console=unix:/srv/s.sock,log=/srv/s.log",
            ],
            notes: [
                "devices/interface[2]/source/@network: default: a network of libvirt's, which is not used; the guest is in swkvm's (net=nat)"
            ]),
        Case(
            words: [
                "--import", "--boot", "loader=DIR/bios.bin,loader.type=rom,bios.useserial=on", "--disk",
                "DIR/a.raw,bus=virtio,driver.type=raw", "--cputune", "vcpupin0.vcpu=0,vcpupin0.cpuset=0",
            ],
            options: ["bus=pci", "firmware=DIR/bios.bin", "disk=DIR/a.raw,format=raw"],
            notes: ["ignored: cputune"]),
    ]

    @Test(arguments: cases)
    func documentsOfVirtInstallBecomeDefinitions(_ expected: Case) throws {
        // virt-install looks for the files.
        let directory = FileManager.default.temporaryDirectory.path + "/swkvm-\(UUID().uuidString)"
        try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(atPath: directory) }
        for name in ["web.qcow2", "a.raw", "seed.iso", "vmlinuz", "initrd"] {
            try Data().write(to: URL(fileURLWithPath: directory + "/" + name))
        }
        func placed(_ text: String) -> String { text.replacingOccurrences(of: "DIR", with: directory) }
        let written = try host.virtInstall(expected.words.map(placed))
        for document in [written, try host.virshDumpXML(written)] {
            let domain = try Domain(Array(document.utf8))
            let options = domain.definition.options.map { $0.name + ($0.value.map { "=" + $0 } ?? "") }
            for option in expected.options.map(placed) { #expect(options.contains(option), "\(option) in \(options)") }
            let notes = domain.notes.map(\.description)
            for note in expected.notes { #expect(notes.contains(note), "\(note) in \(notes)") }
            // And back, with nothing to report; again, with the same text.
            let writer = DomainWriter(name: domain.name, domain.definition, memory: 1 << 30)
            let text = try writer.xml()
            try host.validate(text)
            let again = try Domain(Array(text.utf8))
            #expect(again.definition == domain.definition, "\(text)")
            #expect(again.notes.isEmpty, "\(again.notes)")
            #expect(try DomainWriter(name: again.name, again.definition, memory: 1 << 30).xml() == text)
        }
    }

    @Test func whatLibvirtHasNoElementForIsInTheMetadata() throws {
        let definition = Definition([
            .init("cpus", "2"), .init("mem", "1G"), .init("kernel", "bundled"), .init("uuid", "none"),
            .init("hugepages", "thp"), .init("disk", "nbds://h/x?tls-verify-peer=no"),
            .init("disk", "/a,,b.qcow2,key-file=/k<'&>,lock=on,bps=10M"), .init("net", "stream=/s.sock"),
            .init("net", "user,publish=2222:22,publish=[::1]:53:53/udp,offload=off"), .init("net", "nat,mtu=1400"),
            .init("console", "unix:/c,log=/l,size=1M"), .init("prealloc"), .init("ssh-key", "/k\tx.pub"),
            .init("sandbox", "on,namespaces"),
        ])
        let text = try DomainWriter(name: "all", definition, memory: 1 << 30).xml()
        try host.validate(text)
        let domain = try Domain(Array(text.utf8))
        func sorted(_ definition: Definition) -> [String] {
            // The order of options matters among those of one name only, and this sort keeps it.
            let names = Set(definition.options.map(\.name)).sorted()
            return names.flatMap { name in
                definition.options.filter { $0.name == name }.map { "\(name) \($0.value ?? "-")" }
            }
        }
        let found = sorted(domain.definition)
        let same = sorted(definition).map {
            // The document states what the name says, and sizes are numbers there.
            $0 == "disk /a,,b.qcow2,key-file=/k<'&>,lock=on,bps=10M"
                ? "disk /a,,b.qcow2,format=qcow2,bps=10485760,key-file=/k<'&>,lock=on" : $0
        }
        #expect(found == same, "\(text)")
        #expect(domain.notes.isEmpty)
    }

    @Test(arguments: [
        ("", "line 1: no element found"), ("<domain", "unclosed token"), ("<a/>", "it describes no machine"),
        ("<domain type='xen'/>", "is not a kind of machine that runs on KVM"),
        ("<domain type='kvm'/>", "<name> is missing"),
        (
            "<!DOCTYPE d [<!ENTITY a 'b'>]><domain>&a;</domain>",
            "a document type declaration (<!DOCTYPE>) is not accepted"
        ),
        ("<!DOCTYPE d SYSTEM '/etc/passwd'><domain/>", "a document type declaration"),
        ("<domain>&a;</domain>", "undefined entity"), ("<domain type='kvm'>\u{1}</domain>", "not well-formed"),
        (
            "<domain type='kvm'><name>a</name><memory unit='TiB'>99999999999999</memory></domain>",
            "'99999999999999' is not a size"
        ),
        (
            "<domain type='kvm'><name>a</name><memory unit='x'>1</memory></domain>", "'x' is not a unit"
        ),
        (
            "<domain type='kvm'><name>a</name><memory>1</memory><devices><disk type='network'><source protocol='rbd'/></disk></devices></domain>",
            "a disk of type network of the protocol rbd cannot be opened here"
        ),
        (
            "<domain type='kvm'><name>a</name><memory>1</memory><devices><interface type='user'><portForward proto='tcp'><range start='1' end='65535'/></portForward></interface></devices></domain>",
            "expected at most 256 ports, in ascending ranges"
        ),
        (
            "<domain type='kvm'><name>a</name><memory>1</memory><devices><interface type='user'><portForward><range start='1' end='256'/><range start='300'/></portForward></interface></devices></domain>",
            "devices/interface/portForward/range[2]: expected at most 256 ports"
        ),
    ])
    func badDocumentsAreRefused(_ text: String, _ reason: String) {
        expectRefusal(Array(text.utf8), reason)
    }

    @Test func whatIsTooMuchIsRefused() {
        expectRefusal(Array(String(repeating: "<a>", count: 33).utf8), "nested more than 32 deep")
        expectRefusal(
            Array(("<a>" + String(repeating: "<b/>", count: 20_000) + "</a>").utf8), "more than 20000 elements")
        expectRefusal([UInt8](repeating: 0x20, count: XMLReader.maximumSize + 1), "longer than 1 MiB")
        // At the limits it is a document, which describes no machine.
        expectRefusal(
            Array((String(repeating: "<a>", count: 32) + String(repeating: "</a>", count: 32)).utf8), "no machine")
        expectRefusal(
            Array(("<a>" + String(repeating: "<b/>", count: 19_999) + "</a>").utf8), "no machine")
    }

    /// The largest documents, in which all is reported, or all is of one kind, or all words belong to devices.
    @Test func whatIsMuchIsReadInOnePass() throws {
        func document(_ head: String, _ body: String) -> [UInt8] {
            Array("<domain type='kvm'\(head)><name>a</name><memory>1</memory>\(body)</domain>".utf8)
        }
        let kinds = (0..<19_990).map { "<e\($0)/>" }.joined()
        #expect(try Domain(document("", kinds)).notes.count == 19_992)
        let same = String(repeating: "<e/>", count: 19_990)
        #expect(try Domain(document("", same)).notes.contains { $0.description == "ignored: e (19990 times)" })
        let attributes = (0..<60_000).map { " a\($0)='1'" }.joined()
        #expect(try Domain(document(attributes, "")).notes.count == 60_002)
        let interfaces = String(
            repeating: "<interface type='bridge'><source bridge='b'/></interface>", count: 9_900)
        let devices = try Domain(document("", "<devices>\(interfaces)</devices>"))
        #expect(devices.definition.values(of: "net").count == 9_900 && devices.notes.count == 9_902)
        let words = (1...6_000).map { "<s:words option='net' number='\($0)' value='mtu=1400'/>" }.joined()
        let metadata = "<metadata><s:machine xmlns:s='\(Domain.namespace)'>\(words)</s:machine></metadata>"
        let some = String(repeating: "<interface type='bridge'><source bridge='b'/></interface>", count: 6_000)
        #expect(
            try Domain(document("", "\(metadata)<devices>\(some)</devices>")).definition.values(of: "net")
                == [String](repeating: "bridge=b,mtu=1400", count: 6_000))
    }

    private func expectRefusal(_ bytes: [UInt8], _ reason: String) {
        do throws(DomainError) {
            _ = try Domain(bytes)
            Issue.record("accepted")
        } catch { #expect(error.description.firstOccurrence(of: reason) != nil, "\(error)") }
    }
}

/// Debian's virtinst and libvirt, with libvirt's test driver: nothing on this host is changed.
private struct Libvirt {
    func virtInstall(_ words: [String]) throws -> String {
        let output = try run(
            "virt-install",
            [
                "--connect", "test:///default", "--name", "web", "--memory", "1024", "--vcpus", "2", "--osinfo",
                "detect=off,require=off", "--graphics", "none", "--check", "all=off", "--print-xml", "1",
            ] + words)
        // An installation from a medium has a second document, of the machine after it.
        return output
    }

    func virshDumpXML(_ document: String) throws -> String {
        try withFile(document) { path in
            let output = try run("virsh", ["-q", "-c", "test:///default", "define \(path); dumpxml web"])
            let start = try #require(output.firstOccurrence(of: "<domain"))
            return String(output[start.lowerBound...])
        }
    }

    func validate(_ document: String) throws {
        try withFile(document) { _ = try run("virt-xml-validate", [$0, "domain"]) }
    }

    private func withFile<Answer>(_ text: String, _ body: (String) throws -> Answer) throws -> Answer {
        let path = FileManager.default.temporaryDirectory.path + "/swkvm-\(UUID().uuidString).xml"
        try text.write(toFile: path, atomically: false, encoding: .utf8)
        defer { try? FileManager.default.removeItem(atPath: path) }
        return try body(path)
    }

    /// The program's standard output; an error if it does not end with 0.
    private func run(_ program: String, _ words: [String]) throws -> String {
        let process = Process(), output = Pipe()
        process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
        process.arguments = [program] + words
        process.standardOutput = output
        process.standardError = output
        // virt-install writes its log there.
        var environment = ProcessInfo.processInfo.environment
        let home = FileManager.default.temporaryDirectory.path + "/swkvm-\(UUID().uuidString)"
        environment["HOME"] = home
        environment["XDG_CACHE_HOME"] = home
        process.environment = environment
        defer { try? FileManager.default.removeItem(atPath: home) }
        try process.run()
        let text = String(decoding: output.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
        process.waitUntilExit()
        guard process.terminationStatus == 0 else { throw Failure(text: "\(program) \(words): \(text)") }
        return text
    }

    private struct Failure: Error { let text: String }
}
