// SPDX-License-Identifier: Apache-2.0

internal import Platform

/// A virtio-mmio device as described to the guest.
public struct VirtioMMIOSlot: Sendable, Equatable {
    /// The guest-physical address of the registers.
    public let address: UInt64
    /// Bytes of its register window.
    public let size: UInt32
    /// The interrupt line: a pin of the IOAPIC.
    public let gsi: UInt32

    public init(address: UInt64, size: UInt32 = 4096, gsi: UInt32) {
        (self.address, self.size, self.gsi) = (address, size, gsi)
    }
}

/// The kernel's command line: the user's words, and what is added to them.
public struct KernelCommandLine: Sendable, Equatable {
    /// The longest that ``PhysicalLayout`` has room for, without the closing NUL.
    public static let limit = PhysicalLayout.commandLineSize - 1

    /// The text so far.
    public private(set) var text: String
    /// Bytes of it that are not the user's, the spaces around them included.
    public private(set) var addedLength = 0
    /// The kernel's own words: those before a lone `--`, behind which they are init's.
    private let words: [String]

    /// Takes the user's words as they are.
    public init(_ text: String) {
        self.text = text
        words = Self.split(text).words
    }

    /// Indicates whether the kernel's own words have one that begins so.
    public func hasWord(beginning prefix: String) -> Bool { words.contains { $0.hasPrefix(prefix) } }

    /// Indicates whether ACPI is turned off, so that Linux finds no device in the DSDT (kernel-parameters.txt,
    /// `acpi=`).
    public var turnsACPIOff: Bool { words.last { $0 == "acpi=off" || $0 == "acpi=force" } == "acpi=off" }

    /// Puts Linux's console in front, unless the words name a console.
    /// - Parameter device: as Linux calls it: `ttyS0`.
    public mutating func addConsole(_ device: String) {
        guard !hasWord(beginning: "console=") else { return }
        replace(by: Self.joined(["console=" + device, text]))
    }

    /// Adds one `virtio_mmio.device=SIZE@ADDRESS:GSI` for each device. What follows a lone `--` belongs to init and not
    /// to the kernel, so the devices go before it.
    public mutating func add(_ devices: [VirtioMMIOSlot]) {
        guard !devices.isEmpty else { return }
        let parameters = devices.map { device in
            let size = device.size % 1024 == 0 ? "\(device.size / 1024)K" : "\(device.size)"
            return "virtio_mmio.device=\(size)@\(hex(device.address)):\(device.gsi)"
        }
        let (kernels, inits, _) = Self.split(text)
        replace(by: Self.joined([kernels] + parameters + [inits]))
    }

    private mutating func replace(by longer: String) {
        addedLength += longer.utf8.count - text.utf8.count
        text = longer
    }

    /// Refuses a command line that the kernel would truncate.
    /// - Parameters:
    ///   - limit: the most bytes that the kernel reads.
    ///   - kernel: what messages call it.
    /// - Throws: ``BootError/commandLineTooLong(kernel:length:added:limit:)``, ``BootError/commandLineHasNUL``.
    func check(limit: Int, kernel: String) throws(BootError) {
        if text.utf8.contains(0) { throw .commandLineHasNUL }
        let length = text.utf8.count
        if length > limit {
            throw .commandLineTooLong(kernel: kernel, length: length, added: addedLength, limit: limit)
        }
    }

    private static func joined(_ parts: [String]) -> String { parts.filter { !$0.isEmpty }.joined(separator: " ") }

    /// The kernel's own words as they are and one by one, and the rest from a word `--` outside of double quotes on.
    private static func split(_ text: String) -> (kernel: String, initial: String, words: [String]) {
        let bytes = Array(text.utf8)
        var words: [String] = []
        var isQuoted = false
        var wordStart = 0
        for index in 0...bytes.count {
            if index < bytes.count, bytes[index] == UInt8(ascii: "\"") { isQuoted.toggle() }
            guard index == bytes.count || (isSpace(bytes[index]) && !isQuoted) else { continue }
            if bytes[wordStart..<index].elementsEqual("--".utf8) {
                return (trimmed(bytes[..<wordStart]), trimmed(bytes[wordStart...]), words)
            }
            // Linux takes `"a=b c"` and `a="b c"` for the same.
            let word = bytes[wordStart..<index]
            if !word.isEmpty {
                words.append(
                    String(decoding: word.first == UInt8(ascii: "\"") ? word.dropFirst() : word, as: UTF8.self))
            }
            wordStart = index + 1
        }
        return (trimmed(bytes[...]), "", words)
    }

    /// Linux's own `isspace`.
    private static func isSpace(_ byte: UInt8) -> Bool { byte == UInt8(ascii: " ") || (9...13).contains(byte) }

    private static func trimmed(_ bytes: ArraySlice<UInt8>) -> String {
        var rest = bytes.drop { isSpace($0) }
        while let last = rest.last, isSpace(last) { rest.removeLast() }
        return String(decoding: rest, as: UTF8.self)
    }
}
