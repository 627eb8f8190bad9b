// SPDX-License-Identifier: Apache-2.0

/// The registers of a virtio device, at the offsets that they have with the MMIO transport. Behind a PCI function each
/// access is to the field of its structures that says the same (virtio 1.2 §4.1.4), so that the drivers, and their
/// attacks, are the same on both.
struct VirtioRegisters {
    private let base: Address
    private let function: VirtioPCI?

    init(_ base: Address) { (self.base, function) = (base, nil) }

    init(_ function: VirtioPCI) { (base, self.function) = (function.common, function) }

    /// An address that no other device has.
    var value: UInt64 { base.value }

    private typealias Register = VirtioMMIO.Register

    /// Where a register's field is in the common structure.
    private static func field(_ register: UInt64) -> UInt64? {
        switch register {
        case Register.deviceFeaturesSelect: 0
        case Register.deviceFeatures: 4
        case Register.driverFeaturesSelect: 8
        case Register.driverFeatures: 12
        case Register.queueDescriptors: 32
        case Register.queueDescriptors + 4: 36
        case Register.queueDriver: 40
        case Register.queueDriver + 4: 44
        case Register.queueDevice: 48
        case Register.queueDevice + 4: 52
        default: nil
        }
    }

    /// The same for the fields of 16 bits.
    private static func shortField(_ register: UInt64) -> UInt64? {
        switch register {
        case Register.queueSelect: 22
        case Register.queueSizeMax, Register.queueSize: 24
        case Register.queueReady: 28
        default: nil
        }
    }

    func load(_ offset: UInt64) -> UInt32 {
        guard let function else { return base.load(offset) }
        if offset >= Register.config { return (function.device + (offset - Register.config)).load() }
        if let field = Self.field(offset) { return base.load(field) }
        if let field = Self.shortField(offset) { return UInt32(base.load(field) as UInt16) }
        switch offset {
        case Register.magic:
            // An exit, as with MMIO.
            _ = base.load(18) as UInt16
            return 0x7472_6976
        case Register.version: return 2
        case Register.deviceID: return function.deviceID
        case Register.interruptStatus: return function.interruptStatus
        case Register.status: return UInt32(base.load(20) as UInt8)
        case Register.configGeneration: return UInt32(base.load(21) as UInt8)
        default: return base.load(offset & 0x3f)
        }
    }

    func store(_ new: UInt32, _ offset: UInt64) {
        guard let function else { return base.store(new, offset) }
        if offset >= Register.config { return (function.device + (offset - Register.config)).store(new) }
        if let field = Self.field(offset) { return base.store(new, field) }
        if let field = Self.shortField(offset) { return base.store(UInt16(truncatingIfNeeded: new), field) }
        switch offset {
        case Register.status: base.store(UInt8(truncatingIfNeeded: new), 20)
        case Register.queueNotify: function.notify(queue: new)
        // With MSI-X there is nothing to acknowledge.
        case Register.interruptAcknowledge: break
        case Register.configGeneration: base.store(UInt8(truncatingIfNeeded: new), 21)
        // What a driver only reads, and what is not there: in the common structure, which has other fields there.
        default: break
        }
    }

    // Other widths: of the device's configuration, or mistakes.

    func load(_ offset: UInt64) -> UInt8 { place(offset).load() }
    func load(_ offset: UInt64) -> UInt16 { place(offset).load() }
    func load(_ offset: UInt64) -> UInt64 { place(offset).load() }
    func store(_ new: UInt8, _ offset: UInt64) { place(offset).store(new) }
    func store(_ new: UInt16, _ offset: UInt64) { place(offset).store(new) }
    func store(_ new: UInt64, _ offset: UInt64) { place(offset).store(new) }

    private func place(_ offset: UInt64) -> Address {
        guard let function else { return base + offset }
        return offset >= Register.config ? function.device + (offset - Register.config) : base + (offset & 0x3f)
    }
}
