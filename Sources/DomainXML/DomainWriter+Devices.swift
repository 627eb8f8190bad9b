// SPDX-License-Identifier: Apache-2.0

internal import Inventory
internal import Linux

/// Disks and network interfaces: an element, and the words that it does not have.
extension DomainWriter {
    func disk(_ option: String, number: Int) -> (element: Element, rest: String)? {
        var list = OptionList(option)
        let path = list.takeFirst()
        let words = Dictionary(list.items.map { ($0.key, $0.value ?? "") }) { first, _ in first }
        guard let kind = Self.source(path), let format = words["format"] ?? DomainReader.formatOfName(path) else {
            return nil
        }
        func make() -> Element {
            let element = Element("disk", [("type", kind.type), ("device", "disk")])
            element.add(
                Element(
                    "driver",
                    [
                        ("name", "qemu"), ("type", format == "vhd" ? "vpc" : format), ("cache", words["cache"]),
                        ("queues", words["queues"]),
                    ]))
            element.add(kind.make())
            element.add(Element("target", [("dev", Self.diskName(number)), ("bus", "virtio")]))
            var limits: [Element] = []
            for (word, name) in [("bps", "total_bytes_sec"), ("iops", "total_iops_sec")] {
                guard let rate = words[word].flatMap(Self.bytes) else { continue }
                limits.append(Element(name, text: "\(rate)"))
                if let burst = words[word + "-burst"].flatMap(Self.bytes) {
                    limits.append(Element(name + "_max", text: "\(burst)"))
                }
            }
            if !limits.isEmpty { element.add(Element("iotune", limits)) }
            if words["ro"] != nil { element.add(Element("readonly")) }
            if words["lock"] == "off" { element.add(Element("shareable")) }
            if let serial = words["serial"] { element.add(Element("serial", text: serial)) }
            return element
        }
        var reader = DomainReader(Element("domain"))
        guard let read = try? reader.disk(make()), let rest = Self.rest(option, read, added: ["format"]) else {
            return nil
        }
        return (make(), rest)
    }

    /// What an option's value has besides what was read from its element; nil if that is something else.
    /// - Parameter added: words that the element says though the value leaves them out.
    private static func rest(_ option: String, _ read: String, added: Set<String>) -> String? {
        var list = OptionList(option), found = OptionList(read)
        guard list.takeFirst() == found.takeFirst() else { return nil }
        func normal(_ item: (key: String, value: String?)) -> [String?] {
            let isSize = item.key.hasSuffix("bps") || item.key.hasSuffix("bps-burst")
            return [item.key, isSize ? item.value.flatMap(bytes).map { "\($0)" } ?? item.value : item.value]
        }
        var known = found.items.map(normal)
        let rest = list.items.filter { item in
            guard let index = known.firstIndex(of: normal(item)) else { return true }
            known.remove(at: index)
            return false
        }
        let keys = Set(list.items.map(\.key))
        guard known.allSatisfy({ item in item[0].map { added.contains($0) && !keys.contains($0) } ?? false }) else {
            return nil
        }
        return rest.map { key, value in (key + (value.map { "=" + $0 } ?? "")).commaDoubled }.joined(separator: ",")
    }

    private static func source(_ path: String) -> (type: String, make: () -> Element)? {
        if path.hasPrefix("/dev/") { return ("block", { Element("source", [("dev", path)]) }) }
        if path.hasPrefix("/") { return ("file", { Element("source", [("file", path)]) }) }
        guard let start = path.firstOccurrence(of: "://"), !path.contains("%") else { return nil }
        let rest = path[start.upperBound...]
        let slash = rest.firstIndex(of: "/") ?? rest.endIndex
        let tail = rest[slash...].dropFirst()
        switch path[..<start.lowerBound] {
        case "nbd":
            var host = String(rest[..<slash])
            var port: String?
            if let colon = host.lastIndex(of: ":"), !host.hasSuffix("]") {
                port = String(host[host.index(after: colon)...])
                host = String(host[..<colon])
            }
            if host.hasPrefix("["), host.hasSuffix("]") { host = String(host.dropFirst().dropLast()) }
            let (name, place) = (String(tail), [("name", Optional(host)), ("port", port)])
            return (
                "network",
                {
                    Element(
                        "source", [("protocol", "nbd"), ("name", name.isEmpty ? nil : name)], [Element("host", place)])
                }
            )
        case "nbd+unix":
            let parts = tail.split(separator: "?", omittingEmptySubsequences: false)
            guard parts.count == 2, parts[1].hasPrefix("socket=") else { return nil }
            let (name, socket) = (String(parts[0]), String(parts[1].dropFirst(7)))
            return (
                "network",
                {
                    Element(
                        "source", [("protocol", "nbd"), ("name", name.isEmpty ? nil : name)],
                        [Element("host", [("transport", "unix"), ("socket", socket)])])
                }
            )
        default: return nil
        }
    }

    /// `vda` to `vdz`, `vdaa`, as the guest's driver names them.
    private static func diskName(_ number: Int) -> String {
        var (name, rest) = ("", number)
        while true {
            name = String(UnicodeScalar(UInt8(ascii: "a") + UInt8(rest % 26))) + name
            guard rest >= 26 else { return "vd" + name }
            rest = rest / 26 - 1
        }
    }

    func interface(_ option: String) -> (element: Element, rest: String)? {
        let items = OptionList(option).items
        let words = Dictionary(items.map { ($0.key, $0.value ?? "") }) { first, _ in first }
        func make() -> Element? {
            let element: Element
            if words["user"] != nil {
                element = Element("interface", [("type", "user")], [Element("backend", [("type", "passt")])])
                for (key, value) in items where key == "publish" {
                    guard let forward = Self.forward(value ?? "") else { return nil }
                    element.add(forward)
                }
            } else if words["nat"] == "" {
                element = Element(
                    "interface", [("type", "network")], [Element("source", [("network", DomainReader.ownNetwork)])])
            } else if let device = words["macvtap"] {
                element = Element(
                    "interface", [("type", "direct")], [Element("source", [("dev", device), ("mode", "bridge")])])
            } else if words["tap"] != nil || words["bridge"] != nil {
                element = Element("interface", [("type", words["bridge"] == nil ? "ethernet" : "bridge")])
                if let bridge = words["bridge"] { element.add(Element("source", [("bridge", bridge)])) }
                if let tap = words["tap"] { element.add(Element("target", [("dev", tap)])) }
            } else {
                return nil
            }
            if let mac = words["mac"] { element.add(Element("mac", [("address", mac)])) }
            element.add(Element("model", [("type", "virtio")]))
            if let queues = words["queues"] { element.add(Element("driver", [("queues", queues)])) }
            if let mtu = words["mtu"] { element.add(Element("mtu", [("size", mtu)])) }
            if words["mac-lock"] == "on" { element.add(Element("filterref", [("filter", "no-mac-spoofing")])) }
            let limits = [("rx-", "inbound"), ("tx-", "outbound")].compactMap { prefix, name -> Element? in
                guard let rate = words[prefix + "bps"].flatMap(Self.bytes), rate % 1000 == 0 else { return nil }
                let burst = words[prefix + "bps-burst"].flatMap(Self.bytes).map { "\($0 >> 10)" }
                return Element(name, [("average", "\(rate / 1000)"), ("burst", burst)])
            }
            if !limits.isEmpty { element.add(Element("bandwidth", limits)) }
            return element
        }
        var reader = DomainReader(Element("domain"))
        guard let one = make(), let two = make(), let read = try? reader.interface(one),
            let rest = Self.rest(option, read, added: [])
        else { return nil }
        return (two, rest)
    }

    /// `[ADDRESS:]PORT:GUESTPORT[/udp]`.
    private static func forward(_ text: String) -> Element? {
        let isUDP = text.hasSuffix("/udp")
        let ports = (isUDP ? String(text.dropLast(4)) : text).split(separator: ":", omittingEmptySubsequences: false)
        guard ports.count >= 2 else { return nil }
        var address = ports.dropLast(2).joined(separator: ":")
        if address.hasPrefix("["), address.hasSuffix("]") { address = String(address.dropFirst().dropLast()) }
        let (port, guestPort) = (String(ports[ports.count - 2]), String(ports[ports.count - 1]))
        return Element(
            "portForward", [("proto", isUDP ? "udp" : "tcp"), ("address", address.isEmpty ? "127.0.0.1" : address)],
            [Element("range", [("start", port), ("to", guestPort)])])
    }
}
