// SPDX-License-Identifier: Apache-2.0

internal import Inventory
internal import Linux

/// Disks, in the document's order, and behind them media of CD drives.
extension DomainReader {
    static func isDisk(_ element: Element) -> Bool { ["disk", "lun"].contains(element.value("device") ?? "disk") }

    mutating func readDisks(_ devices: Element, _ own: OwnPart?) throws(DomainError) {
        let all = devices.children.filter { $0.name == "disk" && $0.namespace.isEmpty }
        var disks: [String] = []
        for element in all where Self.isDisk(element) {
            disks.append(try disk(element) + (own?.words("disk", disks.count + 1).map { "," + $0 } ?? ""))
        }
        let order = all.filter { $0.children.contains { $0.name == "boot" } }
        if let first = order.min(by: { Self.bootOrder($0) < Self.bootOrder($1) }), Self.isDisk(first),
            first === all.first(where: Self.isDisk)
        {
            markUsed(first.children.first { $0.name == "boot" })
        }
        for element in all where element.value("device") == "cdrom" {
            guard element.children.contains(where: { $0.name == "source" }) else {
                ignore(element, nil, "a CD drive without a medium")
                continue
            }
            // Its driver has nothing that libvirt would leave out: a medium is raw.
            guard let medium = try? disk(element, isMedium: true) else { continue }
            disks.append(medium + (own?.words("disk", disks.count + 1).map { "," + $0 } ?? ""))
            note(element, "@device", "cdrom: the guest has a read-only virtio disk instead of a CD drive")
        }
        own?.insert("disk", into: &disks)
        for disk in disks { add("disk", disk) }
    }

    private static func bootOrder(_ disk: Element) -> Int {
        disk.children.first { $0.name == "boot" }?.value("order").flatMap { Int($0) } ?? .max
    }

    private func markUsed(_ element: Element?) {
        element?.isUsed = true
        for name in element?.attributes.map(\.name) ?? [] { _ = element?.take(name) }
    }

    /// The words of `--disk`.
    mutating func disk(_ element: Element, isMedium: Bool = false) throws(DomainError) -> String {
        let place = try source(element)
        element.isUsed = true
        element.take("device", "disk", "cdrom")
        let target = element.first("target")
        // The guest's driver gives the names, in the order of the disks.
        _ = target?.take("dev")
        target?.take("bus", "virtio")
        if let target, let bus = target.value("bus"), bus != "virtio", !isMedium {
            ignore(target, "bus", "\(bus): the guest has a virtio disk")
        }
        var words = [place.commaDoubled]
        let driver = element.first("driver")
        driver?.take("name", "qemu")
        words.append("format=\(try format(element, driver, place, isMedium))")
        if element.first("readonly") != nil || isMedium { words.append("ro") }
        if let cache = driver?.value("cache") {
            switch cache {
            case "default": driver?.take("cache", cache)
            case "writeback", "none":
                driver?.take("cache", cache)
                words.append("cache=\(cache)")
            default: if let driver { ignore(driver, "cache", "\(cache): expected writeback or none") }
            }
        }
        if let driver, let io = driver.value("io") {
            if io == "io_uring" { driver.take("io", io) } else { ignore(driver, "io", "\(io): disks use io_uring") }
        }
        // A guest's discards always reach the image.
        driver?.take("discard", "unmap")
        if let serial = element.first("serial") { words.append("serial=\(serial.text.commaDoubled)") }
        if let queues = driver?.take("queues") { words.append("queues=\(queues)") }
        words += limits(element)
        if element.first("shareable") != nil { words.append("lock=off") }
        for directory in backingDirectories(element, place) { words.append("backing-dir=\(directory.commaDoubled)") }
        return words.joined(separator: ",")
    }

    /// Path, device or address.
    private func source(_ element: Element) throws(DomainError) -> String {
        let source = element.first("source")
        func required(_ name: String) throws(DomainError) -> String {
            guard let value = source?.take(name), !value.isEmpty else {
                throw .missing(element.path + "/source/@" + name)
            }
            return value
        }
        switch element.take("type") {
        case "file"?, nil: return try required("file")
        case "block"?: return try required("dev")
        case "network"? where source?.value("protocol") == "nbd": return try address(element, required("protocol"))
        case let type?:
            let protocolName = source?.value("protocol").map { " of the protocol \($0)" } ?? ""
            throw .unsupported(
                path: element.path,
                "a disk of type \(type)\(protocolName) cannot be opened here; expected file, block, or network with nbd"
            )
        }
    }

    private func address(_ element: Element, _ scheme: String) throws(DomainError) -> String {
        guard let source = element.first("source"), source.take("tls") ?? "no" == "no" else {
            throw .unsupported(
                path: element.path + "/source/@tls",
                "libvirt keeps the certificates elsewhere; remove it, and give the disk's nbds:// address with `swkvm edit`"
            )
        }
        let export = Self.percentEncoded(source.take("name") ?? "", kept: "/")
        let host = source.first("host")
        switch host?.take("transport") ?? "tcp" {
        case "tcp":
            guard let name = host?.take("name") else { throw .missing(element.path + "/source/host/@name") }
            let port = host?.take("port").map { ":" + $0 } ?? ""
            return "\(scheme)://\(name.utf8.contains(UInt8(ascii: ":")) ? "[\(name)]" : name)\(port)/\(export)"
        case "unix":
            guard let path = host?.take("socket") else { throw .missing(element.path + "/source/host/@socket") }
            return "\(scheme)+unix:///\(export)?socket=\(Self.percentEncoded(path, kept: "/"))"
        case let transport:
            throw .unsupported(path: element.path, "the transport '\(transport)' is not known; expected tcp or unix")
        }
    }

    /// RFC 3986, section 2.3.
    static func percentEncoded(_ text: String, kept: String) -> String {
        text.rawBytes.map { byte in
            switch byte {
            case 0x30...0x39, 0x41...0x5a, 0x61...0x7a, UInt8(ascii: "-"), UInt8(ascii: "."), UInt8(ascii: "_"),
                UInt8(ascii: "~"):
                String(UnicodeScalar(byte))
            case _ where kept.utf8.contains(byte): String(UnicodeScalar(byte))
            default: "%" + (byte < 16 ? "0" : "") + String(byte, radix: 16, uppercase: true)
            }
        }.joined()
    }

    /// The format's name, which is the same here.
    private mutating func format(
        _ element: Element, _ driver: Element?, _ place: String, _ isMedium: Bool
    ) throws(DomainError) -> String {
        guard let type = driver?.take("type") else {
            if isMedium { return "raw" }
            let stated = Self.formatOfName(place)
            note(
                element, "driver/@type",
                "missing; libvirt would take raw; "
                    + (stated.map { "the file's name says \($0)" } ?? "raw is taken, since the file's name says nothing")
            )
            return stated ?? "raw"
        }
        guard ["raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx"].contains(type) else {
            throw .unsupported(
                path: element.path + "/driver/@type",
                "\(type): the format is not known; expected raw, qcow2, vmdk, vdi, vpc or vhdx")
        }
        return type
    }

    /// What an extension stands for, as `swkvm run` has it.
    static func formatOfName(_ path: String) -> String? {
        if path.hasPrefix("nbd:") || path.hasPrefix("nbd+") { return "raw" }
        let name = path.utf8.split(separator: UInt8(ascii: "/")).last ?? Substring().utf8
        guard let point = name.lastIndex(of: UInt8(ascii: ".")) else { return nil }
        switch Substring(name[name.index(after: point)...]).lowercased() {
        case "raw", "img": return "raw"
        case "qcow2", "qcow": return "qcow2"
        case "vmdk": return "vmdk"
        case "vdi": return "vdi"
        case "vhd", "vpc": return "vpc"
        case "vhdx": return "vhdx"
        default: return nil
        }
    }

    private func limits(_ element: Element) -> [String] {
        guard let tune = element.first("iotune") else { return [] }
        var words: [String] = []
        for (word, name) in [("bps", "total_bytes_sec"), ("iops", "total_iops_sec")] {
            // Zero is libvirt's word for none.
            guard let rate = tune.first(name)?.word, rate != "0", !rate.isEmpty else { continue }
            words.append("\(word)=\(rate)")
            // At that rate for a number of seconds, of which the whole is the burst.
            guard let most = tune.first(name + "_max")?.word, let number = UInt64(most), number > 0 else { continue }
            let seconds = tune.first(name + "_max_length").flatMap { UInt64($0.word) } ?? 1
            let product = number.multipliedReportingOverflow(by: seconds)
            words.append("\(word)-burst=\(product.overflow ? .max : product.partialValue)")
        }
        return words
    }

    /// Directories of backing files that are not in or below the image's own, which has to be said here.
    private func backingDirectories(_ element: Element, _ place: String) -> [String] {
        var directories: [String] = []
        var layer = element.first("backingStore")
        let own = Self.directory(of: place)
        while let current = layer {
            for name in ["type", "index"] { _ = current.take(name) }
            _ = current.first("format")?.take("type")
            if let file = current.first("source")?.take("file") {
                let directory = Self.directory(of: file)
                let isBelow = directory == own || directory.hasPrefix(own + "/")
                if !isBelow, !directories.contains(directory) { directories.append(directory) }
            }
            layer = current.first("backingStore")
        }
        return directories
    }

    private static func directory(of path: String) -> String {
        guard let slash = path.utf8.lastIndex(of: UInt8(ascii: "/")) else { return "" }
        return slash == path.startIndex ? "/" : String(Substring(path.utf8[..<slash]))
    }
}
