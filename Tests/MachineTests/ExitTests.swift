// SPDX-License-Identifier: Apache-2.0

import CLinux
import TestSupport
import Testing

@testable import KVM
@testable import Machine

/// How exits are counted and shown.
@Suite(.timed) struct ExitTests {
    private func key(_ address: UInt64, write: Bool = true) -> ExitKey {
        ExitKey(reason: UInt32(KVM_EXIT_MMIO), address: address, size: 4, isWrite: write)
    }

    @Test func sameAccessesAreOneLine() {
        var table = ExitTable()
        for _ in 0..<3 { table.count(key(0xd000_0000)) }
        table.count(key(0xd000_0000, write: false))
        #expect(table.entries.sorted { $0.count > $1.count }.map(\.count) == [3, 1])
        #expect(table.others.isEmpty)
    }

    /// A guest may touch as many addresses as it likes: the table does not grow, and nothing is lost.
    @Test func aMillionAddressesAreBounded() {
        var table = ExitTable()
        for address in 0..<1_000_000 as Range<UInt64> { table.count(key(address &* 4)) }
        table.count(key(0))
        #expect(table.entries.count == ExitTable.capacity)
        #expect(table.others == [key(0): UInt64(1_000_000 - ExitTable.capacity)])
        #expect(table.entries.reduce(0) { $0 + $1.count } + table.others.values.reduce(0, +) == 1_000_001)
        let report = ExitReport(tables: [table], device: { _ in nil }).userSpace
        #expect(report.split(separator: "\n").count == ExitReport.lineLimit + 4)
        #expect(report.contains("other addresses") && report.contains("1,000,001  100.0"))
    }

    @Test func theReportIsSortedAndAligned() {
        var first = ExitTable(), second = ExitTable()
        for _ in 0..<1999 { first.count(ExitKey(reason: UInt32(KVM_EXIT_IO), address: 0x3f8, size: 1, isWrite: true)) }
        second.count(key(0xd000_0050))
        second.count(ExitKey(reason: UInt32(KVM_EXIT_INTR), address: 0, size: 0, isWrite: false))
        let report = ExitReport(tables: [first, second], device: { $0.address == 0x3f8 ? "SerialPort" : nil }).userSpace
        #expect(
            report == """
                exits to user space
                  exits      %  reason  access  bytes  address     device      vCPU 0  vCPU 1
                  1,999   99.9  IO      write       1  0x3f8       SerialPort   1,999       0
                      1    0.0  MMIO    write       4  0xd0000050                   0       1
                      1    0.0  INTR                                                0       1
                  2,001  100.0  total                                           1,999       2
                """)
    }

    @Test func manyCPUsHaveATableOfTheirOwn() {
        var tables = [ExitTable](repeating: ExitTable(), count: 9)
        for index in 0..<9 { for _ in 0...index { tables[index].count(key(0x1000)) } }
        let lines = ExitReport(tables: tables, device: { _ in nil }).userSpace.split(separator: "\n")
        #expect(!lines[1].contains("vCPU"))
        #expect(lines.contains("  vCPU 8      9  20.0") && lines.count == 4 + 1 + 9)
    }

    @Test func anEmptyReportHasATotalOfNothing() {
        #expect(ExitReport(tables: [ExitTable()], device: { _ in nil }).userSpace.hasSuffix("0     total"))
    }

    @Test func numbersAreGrouped() {
        #expect(
            [0, 999, 1000, 123_456, 1_234_567].map(ExitReport.grouped) == ["0", "999", "1,000", "123,456", "1,234,567"])
        #expect(ExitReport.grouped(.max) == "18,446,744,073,709,551,615")
        #expect(
            ExitReport.percent(.max, of: .max) == "100.0" && ExitReport.percent(2, of: 3) == "66.7"
                && ExitReport.percent(0, of: 0) == "")
    }

    @Test func theKernelsCountersAreSummed() {
        let cpus = [
            [KVMCounter(name: "exits", value: 5), KVMCounter(name: "nmi_window", value: 0)],
            [KVMCounter(name: "exits", value: 7)],
        ]
        #expect(
            ExitReport.kernel(machine: [KVMCounter(name: "mmu_flooded", value: 1)], cpus: cpus) == """
                counted in the kernel
                  events  KVM's counter          vCPU 0  vCPU 1
                      12  exits                       5       7
                       1  mmu_flooded (machine)
                """)
    }
}
