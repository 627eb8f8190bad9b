// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

/// A port of the host that leads to one of the guest: `[ADDRESS:]PORT:GUESTPORT[/udp]`.
public struct PublishedPort: Equatable, Sendable, CustomStringConvertible {
    /// An address of the host, IPv4 or IPv6 without brackets.
    public let address: String
    public let port: UInt16
    public let guestPort: UInt16
    public let isUDP: Bool

    /// Where nothing else is specified, only the host itself reaches the guest.
    public static let usualAddress = "127.0.0.1"

    /// An IPv6 address is in brackets.
    /// - Throws: `badPublishedPort`.
    public init(parsing text: String) throws(HostNetworkError) {
        var rest = text[...]
        func refusal(_ problem: Problem) -> HostNetworkError { .badPublishedPort(text, problem) }
        isUDP = Self.take("/udp", from: &rest)
        if !isUDP { _ = Self.take("/tcp", from: &rest) }
        if rest.first == "[" {
            guard let end = rest.firstIndex(of: "]"), rest[rest.index(after: end)...].first == ":" else {
                throw refusal(.notation)
            }
            address = String(rest[rest.index(after: rest.startIndex)..<end])
            guard Self.isAddress(address, AF_INET6) else { throw refusal(.address) }
            rest = rest[rest.index(end, offsetBy: 2)...]
        } else if rest.utf8.count(where: { $0 == UInt8(ascii: ":") }) == 2, let end = rest.firstIndex(of: ":") {
            address = String(rest[..<end])
            guard Self.isAddress(address, AF_INET) else { throw refusal(.address) }
            rest = rest[rest.index(after: end)...]
        } else {
            address = Self.usualAddress
        }
        let ports = rest.split(separator: ":", omittingEmptySubsequences: false)
        guard ports.count == 2 else { throw refusal(.notation) }
        guard let port = Self.port(ports[0]), let guestPort = Self.port(ports[1]) else { throw refusal(.port) }
        (self.port, self.guestPort) = (port, guestPort)
    }

    /// The same with another port of the host; nil for a number that is none.
    public func moved(to number: Int) -> PublishedPort? {
        let host = isIPv6 ? "[\(address)]" : address
        return try? PublishedPort(parsing: "\(host):\(number):\(guestPort)\(isUDP ? "/udp" : "")")
    }

    /// A problem of a published port's notation.
    public enum Problem: Equatable, Sendable {
        case notation, address, port
    }

    public var description: String {
        let host = isIPv6 ? "[\(address)]" : address
        return "\(host):\(port):\(guestPort)\(isUDP ? "/udp" : "")"
    }

    var isIPv6: Bool { address.utf8.contains(UInt8(ascii: ":")) }

    /// As passt's -t and -u have it.
    var forPasst: String { "\(address)/\(port):\(guestPort)" }

    /// Indicates whether this process could listen here now.
    public var isFree: Bool { refusal == nil }

    /// Why this process cannot listen here itself; nil if it can.
    var refusal: Int32? {
        let kind = Int32((isUDP ? SOCK_DGRAM : SOCK_STREAM).rawValue | SOCK_CLOEXEC.rawValue)
        let socket = Glibc.socket(isIPv6 ? AF_INET6 : AF_INET, kind, 0)
        guard socket >= 0 else { return errno }
        defer { close(socket) }
        var four = sockaddr_in(), six = sockaddr_in6()
        four.sin_family = sa_family_t(AF_INET)
        six.sin6_family = sa_family_t(AF_INET6)
        (four.sin_port, six.sin6_port) = (port.bigEndian, port.bigEndian)
        // Both are addresses, which was checked, and the kernel reads structures of their full sizes.
        let result =
            if isIPv6 {
                unsafe withUnsafePointer(to: &six) { six in
                    _ = unsafe inet_pton(AF_INET6, address, UnsafeMutableRawPointer(mutating: six) + 8)
                    return unsafe six.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                        unsafe bind(socket, $0, socklen_t(MemoryLayout<sockaddr_in6>.size))
                    }
                }
            } else {
                unsafe withUnsafePointer(to: &four) { four in
                    _ = unsafe inet_pton(AF_INET, address, UnsafeMutableRawPointer(mutating: four) + 4)
                    return unsafe four.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                        unsafe bind(socket, $0, socklen_t(MemoryLayout<sockaddr_in>.size))
                    }
                }
            }
        return result == 0 ? nil : errno
    }

    private static func take(_ end: String, from text: inout Substring) -> Bool {
        guard text.hasSuffix(end) else { return false }
        text.removeLast(end.count)
        return true
    }

    /// A number without a sign or other decoration.
    private static func port(_ text: Substring) -> UInt16? {
        guard text.utf8.allSatisfy({ (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) }), let port = UInt16(text),
            port != 0
        else { return nil }
        return port
    }

    static func isAddress(_ text: String) -> Bool { isAddress(text, AF_INET) || isAddress(text, AF_INET6) }

    private static func isAddress(_ text: String, _ family: Int32) -> Bool {
        var address = in6_addr()
        // Room for the larger of the two kinds.
        return unsafe inet_pton(family, text, &address) == 1
    }
}
