// SPDX-License-Identifier: Apache-2.0

internal import Inventory

extension DomainReader {
    mutating func readInterfaces(_ devices: Element, _ own: OwnPart?) throws(DomainError) {
        var networks: [String] = []
        for element in devices.children where element.name == "interface" {
            guard let words = try interface(element) else { continue }
            networks.append(words + (own?.words("net", networks.count + 1).map { "," + $0 } ?? ""))
        }
        own?.insert("net", into: &networks)
        for network in networks { add("net", network) }
    }

    /// The words of `--net`; nil for a kind that does not exist here.
    mutating func interface(_ element: Element) throws(DomainError) -> String? {
        guard var words = try backend(element) else {
            let type = element.value("type") ?? ""
            ignore(
                element, nil, "a network interface of type \(type); expected bridge, direct, ethernet, network or user")
            return nil
        }
        element.isUsed = true
        _ = element.take("type")
        if let mac = element.first("mac")?.take("address") { words.append("mac=\(mac)") }
        element.first("mac")?.take("type", "static")
        if let filter = element.first("filterref") {
            if filter.take("filter") == "no-mac-spoofing" {
                words.append("mac-lock=on")
            } else {
                filter.leave("filter")
            }
        }
        if let size = element.first("mtu")?.take("size") { words.append("mtu=\(size)") }
        let driver = element.first("driver")
        driver?.take("name", "qemu")
        if let queues = driver?.take("queues") { words.append("queues=\(queues)") }
        words += bandwidth(element)
        readModel(element)
        return words.joined(separator: ",")
    }

    private mutating func readModel(_ element: Element) {
        guard let model = element.first("model") else {
            return note(
                element, "model", "missing; libvirt would take rtl8139; the guest has a virtio network interface")
        }
        model.take("type", "virtio", "virtio-non-transitional")
        if let type = model.value("type"), !type.hasPrefix("virtio") {
            ignore(model, "type", "\(type): the guest has a virtio network interface")
        }
    }

    private mutating func backend(_ element: Element) throws(DomainError) -> [String]? {
        let source = element.first("source")
        switch element.value("type") {
        case "bridge"?:
            guard let bridge = source?.take("bridge") else { throw .missing(element.path + "/source/@bridge") }
            // A bridge of Open vSwitch is found as such.
            element.first("virtualport")?.take("type", "openvswitch")
            return (tap(element).map { ["tap=\($0)"] } ?? []) + ["bridge=\(bridge)"]
        case "ethernet"?:
            guard let tap = tap(element) else { throw .missing(element.path + "/target/@dev") }
            return ["tap=\(tap)"]
        case "direct"?:
            guard let device = source?.take("dev") else { throw .missing(element.path + "/source/@dev") }
            source?.take("mode", "bridge")
            // The macvtap has a name that is made when it starts.
            dropTarget(element)
            return ["macvtap=\(device)"]
        case "network"?:
            dropTarget(element)
            let name = source?.take("network") ?? ""
            guard name != Self.ownNetwork else { return ["nat"] }
            note(
                element, "source/@network",
                "\(name): a network of libvirt's, which is not used; the guest is in swkvm's (net=\(network))")
            return [network]
        case "user"?:
            element.first("backend")?.take("type", "passt")
            var words = ["user"]
            for forward in element.all("portForward") { words += try ports(forward).map { "publish=\($0)" } }
            return words
        default: return nil
        }
    }

    /// Of a `portForward`, so that a short document makes no long definition.
    private static let maximumPorts = 256

    private func ports(_ forward: Element) throws(DomainError) -> [String] {
        let address = forward.take("address") ?? "0.0.0.0"
        let kind = forward.take("proto") == "udp" ? "/udp" : ""
        // Nothing before the ports is 127.0.0.1.
        let host =
            address == "127.0.0.1" ? "" : address.utf8.contains(UInt8(ascii: ":")) ? "[\(address)]:" : "\(address):"
        var ports: [String] = []
        for range in forward.all("range") where range.value("exclude") != "yes" {
            guard let start = range.take("start").flatMap({ UInt16($0) }) else {
                throw .missing(range.path + "/@start")
            }
            let end = range.take("end").flatMap { UInt16($0) } ?? start
            let to = range.take("to").flatMap { UInt16($0) } ?? start
            range.take("exclude", "no")
            guard end >= start, ports.count + Int(end - start) < Self.maximumPorts, Int(to) + Int(end - start) <= 65_535
            else {
                throw .unsupported(path: range.path, "expected at most \(Self.maximumPorts) ports, in ascending ranges")
            }
            for offset in 0...(end - start) { ports.append("\(host)\(start + offset):\(to + offset)\(kind)") }
        }
        return ports
    }

    /// What ``DomainWriter`` calls the standard network of `--net nat`.
    static let ownNetwork = "swkvm0"

    /// The name of the TAP; nil if it is made when the machine starts.
    private func tap(_ element: Element) -> String? {
        dropTarget(element)
        let target = element.first("target")
        target?.take("managed", "no", "yes")
        guard let name = target?.value("dev"), !Self.isMade(name) else { return nil }
        return target?.take("dev")
    }

    /// Names that libvirt gives interfaces of running machines, and drops itself when it reads them.
    private static func isMade(_ name: String) -> Bool {
        ["vnet", "macvtap", "macvlan", "testnet"].contains { name.hasPrefix($0) }
    }

    private func dropTarget(_ element: Element) {
        let target = element.first("target")
        if let name = target?.value("dev"), Self.isMade(name) { _ = target?.take("dev") }
    }

    /// Kilobytes a second, which are 1000 bytes (tc(8)), and a burst in KiB; into the guest and out of it.
    private func bandwidth(_ element: Element) -> [String] {
        guard let bandwidth = element.first("bandwidth") else { return [] }
        var words: [String] = []
        for (prefix, name) in [("rx-", "inbound"), ("tx-", "outbound")] {
            guard let rate = bandwidth.first(name), let average = rate.value("average").flatMap({ UInt64($0) }),
                average < 1 << 40
            else { continue }
            _ = rate.take("average")
            words.append("\(prefix)bps=\(average * 1000)")
            guard let burst = rate.value("burst").flatMap({ UInt64($0) }), burst < 1 << 40 else { continue }
            _ = rate.take("burst")
            words.append("\(prefix)bps-burst=\(burst << 10)")
        }
        return words
    }
}
