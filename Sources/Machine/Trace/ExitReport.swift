// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Devices
internal import KVM
internal import Virtio

/// The tables that `--trace exits` prints.
struct ExitReport {
    /// Lines of the first table; what is rarer is joined.
    static let lineLimit = 40
    /// Columns for that many vCPUs fit beside each other.
    static let columnLimit = 8

    /// Of each vCPU.
    let tables: [ExitTable]
    /// Which device is at an address; nil where none is.
    let device: (ExitKey) -> String?

    static func device(
        at key: ExitKey, _ ports: AddressMap<any PortDevice>.Table, _ mmio: AddressMap<any MMIODevice>.Table
    ) -> String? {
        switch Int32(bitPattern: key.reason) {
        case KVM_EXIT_IO: ports.name(at: UInt16(truncatingIfNeeded: key.address))
        case KVM_EXIT_MMIO: mmio.name(at: key.address)
        default: nil
        }
    }

    private struct Line {
        var cells: [String]
        var counts: [UInt64]
        var total: UInt64 { counts.reduce(0, &+) }
    }

    /// Exits to user space, the most frequent first, with a line of totals.
    var userSpace: String {
        let lines = self.lines
        var all = Line(cells: ["total", "", "", "", ""], counts: tables.map { _ in 0 })
        for line in lines { for index in all.counts.indices { all.counts[index] &+= line.counts[index] } }
        let total = all.total
        let showsCPUs = tables.count <= Self.columnLimit
        let rows = (lines + [all]).map { line in
            [Self.grouped(line.total), Self.percent(line.total, of: total)] + line.cells
                + (showsCPUs && tables.count > 1 ? line.counts.map(Self.grouped) : [])
        }
        let head =
            ["exits", "%", "reason", "access", "bytes", "address", "device"]
            + (showsCPUs && tables.count > 1 ? tables.indices.map { "vCPU \($0)" } : [])
        var text = "exits to user space\n" + Self.align([head] + rows, left: [2, 3, 5, 6])
        if !showsCPUs {
            let rows = all.counts.enumerated().map { ["vCPU \($0)", Self.grouped($1), Self.percent($1, of: total)] }
            text += "\n" + Self.align([["", "exits", "%"]] + rows, left: [0])
        }
        return text
    }

    private var lines: [Line] {
        var counts: [ExitKey: [UInt64]] = [:]
        var others: [ExitKey: [UInt64]] = [:]
        for (index, table) in tables.enumerated() {
            for (key, count) in table.entries { counts[key, default: tables.map { _ in 0 }][index] &+= count }
            for (key, count) in table.others { others[key, default: tables.map { _ in 0 }][index] &+= count }
        }
        func total(_ counts: [UInt64]) -> UInt64 { counts.reduce(0, &+) }
        let sorted = counts.sorted { (total($1.value), $0.key) < (total($0.value), $1.key) }
        for (key, more) in sorted.dropFirst(Self.lineLimit) {
            let sum = others[key.withoutAddress] ?? tables.map { _ in 0 }
            others[key.withoutAddress] = zip(sum, more).map { $0 &+ $1 }
        }
        return sorted.prefix(Self.lineLimit).map { key, counts in
            Line(cells: cells(key, address: Self.address(key), device: device(key)), counts: counts)
        }
            + others.sorted { (total($1.value), $0.key) < (total($0.value), $1.key) }.map { key, counts in
                Line(cells: cells(key, address: key.size > 0 ? "other addresses" : "", device: nil), counts: counts)
            }
    }

    private func cells(_ key: ExitKey, address: String, device: String?) -> [String] {
        [
            Exit.name(ofReason: key.reason), key.size > 0 ? (key.isWrite ? "write" : "read") : "",
            key.size > 0 ? "\(key.size)" : "", address, device ?? "",
        ]
    }

    private static func address(_ key: ExitKey) -> String { key.size > 0 ? "0x" + String(key.address, radix: 16) : "" }

    /// What KVM itself has counted, which user space does not see otherwise.
    /// - Parameters:
    ///   - machine: its own counters.
    ///   - cpus: of each vCPU, or nil when they could not be read.
    static func kernel(machine: [KVMCounter], cpus: [[KVMCounter]]) -> String {
        let names = cpus.first?.map(\.name) ?? []
        let values = cpus.map { Dictionary($0.map { ($0.name, $0.value) }, uniquingKeysWith: { first, _ in first }) }
        let showsCPUs = cpus.count > 1 && cpus.count <= columnLimit
        var rows: [(total: UInt64, cells: [String])] = []
        for name in names {
            let counts = values.map { $0[name] ?? 0 }
            let total = counts.reduce(0, &+)
            if total > 0 { rows.append((total, [grouped(total), name] + (showsCPUs ? counts.map(grouped) : []))) }
        }
        for counter in machine where counter.value > 0 {
            rows.append(
                (
                    counter.value,
                    [grouped(counter.value), "\(counter.name) (machine)"] + (showsCPUs ? cpus.map { _ in "" } : [])
                ))
        }
        rows.sort { ($1.total, $0.cells[1]) < ($0.total, $1.cells[1]) }
        let head = ["events", "KVM's counter"] + (showsCPUs ? cpus.indices.map { "vCPU \($0)" } : [])
        return "counted in the kernel\n" + align([head] + rows.map(\.cells), left: [1])
    }

    // MARK: Text

    /// Columns of equal width, numbers to the right.
    private static func align(_ rows: [[String]], left: Set<Int>) -> String {
        let widths = rows[0].indices.map { column in rows.map { $0[column].utf8.count }.max() ?? 0 }
        return rows.map { row in
            let cells = zip(row.indices, row).map { column, cell in
                let space = String(repeating: " ", count: widths[column] - cell.utf8.count)
                return left.contains(column) ? cell + space : space + cell
            }
            let line = "  " + cells.joined(separator: "  ")
            return String(line.reversed().drop { $0 == " " }.reversed())
        }.joined(separator: "\n")
    }

    /// Three digits a group.
    static func grouped(_ number: UInt64) -> String {
        var digits = Array(String(number))
        for place in stride(from: digits.count - 3, to: 0, by: -3) { digits.insert(",", at: place) }
        return String(digits)
    }

    /// With one decimal.
    static func percent(_ part: UInt64, of total: UInt64) -> String {
        guard total > 0 else { return "" }
        let tenths = Int((Double(part) / Double(total) * 1000).rounded())
        return "\(tenths / 10).\(tenths % 10)"
    }
}
