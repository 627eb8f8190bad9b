// SPDX-License-Identifier: Apache-2.0

import Glibc
import Platform
import TestSupport
import Testing

/// docs/platform.md says what the constants say, and no less.
@Suite(.timed) struct PlatformDocumentTests {
    /// The page's lines.
    private let page: [String]

    init() throws {
        let root = "/" + #filePath.split(separator: "/").dropLast(3).joined(separator: "/")
        let text = try Self.text(of: "\(root)/docs/platform.md")
        page = text.split(separator: "\n", omittingEmptySubsequences: false).map(String.init)
    }

    private static func text(of path: String) throws -> String {
        let file = try #require(unsafe fopen(path, "r"), "\(path) cannot be opened")
        defer { unsafe fclose(file) }
        var bytes = [UInt8](repeating: 0, count: 1 << 20)
        let count = unsafe fread(&bytes, 1, bytes.count, file)
        return String(decoding: bytes.prefix(count), as: UTF8.self)
    }

    /// The lines below a heading, up to the next one.
    private func section(_ heading: String) -> [String] {
        Array(page.drop { $0 != "## \(heading)" }.dropFirst().prefix { !$0.hasPrefix("## ") })
    }

    /// The first cells of the first table below a heading, without its own heading.
    private func cells(_ heading: String) -> [String] {
        section(heading).filter { $0.hasPrefix("| ") }.dropFirst().map { line in
            String(line.dropFirst(2).prefix { $0 != "|" }).trimmed
        }
    }

    /// `0xd000_0000`, in at least eight digits.
    private func address(_ value: UInt64) -> String {
        let digits = String(value, radix: 16)
        let padded = String(repeating: "0", count: max(0, 8 - digits.count)) + digits
        let parts = [padded.dropLast(8), padded.suffix(8).prefix(4), padded.suffix(4)].filter { !$0.isEmpty }
        return "`0x" + parts.joined(separator: "_") + "`"
    }

    private func range(_ start: UInt64, _ end: UInt64) -> String { "\(address(start)) – \(address(end - 1))" }

    private func port(_ value: UInt16) -> String { "`0x\(String(value, radix: 16))`" }

    private func ports(_ range: ClosedRange<UInt16>) -> String { "\(port(range.lowerBound))–\(port(range.upperBound))" }

    @Test func physicalMemory() {
        typealias Layout = PhysicalLayout
        #expect(
            cells("Physical memory") == [
                range(Layout.gdt, Layout.bootParameters),
                range(Layout.bootParameters, Layout.bootParameters + 0x1000),
                range(Layout.pageTables, Layout.pageTables + Layout.pageTablesSize),
                range(Layout.commandLine, Layout.endOfCommandLine),
                range(Layout.multiProcessorTable, Layout.endOfBaseMemory),
                range(Layout.endOfBaseMemory, Layout.highRAM),
                "\(address(Layout.highRAM)) –",
                range(Layout.hole.lowerBound, Layout.hole.upperBound),
                range(Layout.pciWindow.lowerBound, Layout.pciWindow.upperBound),
                "\(address(Layout.virtioMMIO)) + n · \(Layout.virtioMMIOSpan >> 10) KiB",
                range(Layout.pciConfiguration, Layout.pciConfiguration + Layout.pciConfigurationSize),
                address(Layout.ioapic),
                address(Layout.localAPIC),
                range(Layout.identityMap, Layout.taskStateSegment + 0x3000),
                range(Layout.firmware.lowerBound, Layout.firmware.upperBound),
                "\(address(Layout.hole.upperBound)) –",
            ])
        let text = section("Physical memory").joined(separator: "\n")
        for words in [
            "at `0x\(String(Layout.setupData, radix: 16))`", "up to \(address(Layout.hole.lowerBound)).",
            "marks \(range(Layout.acpi, Layout.highRAM)) as reserved:",
            "ACPI tables up to \(address(Layout.smbios - 1)), SMBIOS tables from \(address(Layout.smbios)) on",
            "At \(address(Layout.resetVector)) (",
        ] {
            #expect(text.contains(words), "\(words)")
        }
    }

    @Test func ioPorts() {
        #expect(
            cells("Ports") == [
                (Ports.interruptControllers + [Ports.timer]).map(ports).joined(separator: ", ")
                    + ", \(port(Ports.systemControl))",
                "\(port(Ports.keyboardData)), \(port(Ports.keyboardCommand))",
                ports(Ports.clock), port(Ports.postCode), ports(Ports.serial),
                port(Ports.firmwareDebug), port(Ports.exit), ports(Ports.firmwareConfiguration),
                port(Ports.sleepControl), port(Ports.sleepStatus), port(Ports.powerEvents),
                ports(Ports.pciConfiguration), port(Ports.resetControl),
            ])
        let text = section("Ports").joined(separator: "\n")
        let reset = "`0x\(String(Ports.resetCommand, radix: 16))`"
        #expect(text.contains("writing \(reset) to \(port(Ports.keyboardCommand)) resets"))
        #expect(text.contains("the console, IRQ \(GSIs.serial) |"))
        #expect(text.contains("IRQ \(GSIs.power) (edge)"))
    }

    @Test func interrupts() {
        let text = section("Interrupts").joined(separator: " ")
        let upper = GSIs.virtio.prefix { $0 >= 16 }, lower = GSIs.virtio.dropFirst(upper.count)
        #expect(Array(upper) == (0..<UInt32(upper.count)).map { 16 + $0 })
        let list = lower.map(String.init).joined(separator: ", ")
        #expect(text.contains("GSI 16+n for n < \(upper.count), then \(list);"))
        #expect(Set(GSIs.virtio + [GSIs.serial, GSIs.power]).count == GSIs.virtio.count + 2)
        #expect(GSIs.virtio.allSatisfy { $0 < GSIs.pins })
        #expect(text.contains("or use GSI \(GSIs.pci.lowerBound) to \(GSIs.pci.upperBound), level-triggered"))
        #expect((0..<32).allSatisfy { GSIs.pci.contains(GSIs.pci(device: $0)) })
        #expect(section("Physical memory").contains { $0.hasSuffix("| IOAPIC, \(GSIs.pins) pins |") })
    }

    /// No two things are in one place.
    @Test func nothingOverlaps() {
        typealias Layout = PhysicalLayout
        let places: [Range<UInt64>] = [
            Layout.gdt..<Layout.startInfo,
            Layout.startInfo..<Layout.modules,
            Layout.modules..<Layout.memoryMap,
            Layout.memoryMap..<Layout.setupData,
            Layout.setupData..<Layout.bootParameters,
            Layout.bootParameters..<Layout.bootParameters + 0x1000,
            Layout.pageTables..<Layout.pageTables + Layout.pageTablesSize,
            Layout.commandLine..<Layout.endOfCommandLine,
            Layout.multiProcessorTable..<Layout.endOfBaseMemory,
            Layout.acpi..<Layout.acpi + UInt64(Layout.acpiSize),
            Layout.smbios..<Layout.smbios + UInt64(Layout.smbiosSize),
            Layout.resetVector..<Layout.highRAM,
            Layout.pciWindow,
            Layout.virtioMMIO..<Layout.virtioMMIO + Layout.virtioMMIOSpan * UInt64(GSIs.virtio.count),
            Layout.pciConfiguration..<Layout.pciConfiguration + 256 << 20,
            Layout.ioapic..<Layout.ioapic + 0x1000,
            Layout.localAPIC..<Layout.localAPIC + 0x1000,
            Layout.identityMap..<Layout.identityMap + 0x1000,
            Layout.taskStateSegment..<Layout.taskStateSegment + 0x3000,
            Layout.firmware,
        ].sorted { $0.lowerBound < $1.lowerBound }
        for (place, next) in zip(places, places.dropFirst()) {
            #expect(place.upperBound <= next.lowerBound, "\(address(place.lowerBound)) and \(address(next.lowerBound))")
        }
    }
}

extension String {
    /// Without the blanks at its end.
    fileprivate var trimmed: String { String(reversed().drop { $0 == " " }.reversed()) }
}
