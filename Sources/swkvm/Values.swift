// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import GuestMemory
internal import Machine

/// A sentence about an argument that is wrong: what is wanted.
struct ArgumentProblem: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}

/// A whole number in decimal digits, for an option's `transform`.
/// - Parameter range: what is taken.
func wholeNumber<Number: FixedWidthInteger & Sendable>(
    _ range: ClosedRange<Number>
) -> @Sendable (String) throws -> Number {
    { text in
        guard let number = Number(text), range.contains(number) else {
            let isUnbounded = range.upperBound == .max && Number.bitWidth >= 32
            let bounds = isUnbounded ? "\(range.lowerBound) or more" : "\(range.lowerBound) to \(range.upperBound)"
            throw ArgumentProblem("expected a whole number" + (range.lowerBound < 0 ? "" : ", \(bounds)"))
        }
        return number
    }
}

/// A descriptor's number, for an option's `transform`.
let descriptorNumber: @Sendable (String) throws -> Int32 = { text in
    guard let number = Int32(text), number >= 0 else {
        throw ArgumentProblem("expected the number of an open file descriptor, such as 5")
    }
    return number
}

/// A number of bytes: `4096`, `512M`, `2Gi`, `1.5T`.
struct ByteSize: Equatable, CustomStringConvertible {
    let bytes: UInt64

    init(bytes: UInt64) { self.bytes = bytes }

    /// - Throws: a sentence that states what is expected.
    init(parsing text: String) throws {
        do throws(Problem) { self = try ByteSize(text) } catch {
            throw ArgumentProblem(
                error == .tooLarge
                    ? "it is too large; expected a size below 16E"
                    : "expected a size in bytes, or with K, M, G, T, P or E, as in 512M or 1.5G")
        }
    }

    /// The same for an amount of memory, for an option's `transform`: other programs have it in MiB.
    static let memory: @Sendable (String) throws -> ByteSize = { text in
        let size = try ByteSize(parsing: text)
        guard size.bytes == 0 || size.bytes >= 1 << 20 || text.last?.isNumber != true else {
            throw ArgumentProblem("a size without a unit is in bytes; did you mean \(text)M?")
        }
        return size
    }

    /// nil for what ``init(_:)`` does not take.
    init?(argument: String) {
        do throws(Problem) { self = try ByteSize(argument) } catch { return nil }
    }

    private enum Problem: Error { case malformed, tooLarge }

    /// Units are powers of 1024; an `i`, `B` or `iB` after the letter is taken too. With a unit there may be a
    /// fraction, of which what is less
    /// than a byte is left out.
    private init(_ text: String) throws(Problem) {
        guard text.utf8.allSatisfy({ $0 < 0x80 }) else { throw .malformed }
        let number = text.prefix { $0.isNumber || $0 == "." }
        guard let shift = Self.shift(ofUnit: text[number.endIndex...].lowercased()) else { throw .malformed }
        let parts = number.split(separator: ".", omittingEmptySubsequences: false)
        guard Self.isDigits(parts[0]) else { throw .malformed }
        var fraction: UInt64 = 0
        if parts.count > 1 {
            guard parts.count == 2, shift > 0, let value = Self.fraction(parts[1], of: 1 << shift) else {
                throw .malformed
            }
            fraction = value
        }
        guard let whole = UInt64(parts[0])?.multipliedReportingOverflow(by: 1 << shift), !whole.overflow else {
            throw .tooLarge
        }
        let sum = whole.partialValue.addingReportingOverflow(fraction)
        guard !sum.overflow else { throw .tooLarge }
        bytes = sum.partialValue
    }

    private static func shift(ofUnit unit: String) -> UInt64? {
        let shifts: [Character: UInt64] = ["k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60]
        guard let letter = unit.first else { return 0 }
        guard let shift = shifts[letter] else { return unit == "b" ? 0 : nil }
        return ["", "i", "b", "ib"].contains(unit.dropFirst()) ? shift : nil
    }

    /// `digits` behind the point, in bytes.
    private static func fraction(_ digits: Substring, of unit: UInt64) -> UInt64? {
        guard (1...6).contains(digits.utf8.count), isDigits(digits), let numerator = UInt64(digits) else { return nil }
        // At most 10^6 units of 2^60 bytes, which are more than 64 bits.
        let product = numerator.multipliedFullWidth(by: unit)
        let power = (0..<digits.utf8.count).reduce(UInt64(1)) { power, _ in power * 10 }
        return power.dividingFullWidth(product).quotient
    }

    private static func isDigits(_ text: Substring) -> Bool {
        !text.isEmpty && text.utf8.allSatisfy { (0x30...0x39).contains($0) }
    }

    /// As it would be given.
    var description: String {
        for (shift, unit) in [(UInt64(30), "G"), (20, "M"), (10, "K")] where bytes != 0 && bytes % (1 << shift) == 0 {
            return "\(bytes >> shift)\(unit)"
        }
        return String(bytes)
    }
}

/// A number of bytes within limits, for an option's `transform`.
func byteSize(_ range: ClosedRange<UInt64>) -> @Sendable (String) throws -> ByteSize {
    { text in
        let size = try ByteSize(parsing: text)
        guard range.contains(size.bytes) else {
            let (least, most) = (ByteSize(bytes: range.lowerBound), ByteSize(bytes: range.upperBound))
            throw ArgumentProblem("expected a size from \(least) to \(most)")
        }
        return size
    }
}

/// `--hugepages`, `--hugepages=1G`, `--hugepages=thp`, `--hugepages=off`.
struct HugePages: ExpressibleByArgument, Equatable, CustomStringConvertible {
    let description: String
    /// nil for a word that is none of ``allValueStrings``. It must not be refused here: the parser would take the
    /// option as if
    /// no value had been given.
    let backing: MemoryBacking?

    static let twoMiB = HugePages(argument: "2M")
    static let allValueStrings = ["2M", "1G", "thp", "off"]

    init(argument: String) {
        description = argument
        switch argument.lowercased() {
        case "2m": backing = .hugePages(.twoMiB)
        case "1g": backing = .hugePages(.oneGiB)
        case "thp": backing = .transparent
        case "off": backing = .anonymous
        default: backing = nil
        }
    }
}

/// `--gdb`.
struct DebuggerArgument {
    static let completion = ValueCompletion.one(of: ["unix+@file"])

    let place: Configuration.Debugger

    /// A port, also as QEMU's users and GDB's write it: `1234`, `:1234`, `localhost:1234`, `tcp::1234`.
    init(parsing argument: String) throws {
        if let path = argument.path(after: "unix:") {
            place = .unix(path)
            return
        }
        let address = argument.hasPrefix("tcp:") ? argument.dropFirst(4) : argument[...]
        let colon = address.lastIndex(of: ":")
        let digits = colon.map { address[address.index(after: $0)...] } ?? address
        let host = colon.map { address[..<$0] } ?? ""
        guard digits.utf8.allSatisfy({ (0x30...0x39).contains($0) }), let port = UInt16(digits) else {
            throw ArgumentProblem("expected a port, 0 to 65535, or unix:PATH")
        }
        guard ["", "localhost", "127.0.0.1"].contains(host) else {
            throw ArgumentProblem("the debugger port is on 127.0.0.1 only; expected a port or unix:PATH")
        }
        place = .port(port)
    }
}

/// `--discovery`.
enum DiscoveryArgument: String, ExpressibleByArgument, CaseIterable {
    case acpi, cmdline

    var discovery: Configuration.DeviceDiscovery { self == .acpi ? .acpi : .commandLine }
}

/// `--trace`.
enum TraceArgument: String, ExpressibleByArgument, CaseIterable {
    case exits
}

/// The value of `key=on` and `key=off`.
func onOrOff(_ key: String, _ value: String?) throws(ArgumentProblem) -> Bool {
    guard let value, ["on", "off"].contains(value) else {
        throw ArgumentProblem(
            "\(key)\(value.map { "=" + $0 } ?? "") is not recognized; expected \(key)=on or \(key)=off")
    }
    return value == "on"
}
