// SPDX-License-Identifier: Apache-2.0

/// The configuration space of a function with a header of type 0: its bytes, and which of their bits can be written
/// (PCI Express 5.0 §7.5.1).
///
/// There are 4096 bytes. All after the first 256 read as zero: a list of extended capabilities that is empty. It is a
/// plain value; the function that has it guards it, and does what a write means.
public struct PCIConfigurationSpace: Sendable {
    /// Bytes.
    public static let size = 4096
    private static let conventionalSize = 256

    /// What a driver recognizes a function by.
    public struct Identity: Sendable {
        public var vendor: UInt16
        public var device: UInt16
        public var revision: UInt8
        /// Base class, subclass and programming interface, 8 bits each.
        public var classCode: UInt32
        public var subsystemVendor: UInt16
        public var subsystem: UInt16

        public init(
            vendor: UInt16, device: UInt16, revision: UInt8, classCode: UInt32, subsystemVendor: UInt16,
            subsystem: UInt16
        ) {
            (self.vendor, self.device, self.revision, self.classCode) = (vendor, device, revision, classCode)
            (self.subsystemVendor, self.subsystem) = (subsystemVendor, subsystem)
        }
    }

    /// Bits of the command register.
    public struct Command: OptionSet, Sendable {
        public let rawValue: UInt16
        public init(rawValue: UInt16) { self.rawValue = rawValue }
        /// The BARs for memory are decoded.
        public static let memory = Command(rawValue: 1 << 1)
        /// The function may send messages, and access memory.
        public static let busMaster = Command(rawValue: 1 << 2)
        public static let parityErrorResponse = Command(rawValue: 1 << 6)
        public static let systemError = Command(rawValue: 1 << 8)
        /// INTx is not asserted.
        public static let interruptDisable = Command(rawValue: 1 << 10)
    }

    /// A range of guest-physical memory that the function decodes where the guest places it.
    public struct BAR: Sendable, Equatable {
        /// The number of its register, or of the first of both.
        public let index: Int
        /// Bytes, a power of two from 16 on.
        public let size: UInt64
        /// Indicates whether it has two registers.
        public let is64Bit: Bool
    }

    /// Where a BAR is.
    public struct Placement: Sendable, Equatable {
        public let bar: Int
        public let range: Range<UInt64>

        public init(bar: Int, range: Range<UInt64>) { (self.bar, self.range) = (bar, range) }
    }

    /// Offsets of registers.
    public enum Register {
        public static let command = 0x04
        static let status = 0x06
        static let headerType = 0x0e
        static let bars = 0x10..<0x28
        static let capabilities = 0x34
        static let interruptPin = 0x3d
    }

    private var bytes = [UInt8](repeating: 0, count: conventionalSize)
    private var writable = [UInt8](repeating: 0, count: conventionalSize)
    public private(set) var bars: [BAR] = []
    /// The pointer to the next capability, and where there is room for it.
    private var nextPointer = Register.capabilities
    private var end = 0x40

    /// The space of a function without BARs, capabilities and interrupt.
    public init(_ identity: Identity) {
        store(UInt32(identity.vendor) | UInt32(identity.device) << 16, at: 0, size: 4)
        store(UInt32(identity.revision) | identity.classCode << 8, at: 8, size: 4)
        store(UInt32(identity.subsystemVendor) | UInt32(identity.subsystem) << 16, at: 0x2c, size: 4)
        let command: Command = [.memory, .busMaster, .parityErrorResponse, .systemError, .interruptDisable]
        allowWrites(UInt32(command.rawValue), at: Register.command, size: 2)
        // Cache line size and interrupt line: nothing but memory for the guest.
        allowWrites(0xff, at: 0x0c, size: 1)
        allowWrites(0xff, at: 0x3c, size: 1)
    }

    // MARK: What is in it

    /// Adds a BAR for memory.
    /// - Parameters:
    ///   - index: of its register; a 64-bit one has the next as well.
    ///   - size: a power of two, at least 16 and, for a 32-bit one, at most 2 GiB.
    ///   - address: where it is as after power-on.
    public mutating func addBAR(_ index: Int, size: UInt64, is64Bit: Bool, address: UInt64 = 0) {
        precondition(size.nonzeroBitCount == 1 && size >= 16 && index + (is64Bit ? 1 : 0) < 6, "no BAR is like this")
        let register = Register.bars.lowerBound + 4 * index, mask = ~(size &- 1)
        store(UInt32(truncatingIfNeeded: address & mask) | (is64Bit ? 4 : 0), at: register, size: 4)
        allowWrites(UInt32(truncatingIfNeeded: mask) & ~0xf, at: register, size: 4)
        if is64Bit {
            store(UInt32(truncatingIfNeeded: (address & mask) >> 32), at: register + 4, size: 4)
            allowWrites(UInt32(truncatingIfNeeded: mask >> 32), at: register + 4, size: 4)
        }
        bars.append(BAR(index: index, size: size, is64Bit: is64Bit))
    }

    /// Adds a capability at the end of the list.
    /// - Parameters:
    ///   - content: what follows its identifier and pointer.
    ///   - writable: the bits of it that can be written; missing bytes have none.
    /// - Returns: its offset.
    public mutating func addCapability(_ identifier: UInt8, _ content: [UInt8], writable mask: [UInt8] = []) -> Int {
        let offset = end
        precondition(offset + 2 + content.count <= Self.conventionalSize, "no room for another capability")
        bytes[Register.status] |= 1 << 4
        bytes[nextPointer] = UInt8(truncatingIfNeeded: offset)
        bytes[offset] = identifier
        for (index, byte) in content.enumerated() { bytes[offset + 2 + index] = byte }
        for (index, bits) in mask.prefix(content.count).enumerated() { writable[offset + 2 + index] = bits }
        nextPointer = offset + 1
        end = (offset + 2 + content.count + 3) & ~3
        return offset
    }

    /// Adds the PCI Express capability of an endpoint that is integrated in the root complex (§7.5.3).
    public mutating func addExpressCapability() {
        var content = [UInt8](repeating: 0, count: 58)
        content[0] = 0x92  // version 2, root complex integrated endpoint
        content[3] = 0x80  // device capabilities: role-based error reporting
        content[6] = 0x10  // device control as after power-on: relaxed ordering, no snoop,
        content[7] = 0x28  // read requests up to 512 bytes
        var mask = [UInt8](repeating: 0, count: 8)
        (mask[6], mask[7]) = (0xff, 0x78)
        _ = addCapability(0x10, content, writable: mask)
    }

    /// INTA#, which the function then has.
    public mutating func setInterruptPin() { bytes[Register.interruptPin] = 1 }

    // MARK: What it says

    public var command: Command { Command(rawValue: UInt16(truncatingIfNeeded: read(at: Register.command, size: 2))) }

    /// Where the BARs are that the function decodes.
    public var placements: [Placement] {
        guard command.contains(.memory) else { return [] }
        return bars.compactMap { bar in
            let register = Register.bars.lowerBound + 4 * bar.index
            var address = UInt64(read(at: register, size: 4) & ~0xf)
            if bar.is64Bit { address |= UInt64(read(at: register + 4, size: 4)) << 32 }
            let (end, overflow) = address.addingReportingOverflow(bar.size)
            return overflow ? nil : Placement(bar: bar.index, range: address..<end)
        }
    }

    // MARK: Accesses

    /// Reads 1, 2 or 4 bytes at a multiple of their number; all ones for other accesses.
    public func read(at offset: Int, size: Int) -> UInt32 {
        guard Self.isAccess(offset, size) else { return UInt32(truncatingIfNeeded: allOnes(size: size)) }
        guard offset < Self.conventionalSize else { return 0 }
        return (0..<size).reversed().reduce(0) { $0 << 8 | UInt32(bytes[offset + $1]) }
    }

    /// Writes as many bytes; read-only bits keep their values.
    public mutating func write(_ value: UInt32, at offset: Int, size: Int) {
        guard Self.isAccess(offset, size), offset < Self.conventionalSize else { return }
        for index in 0..<size {
            let byte = UInt8(truncatingIfNeeded: value >> UInt32(8 * index)), mask = writable[offset + index]
            bytes[offset + index] = bytes[offset + index] & ~mask | byte & mask
        }
    }

    /// Replaces bytes, whether or not they can be written; for the function, within its own capabilities.
    public mutating func store(_ value: UInt32, at offset: Int, size: Int) {
        for index in 0..<size { bytes[offset + index] = UInt8(truncatingIfNeeded: value >> UInt32(8 * index)) }
    }

    private mutating func allowWrites(_ bits: UInt32, at offset: Int, size: Int) {
        for index in 0..<size { writable[offset + index] = UInt8(truncatingIfNeeded: bits >> UInt32(8 * index)) }
    }

    /// Indicates whether an access is one that functions know.
    static func isAccess(_ offset: Int, _ size: Int) -> Bool {
        (size == 1 || size == 2 || size == 4) && offset >= 0 && offset < Self.size && offset % size == 0
    }
}
