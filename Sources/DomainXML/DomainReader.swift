// SPDX-License-Identifier: Apache-2.0

internal import Inventory

/// Makes a definition of a document. Everything that it uses is marked, and the rest is named at the end.
struct DomainReader {
    let root: Element
    private(set) var name = ""
    var options: [Definition.Option] = []
    private var notes: [Domain.Note] = []

    /// The network in the place of one of libvirt's.
    let network: String

    init(_ root: Element, network: String = "nat") { (self.root, self.network) = (root, network) }

    mutating func read() throws(DomainError) {
        guard root.name == "domain", root.namespace.isEmpty else { throw .notDomain(root.qualifiedName) }
        root.isUsed = true
        try readKind()
        guard let name = root.first("name")?.word, !name.isEmpty else { throw .missing("name") }
        self.name = name
        if let uuid = root.first("uuid") { add("uuid", uuid.word) }
        try readMemory()
        let devices = root.first("devices") ?? Element("devices")
        readFeatures()
        let own = ownPart()
        let isDecided = own?.decidesBoot ?? false
        try readBoot(hasDisk: !isDecided && devices.children.contains { $0.name == "disk" && Self.isDisk($0) })
        try readDisks(devices, own)
        try readInterfaces(devices, own)
        try readEntropy(devices)
        readConsole(devices)
        readLifecycle()
        for element in devices.children where element.name == "memballoon" { readNothing(element) }
        for element in devices.children where element.name == "controller" && element.value("type") == "usb" {
            readNothing(element)
        }
        for option in own?.all(of: "option") ?? [] where option.value("number") == nil {
            guard let name = option.take("name") else { continue }
            add(name, option.take("value"))
        }
    }

    // MARK: Results

    mutating func add(_ option: String, _ value: String? = nil) { options.append(Definition.Option(option, value)) }

    mutating func ignore(_ element: Element, _ attribute: String? = nil, _ reason: String = "") {
        if let attribute { _ = element.take(attribute) } else { element.isUsed = true }
        notes.append(.init(kind: .ignored, path: Self.path(element, attribute), reason: reason))
    }

    /// - Parameter path: below the element: of something that the document does not have.
    mutating func note(_ element: Element, _ path: String, _ reason: String) {
        let start = element.path.isEmpty ? "" : element.path + "/"
        notes.append(.init(kind: .otherwise, path: start + path, reason: reason))
    }

    static func path(_ element: Element, _ attribute: String?) -> String {
        let start = element.path
        guard let attribute else { return start }
        return start.isEmpty ? "@\(attribute)" : "\(start)/@\(attribute)"
    }

    /// The notes, with those for everything that was not used; several for the same kind of element become one.
    mutating func allNotes() -> [Domain.Note] {
        var rest: [Domain.Note] = []
        collect(root, &rest)
        var merged: [Domain.Note] = []
        // Where the first note of a kind is among the merged ones, and how many there are.
        var kinds: [String: (place: Int, count: Int)] = [:]
        for note in notes + rest {
            let path = Self.withoutNumbers(note.path), kind = path + "\n" + note.reason
            guard note.kind == .ignored, let (place, count) = kinds[kind] else {
                if note.kind == .ignored { kinds[kind] = (merged.count, 1) }
                merged.append(note)
                continue
            }
            kinds[kind] = (place, count + 1)
            merged[place] = .init(kind: .ignored, path: "\(path) (\(count + 1) times)", reason: note.reason)
        }
        return merged
    }

    private func collect(_ element: Element, _ notes: inout [Domain.Note]) {
        guard element.isUsed else {
            notes.append(.init(kind: .ignored, path: element.path, reason: ""))
            return
        }
        for attribute in element.attributes where !attribute.isUsed {
            notes.append(
                .init(
                    kind: .ignored, path: "\(Self.path(element, attribute.name))='\(attribute.value)'", reason: ""))
        }
        for child in element.children { collect(child, &notes) }
    }

    private static func withoutNumbers(_ path: String) -> String {
        var text = String.UnicodeScalarView()
        var isNumber = false
        for scalar in path.unicodeScalars {
            if scalar == "[" { isNumber = true }
            if !isNumber { text.append(scalar) }
            if scalar == "]" { isNumber = false }
        }
        return String(text)
    }

    /// The part of the metadata that ``DomainWriter`` has written.
    private func ownPart() -> OwnPart? {
        guard let metadata = root.first("metadata"),
            let part = metadata.children.first(where: { $0.namespace == Domain.namespace && $0.name == "machine" })
        else { return nil }
        part.isUsed = true
        return OwnPart(part)
    }

    /// What is only swkvm's.
    struct OwnPart {
        let element: Element
        /// The first one for each option and number.
        private let words: [[String?]: Element]

        init(_ element: Element) {
            self.element = element
            let all = element.children.filter { $0.name == "words" && $0.namespace == Domain.namespace }
            words = Dictionary(all.map { ([$0.value("option"), $0.value("number")], $0) }) { first, _ in first }
        }

        func all(of name: String) -> [Element] {
            let found = element.children.filter { $0.name == name && $0.namespace == Domain.namespace }
            for element in found { element.isUsed = true }
            return found
        }

        /// Indicates whether what boots is said here.
        var decidesBoot: Bool {
            element.children.contains { child in
                child.name == "option" && Definition.bootOptions.contains(child.value("name") ?? "")
            }
        }

        /// The words of the option that are in no element of libvirt's.
        /// - Parameter number: of the option among those of its name, from 1.
        func words(_ option: String, _ number: Int) -> String? {
            let found = words[[option, "\(number)"]]
            found?.isUsed = true
            for name in ["option", "number"] { _ = found?.take(name) }
            return found?.take("value")
        }

        /// Puts options that libvirt has no element for at their places among the others.
        func insert(_ option: String, into values: inout [String]) {
            for element in all(of: "option") where element.value("name") == option {
                guard let number = element.take("number").flatMap({ Int($0) }), let value = element.take("value"),
                    (1...values.count + 1).contains(number)
                else { continue }
                _ = element.take("name")
                values.insert(value, at: number - 1)
            }
        }
    }

    // MARK: General elements

    private mutating func readKind() throws(DomainError) {
        switch root.take("type") {
        case "kvm"?, "qemu"?, "test"?: break
        case let type:
            throw .unsupported(
                path: "@type", "'\(type ?? "")' is not a kind of machine that runs on KVM; expected kvm")
        }
        // Of a running machine.
        _ = root.take("id")
        let os = root.first("os") ?? Element("os")
        let type = os.first("type")
        guard ["hvm", ""].contains(type?.word ?? "") else {
            throw .unsupported(path: "os/type", "'\(type?.word ?? "")' is no whole machine; expected hvm")
        }
        switch type?.take("arch") {
        case nil, "x86_64"?: break
        case "i686"?: if let type { ignore(type, "arch", "i686: the guest has a CPU of x86-64, which runs it too") }
        case let arch?: throw .unsupported(path: "os/type/@arch", "'\(arch)' does not run here; expected x86_64")
        }
        readMachineType(os, type)
    }

    /// The bus: every machine type of libvirt's but microvm has PCI.
    private mutating func readMachineType(_ os: Element, _ type: Element?) {
        let machine = type?.take("machine")
        if machine == "microvm" { return }
        add("bus", "pci")
        guard let machine, let type else {
            return note(
                os, "type/@machine",
                "missing; libvirt would take i440fx; swkvm has PCI Express (bus=pci), and no other devices of a PC")
        }
        if machine != "q35", !machine.hasPrefix("pc-q35-") {
            ignore(type, "machine", "\(machine): the machine has PCI Express (bus=pci)")
        }
    }

    private mutating func readFeatures() {
        let features = root.first("features")
        for name in ["apic", "pae"] { _ = features?.first(name) }
        if features?.first("acpi") == nil {
            note(root, "features/acpi", "missing; libvirt would make a machine without ACPI; swkvm's has it")
        }
        root.first("clock")?.take("offset", "utc")
        for timer in root.first("clock")?.children ?? [] where timer.value("name") == "hpet" {
            timer.take("present", "no")
            if timer.value("present") == "no" {
                timer.isUsed = true
                _ = timer.take("name")
            }
        }
        for element in root.first("pm")?.children ?? [] where element.value("enabled") == "no" {
            element.isUsed = true
            _ = element.take("enabled")
        }
    }

    private mutating func readBoot(hasDisk: Bool) throws(DomainError) {
        let os = root.first("os") ?? Element("os")
        for boot in os.children where boot.name == "boot" && boot.value("dev") == "hd" {
            boot.isUsed = true
            _ = boot.take("dev")
        }
        let kernel = os.first("kernel")?.text ?? ""
        if kernel.isEmpty, readFirmware(os) { return }
        if !kernel.isEmpty {
            add("kernel", kernel)
            if let initrd = os.first("initrd")?.text, !initrd.isEmpty { add("initrd", initrd) }
        } else if hasDisk {
            add("boot", "default")
        }
        if !kernel.isEmpty || !hasDisk, let words = os.first("cmdline")?.text, !words.isEmpty { add("cmdline", words) }
        let reason =
            kernel.isEmpty
            ? "swkvm boots the files of the disk without firmware" : "swkvm starts the kernel without firmware"
        if let loader = os.children.first(where: { $0.name == "loader" })
            ?? os.children.first(where: { $0.name == "bios" })
        {
            ignore(loader, nil, reason)
        }
        if let firmware = os.value("firmware") { ignore(os, "firmware", "\(firmware): \(reason)") }
    }

    /// Reads firmware that is a ROM, such as SeaBIOS. What is in a flash device is UEFI firmware, which does not run
    /// here.
    private mutating func readFirmware(_ os: Element) -> Bool {
        guard let loader = os.children.first(where: { $0.name == "loader" }), loader.value("type") ?? "rom" == "rom",
            !loader.word.isEmpty
        else { return false }
        loader.isUsed = true
        _ = loader.take("type")
        // A ROM is always read-only, and there is no system management mode.
        loader.take("readonly", "yes")
        loader.take("secure", "no")
        os.first("bios")?.take("useserial", "yes")
        add("firmware", loader.word.commaDoubled)
        return true
    }

    private mutating func readEntropy(_ devices: Element) throws(DomainError) {
        guard let rng = devices.first("rng") else { return }
        guard let backend = rng.first("backend"), backend.value("model") == "random" else {
            return ignore(rng, nil, "the host's random number generator is the only source; expected model random")
        }
        _ = backend.take("model")
        rng.take("model", "virtio", "virtio-non-transitional")
        if !["", "/dev/urandom", "/dev/random"].contains(backend.word) {
            ignore(backend, nil, "\(backend.word): the host's random number generator is the source")
        }
        guard let rate = rng.first("rate"), let bytes = rate.take("bytes") else { return add("rng") }
        let period = rate.take("period")
        add("rng", "max-bytes=\(bytes)" + (period.map { ",period=\($0)" } ?? ""))
    }

    private mutating func readConsole(_ devices: Element) {
        // The first console is libvirt's other name for the first serial port.
        let serial = devices.children.first { $0.name == "serial" }
        let twin = devices.children.first { $0.name == "console" }
        let twinTarget = twin?.children.first { $0.name == "target" }?.value("type") ?? "serial"
        guard let port = serial ?? (twinTarget == "serial" ? twin : nil) else { return }
        if twinTarget == "serial", let twin { markTwin(twin) }
        port.isUsed = true
        let target = port.first("target")
        target?.take("port", "0")
        target?.take("type", "isa-serial", "serial")
        target?.first("model")?.take("name", "isa-serial")
        let source = port.first("source")
        let path = source?.value("path") ?? ""
        switch port.take("type") {
        case "null"?: add("console", "none")
        case "file"? where !path.isEmpty:
            _ = source?.take("path")
            source?.take("append", "on")
            add("console", "file:\(path.commaDoubled)")
        case "unix"? where !path.isEmpty && source?.value("mode") != "connect":
            for name in ["path", "mode"] { _ = source?.take(name) }
            var words = ["unix:\(path.commaDoubled)"]
            if let log = port.first("log"), let file = log.take("file") {
                log.take("append", "on")
                words.append("log=\(file.commaDoubled)")
            }
            add("console", words.joined(separator: ","))
        case "pty"?:
            // Of a running machine.
            for name in ["tty"] { _ = port.take(name) }
            if let source { _ = source.take("path") }
        case let type?:
            ignore(port, "type", "\(type): the console is the machine's own (swkvm console)")
        case nil: break
        }
        if let log = port.children.first(where: { $0.name == "log" && !$0.isUsed }) {
            ignore(log, nil, "the console's output is in the machine's own log (swkvm logs)")
        }
    }

    private func markTwin(_ twin: Element) {
        twin.isUsed = true
        for name in ["type", "tty"] { _ = twin.take(name) }
        for child in twin.children where ["source", "target", "log", "alias"].contains(child.name) {
            child.isUsed = true
            for name in child.attributes.map(\.name) { _ = child.take(name) }
        }
    }

    private mutating func readLifecycle() {
        if let element = root.first("on_poweroff"), element.word != "destroy" {
            ignore(element, nil, "\(element.word): a guest that powers off ends its machine")
        }
        switch root.first("on_reboot")?.word {
        case nil, "restart"?: break
        case "destroy"?: add("on-reboot", "exit")
        case let action?:
            if let element = root.first("on_reboot") { ignore(element, nil, "\(action): expected restart or destroy") }
        }
        if let element = root.first("on_crash"), element.word != "destroy" {
            ignore(element, nil, "\(element.word): a machine whose guest crashes ends")
        }
    }

    /// A device of which `model='none'` says that there is none.
    private func readNothing(_ element: Element) {
        guard element.value("model") == "none" else { return }
        element.isUsed = true
        for name in element.attributes.map(\.name) { _ = element.take(name) }
    }
}
