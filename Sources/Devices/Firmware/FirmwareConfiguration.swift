// SPDX-License-Identifier: Apache-2.0

/// What firmware reads of its machine through ``FirmwareConfigurationPorts``: items with numbers, and files, which are
/// items that a directory names (QEMU's `docs/specs/fw_cfg.rst`).
public struct FirmwareConfiguration: Sendable {
    /// The numbers of items that are not in the directory, as QEMU has them.
    public enum Item {
        public static let signature: UInt16 = 0x00, identifier: UInt16 = 0x01, uuid: UInt16 = 0x02
        public static let memorySize: UInt16 = 0x03, noGraphic: UInt16 = 0x04, cpus: UInt16 = 0x05
        public static let bootMenu: UInt16 = 0x0e, maximumCPUs: UInt16 = 0x0f
        public static let directory: UInt16 = 0x19, firstFile: UInt16 = 0x20
    }

    /// The longest name of a file, in bytes; the field has one more for the closing NUL.
    static let longestName = 55
    /// The traditional interface and DMA.
    private static let features: UInt32 = 1 | 2

    private(set) var items: [UInt16: [UInt8]] = [:]
    private var names: [String] = []

    public init() {
        items[Item.signature] = Array("QEMU".utf8)
        add(Self.features, as: Item.identifier)
        items[Item.directory] = [0, 0, 0, 0]
    }

    /// Adds an item, or replaces it.
    public mutating func add(_ bytes: [UInt8], as key: UInt16) { items[key] = bytes }

    /// Adds an item that is a number, least significant byte first.
    public mutating func add<Value: FixedWidthInteger>(_ value: Value, as key: UInt16) {
        items[key] = value.littleEndianBytes
    }

    /// Adds a file, whose name is plain ASCII.
    public mutating func add(file name: String, _ bytes: [UInt8]) {
        precondition(name.utf8.count <= Self.longestName, "the name of a firmware file is too long")
        items[Item.firstFile + UInt16(names.count)] = bytes
        names.append(name)
        // The directory's numbers are big-endian, unlike those of items.
        var directory = UInt32(names.count).littleEndianBytes.reversed() as [UInt8]
        for (index, name) in names.enumerated() {
            let key = Item.firstFile + UInt16(index)
            directory += UInt32(items[key]?.count ?? 0).littleEndianBytes.reversed()
            directory += key.littleEndianBytes.reversed() + [0, 0]
            directory += name.utf8 + [UInt8](repeating: 0, count: Self.longestName + 1 - name.utf8.count)
        }
        items[Item.directory] = directory
    }

    /// The contents of a file, for tests and messages.
    public func file(_ name: String) -> [UInt8]? {
        names.firstIndex(of: name).flatMap { items[Item.firstFile + UInt16($0)] }
    }
}

extension FixedWidthInteger {
    /// The bytes, the least significant first.
    fileprivate var littleEndianBytes: [UInt8] {
        (0..<MemoryLayout<Self>.size).map { UInt8(truncatingIfNeeded: self >> Self(8 * $0)) }
    }
}
