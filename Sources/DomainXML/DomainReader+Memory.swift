// SPDX-License-Identifier: Apache-2.0

internal import Inventory

/// CPUs, memory and nodes.
extension DomainReader {
    mutating func readMemory() throws(DomainError) {
        guard let memory = root.first("memory") else { throw .missing("memory") }
        let bytes = try Self.bytes(memory)
        if let current = root.first("currentMemory"), try Self.bytes(current) != bytes {
            ignore(current, nil, "the guest has all of its memory from the start; --balloon takes some of it back")
        }
        let vcpu = root.first("vcpu")
        let cpus = vcpu?.word ?? "1"
        vcpu?.take("placement", "static")
        vcpu?.take("current", cpus)
        add("cpus", cpus)
        add("mem", Self.size(bytes))
        try readBacking()
        readProcessor()
        try readNodes(memory: bytes, cpus: cpus)
    }

    /// The number of an element's text, in its `unit`.
    static func bytes(_ element: Element, standard: String = "KiB") throws(DomainError) -> UInt64 {
        try bytes(element.word, unit: element.take("unit") ?? standard, element.path)
    }

    private static func bytes(_ text: String, unit: String, _ path: String) throws(DomainError) -> UInt64 {
        let units: [String: UInt64] = [
            "b": 1, "bytes": 1, "kb": 1000, "k": 1 << 10, "kib": 1 << 10, "mb": 1_000_000, "m": 1 << 20,
            "mib": 1 << 20, "gb": 1_000_000_000, "g": 1 << 30, "gib": 1 << 30, "tb": 1_000_000_000_000, "t": 1 << 40,
            "tib": 1 << 40,
        ]
        guard let factor = units[unit.lowercased()] else {
            throw .unsupported(path: path + "/@unit", "'\(unit)' is not a unit; expected KiB, MiB, GiB or another one")
        }
        guard let product = UInt64(text)?.multipliedReportingOverflow(by: factor), !product.overflow else {
            throw .unsupported(path: path, "'\(text)' is not a size")
        }
        // libvirt counts in KiB, and rounds up.
        let rounded = product.partialValue.addingReportingOverflow(1023)
        guard !rounded.overflow else { throw .unsupported(path: path, "'\(text)' is too large") }
        return rounded.partialValue & ~1023
    }

    /// As an option has it.
    static func size(_ bytes: UInt64) -> String {
        for (shift, unit) in [(UInt64(30), "G"), (20, "M"), (10, "K")] where bytes != 0 && bytes % (1 << shift) == 0 {
            return "\(bytes >> shift)\(unit)"
        }
        return String(bytes)
    }

    private mutating func readBacking() throws(DomainError) {
        guard let backing = root.first("memoryBacking") else { return }
        if let pages = backing.first("hugepages") {
            let sizes = pages.all("page")
            var kinds: [UInt64] = []
            for page in sizes {
                let number = page.take("size") ?? ""
                kinds.append(try Self.bytes(number, unit: page.take("unit") ?? "KiB", page.path))
            }
            switch Set(kinds) {
            case [], [2 << 20]: add("hugepages", "2M")
            case [1 << 30]: add("hugepages", "1G")
            default:
                throw .unsupported(path: pages.path, "guest RAM has pages of one size here; expected 2 MiB or 1 GiB")
            }
        }
        if let allocation = backing.first("allocation") {
            switch allocation.take("mode") {
            case "immediate"?: add("prealloc")
            case "ondemand"?, nil: break
            default: allocation.leave("mode")
            }
        }
        let access = backing.first("access")
        access?.take("mode", "shared", "private")
        if access?.value("mode") == "shared" {
            // It is a memfd then.
            backing.first("source")?.take("type", "memfd")
            add("shared")
        } else {
            backing.first("source")?.take("type", "anonymous")
        }
    }

    private mutating func readProcessor() {
        guard let cpu = root.first("cpu") else { return }
        // A model that is not the host's is named at the end, with what belongs to it.
        cpu.take("mode", "host-passthrough")
        if cpu.value("mode") == "host-passthrough" {
            cpu.take("check", "none")
            cpu.take("migratable", "on", "off")
        }
    }

    /// `cpu/numa` and `numatune`. Memory that is placed without nodes makes one node of the whole guest.
    private mutating func readNodes(memory: UInt64, cpus: String) throws(DomainError) {
        let cells = root.first("cpu")?.first("numa")?.all("cell") ?? []
        let tune = root.first("numatune")
        let all = tune?.children.first { $0.name == "memory" }
        let everywhere = all.map { policy($0) } ?? ""
        guard !cells.isEmpty else {
            guard !everywhere.isEmpty, let count = Int(cpus), count > 0 else { return }
            add("numa", "mem=\(Self.size(memory)),cpus=\(Self.range("0-\(count - 1)"))\(everywhere)")
            return
        }
        let own = Dictionary(
            (tune?.children ?? []).filter { $0.name == "memnode" }.map { ($0.value("cellid") ?? "", $0) }
        ) { first, _ in first }
        for (index, cell) in cells.enumerated() {
            guard (cell.take("id") ?? "\(index)") == "\(index)" else {
                throw .unsupported(path: cell.path, "nodes are numbered in their order here, from 0")
            }
            let size = try Self.bytes(cell.take("memory") ?? "", unit: cell.take("unit") ?? "KiB", cell.path)
            var words = "mem=\(Self.size(size))"
            for range in Self.ranges(cell.take("cpus") ?? "") { words += ",cpus=\(range)" }
            if let own = own["\(index)"] {
                _ = own.take("cellid")
                words += policy(own)
            } else {
                words += everywhere
            }
            for sibling in cell.first("distances")?.all("sibling") ?? [] {
                guard let id = sibling.take("id"), let value = sibling.take("value") else { continue }
                // From a node to itself it is always 10.
                if id != "\(index)" || value != "10" { words += ",distance=\(id):\(value)" }
            }
            add("numa", words)
        }
    }

    /// `,host=0-1,policy=bind`; empty for a placement that does not exist here.
    private mutating func policy(_ element: Element) -> String {
        let modes = ["strict": "bind", "preferred": "preferred", "interleave": "interleave"]
        guard let nodes = element.value("nodeset"), let mode = modes[element.value("mode") ?? "strict"] else {
            return ""
        }
        element.isUsed = true
        for name in ["mode", "nodeset"] { _ = element.take(name) }
        element.take("placement", "static")
        // bind is what host= alone means.
        return Self.ranges(nodes).map { ",host=\($0)" }.joined() + (mode == "bind" ? "" : ",policy=\(mode)")
    }

    /// `0-3,8` in its parts.
    private static func ranges(_ text: String) -> [String] { text.split(separator: ",").map { range(String($0)) } }

    private static func range(_ text: String) -> String {
        let bounds = text.split(separator: "-")
        return bounds.count == 2 && bounds[0] == bounds[1] ? String(bounds[0]) : text
    }
}
