/// A virtio-mmio device as the guest is told of it.
public struct VirtioMMIOSlot: Sendable, Equatable {
    /// Guest-physical address of its registers.
    public let address: UInt64
    /// Bytes of its register window.
    public let size: UInt32
    /// Its interrupt line: a pin of the IOAPIC.
    public let gsi: UInt32

    public init(address: UInt64, size: UInt32 = 4096, gsi: UInt32) {
        (self.address, self.size, self.gsi) = (address, size, gsi)
    }
}

/// The kernel's command line.
public enum KernelCommandLine {
    /// The longest that ``PhysicalLayout`` has room for, without the closing NUL.
    public static let limit = PhysicalLayout.commandLineSize - 1

    /// The user's words, then one `virtio_mmio.device=SIZE@ADDRESS:GSI` for each device.
    ///
    /// What follows a lone `--` belongs to init and not to the kernel, so the devices go before it.
    /// - Throws: ``BootError/commandLineTooLong(length:limit:)``, ``BootError/commandLineHasNUL``.
    public static func assemble(_ words: String, devices: [VirtioMMIOSlot]) throws(BootError) -> String {
        let parameters = devices.map { device in
            let size = device.size % 1024 == 0 ? "\(device.size / 1024)K" : "\(device.size)"
            return "virtio_mmio.device=\(size)@\(hex(device.address)):\(device.gsi)"
        }
        let (kernels, inits) = split(words)
        let line = ([kernels] + parameters + [inits]).filter { !$0.isEmpty }.joined(separator: " ")
        try check(line, limit: limit)
        return line
    }

    static func check(_ line: String, limit: Int) throws(BootError) {
        if line.utf8.contains(0) { throw .commandLineHasNUL }
        if line.utf8.count > limit { throw .commandLineTooLong(length: line.utf8.count, limit: limit) }
    }

    /// The kernel's own words, and the rest from a word `--` outside of double quotes on.
    private static func split(_ words: String) -> (kernel: String, initial: String) {
        let bytes = Array(words.utf8)
        var isQuoted = false
        var wordStart = 0
        for index in 0 ... bytes.count {
            if index < bytes.count, bytes[index] == UInt8(ascii: "\"") { isQuoted.toggle() }
            guard index == bytes.count || (bytes[index] == UInt8(ascii: " ") && !isQuoted) else { continue }
            if bytes[wordStart ..< index].elementsEqual("--".utf8) {
                return (trimmed(bytes[..<wordStart]), trimmed(bytes[wordStart...]))
            }
            wordStart = index + 1
        }
        return (trimmed(bytes[...]), "")
    }

    private static func trimmed(_ bytes: ArraySlice<UInt8>) -> String {
        var rest = bytes.drop { $0 == UInt8(ascii: " ") }
        while rest.last == UInt8(ascii: " ") { rest.removeLast() }
        return String(decoding: rest, as: UTF8.self)
    }
}
