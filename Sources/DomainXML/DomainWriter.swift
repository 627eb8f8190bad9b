// SPDX-License-Identifier: Apache-2.0

public import Inventory

/// Makes a document of a definition. What libvirt has no element for is in the metadata, so that nothing is lost when
/// the document is read again; what came out of an element is compared with what went into it.
public struct DomainWriter {
    private let name: String
    private let definition: Definition
    private let memory: UInt64
    /// Options of which the elements would say something else.
    private var excluded: Set<String> = []

    /// - Parameters:
    ///   - definition: with absolute paths.
    ///   - memory: bytes of the guest's RAM.
    public init(name: String, _ definition: Definition, memory: UInt64) {
        (self.name, self.definition, self.memory) = (name, definition, memory)
    }

    /// Options that have elements; `disk` and `net` have several, with words of their own.
    private static let known = [
        "uuid", "hugepages", "prealloc", "shared", "numa", "bus", "firmware", "kernel", "boot", "initrd", "cmdline",
        "rng", "console", "on-reboot",
    ]

    /// The document.
    public func xml() throws(DomainError) -> String {
        var writer = self
        let read = try Domain(writer.root()).definition
        writer.excluded = Set(
            Self.known.filter { name in
                read.options.filter { $0.name == name } != definition.options.filter { $0.name == name }
            })
        return try writer.root().xml()
    }

    private func value(_ option: String) -> String? { excluded.contains(option) ? nil : definition.value(of: option) }

    private func has(_ option: String) -> Bool { !excluded.contains(option) && definition.has(option) }

    private func root() -> Element {
        var own: [Element] = []
        let disks = devices("disk", &own) { disk($0, number: $1) }
        let networks = devices("net", &own) { words, _ in interface(words) }
        own += otherOptions()
        let root = Element("domain", [("type", "kvm")])
        root.add(Element("name", text: name))
        if let uuid = value("uuid"), uuid != "none" { root.add(Element("uuid", text: uuid)) }
        if !own.isEmpty {
            let machine = Element(
                "machine", [("xmlns:swkvm", Domain.namespace)], prefix: "swkvm", namespace: Domain.namespace, own)
            root.add(Element("metadata", [machine]))
        }
        root.add(Element("memory", [("unit", "KiB")], text: "\(memory >> 10)"))
        if let backing { root.add(backing) }
        let cpus = definition.value(of: "cpus") ?? "1"
        root.add(Element("vcpu", [("placement", "static")], text: cpus))
        let nodes = nodes()
        if !nodes.placement.isEmpty { root.add(Element("numatune", nodes.placement)) }
        root.add(boot)
        root.add(Element("features", [Element("acpi"), Element("apic")]))
        root.add(
            Element(
                "cpu", [("mode", "host-passthrough")], nodes.cells.isEmpty ? [] : [Element("numa", nodes.cells)]))
        root.add(Element("clock", [("offset", "utc")]))
        root.add(Element("on_poweroff", text: "destroy"))
        root.add(Element("on_reboot", text: value("on-reboot") == "exit" ? "destroy" : "restart"))
        root.add(Element("on_crash", text: "destroy"))
        root.add(
            Element("devices", disks + networks + [serial] + entropy + [Element("memballoon", [("model", "none")])]))
        return root
    }

    /// Elements for the values of an option; words that have none, and values that have none at all, go to `own`.
    private func devices(
        _ option: String, _ own: inout [Element], _ make: (String, Int) -> (element: Element, rest: String)?
    ) -> [Element] {
        var elements: [Element] = []
        for (index, value) in definition.values(of: option).enumerated() {
            guard let made = make(value, elements.count) else {
                own.append(part("option", [("name", option), ("number", "\(index + 1)"), ("value", value)]))
                continue
            }
            elements.append(made.element)
            if !made.rest.isEmpty {
                own.append(
                    part(
                        "words", [("option", option), ("number", "\(elements.count)"), ("value", made.rest)]))
            }
        }
        return elements
    }

    private func part(_ name: String, _ attributes: [(String, String?)]) -> Element {
        Element(name, attributes, prefix: "swkvm", namespace: Domain.namespace)
    }

    private func otherOptions() -> [Element] {
        let bundled = !definition.statesWhatBoots ? [part("option", [("name", "kernel"), ("value", "bundled")])] : []
        let expressed = Set(Self.known).subtracting(excluded).union(["cpus", "mem", "disk", "net"])
        return definition.options.filter { !expressed.contains($0.name) }.map { option in
            part("option", [("name", option.name), ("value", option.value)])
        } + bundled
    }

    private var backing: Element? {
        var parts: [Element] = []
        if let kind = value("hugepages"), ["2M", "1G"].contains(kind) {
            let page = Element("page", [("size", kind == "2M" ? "2" : "1"), ("unit", kind == "2M" ? "MiB" : "GiB")])
            parts.append(Element("hugepages", [page]))
        }
        if has("shared") {
            parts.append(Element("source", [("type", "memfd")]))
            parts.append(Element("access", [("mode", "shared")]))
        }
        if has("prealloc") { parts.append(Element("allocation", [("mode", "immediate")])) }
        return parts.isEmpty ? nil : Element("memoryBacking", parts)
    }

    private var boot: Element {
        let machine = value("bus") == "pci" ? "q35" : "microvm"
        var parts = [Element("type", [("arch", "x86_64"), ("machine", machine)], text: "hvm")]
        if let firmware = value("firmware") {
            var list = OptionList(firmware)
            parts.append(Element("loader", [("type", "rom")], text: list.takeFirst()))
        } else if let kernel = value("kernel"), kernel != "bundled" {
            parts.append(Element("kernel", text: kernel))
            if let initrd = value("initrd") { parts.append(Element("initrd", text: initrd)) }
            if let words = value("cmdline"), !words.isEmpty { parts.append(Element("cmdline", text: words)) }
        } else if value("boot") == "default" {
            parts.append(Element("boot", [("dev", "hd")]))
        }
        return Element("os", parts)
    }

    // MARK: Nodes

    private func nodes() -> (cells: [Element], placement: [Element]) {
        guard !excluded.contains("numa") else { return ([], []) }
        var cells: [Element] = []
        var placement: [Element] = []
        for (index, words) in definition.values(of: "numa").enumerated() {
            var size: UInt64?
            var lists: [String: [String]] = [:]
            for (key, value) in OptionList(words).items {
                if key == "mem" {
                    size = value.flatMap(Self.bytes)
                } else {
                    lists[key, default: []].append(value ?? "")
                }
            }
            // What cannot be written is found when it is read again.
            guard let size else { return ([], []) }
            let siblings = (lists["distance"] ?? []).map { text in
                let parts = text.split(separator: ":", omittingEmptySubsequences: false)
                return Element(
                    "sibling", [("id", parts.first.map(String.init)), ("value", parts.last.map(String.init))])
            }
            let cpus = lists["cpus"].map { $0.joined(separator: ",") }
            cells.append(
                Element(
                    "cell",
                    [("id", "\(index)"), ("cpus", cpus), ("memory", "\(size >> 10)"), ("unit", "KiB")],
                    siblings.isEmpty ? [] : [Element("distances", siblings)]))
            if let hosts = lists["host"] {
                let mode = lists["policy"]?.first ?? "bind"
                placement.append(
                    Element(
                        "memnode",
                        [
                            ("cellid", "\(index)"), ("mode", mode == "bind" ? "strict" : mode),
                            ("nodeset", hosts.joined(separator: ",")),
                        ]))
            }
        }
        return (cells, placement)
    }

    /// Whole numbers with a unit alone; nil for others.
    static func bytes(_ text: String) -> UInt64? {
        let shifts: [Character: UInt64] = ["K": 10, "M": 20, "G": 30, "T": 40]
        guard let last = text.last else { return nil }
        guard let shift = shifts[last] else { return UInt64(text) }
        guard let product = UInt64(text.dropLast())?.multipliedReportingOverflow(by: 1 << shift) else { return nil }
        return product.overflow ? nil : product.partialValue
    }

    // MARK: Devices that there is one of

    private var serial: Element {
        let target = Element("target", [("type", "isa-serial"), ("port", "0")])
        let usual = Element("serial", [("type", "pty")], [target])
        guard let value = value("console") else { return usual }
        var list = OptionList(value)
        let first = list.takeFirst()
        if first == "none" { return Element("serial", [("type", "null")], [target]) }
        if first.hasPrefix("file:") {
            let source = Element("source", [("path", String(first.dropFirst(5))), ("append", "on")])
            return Element("serial", [("type", "file")], [source, target])
        }
        guard first.hasPrefix("unix:") else { return usual }
        let source = Element("source", [("mode", "bind"), ("path", String(first.dropFirst(5)))])
        let log = list.items.first { $0.key == "log" }?.value.map { Element("log", [("file", $0), ("append", "on")]) }
        return Element("serial", [("type", "unix")], [source] + (log.map { [$0] } ?? []) + [target])
    }

    private var entropy: [Element] {
        guard has("rng") else { return [] }
        let backend = Element("backend", [("model", "random")], text: "/dev/urandom")
        let items = OptionList(value("rng") ?? "").items
        let limit = items.first { $0.key == "max-bytes" }?.value.map { bytes in
            Element("rate", [("bytes", bytes), ("period", items.first { $0.key == "period" }?.value)])
        }
        return [Element("rng", [("model", "virtio")], (limit.map { [$0] } ?? []) + [backend])]
    }
}
