// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Linux

/// A message-signalled interrupt: the write to the local APICs that a device makes (Intel SDM volume 3, §11.11).
public struct InterruptMessage: Sendable, Equatable {
    public var address: UInt64
    public var data: UInt32

    public init(address: UInt64, data: UInt32) { (self.address, self.data) = (address, data) }
}

/// The owner of a machine's interrupt routing table, which defines what each GSI of KVM is: a pin of the interrupt
/// controllers, or a message.
///
/// GSIs 0 to 23 are the pins, as KVM has them from the start: 0 to 15 of the PICs and the IOAPIC, 16 to 23 of the
/// IOAPIC alone. They stay what they are. The GSIs behind them are given to messages, one each. KVM takes the table
/// only as a whole (`KVM_SET_GSI_ROUTING`), so all changes go through here. The eventfd that signals a GSI is the
/// machine's business (``VirtualMachine/assignIRQFD(_:gsi:)``).
///
/// Any thread may call the methods. None is on the way of an interrupt.
public final class InterruptRouter: Sendable {
    /// The first GSI that is no pin.
    public static let firstMessage: UInt32 = 24

    private let machine: FileDescriptor
    /// How many GSIs there are; 0 where KVM has no routing.
    private let limit: UInt32
    private let messages = Guarded<[UInt32: InterruptMessage]>([:])

    /// - Parameter limit: how many GSIs there are; KVM's own number by default.
    init(_ machine: consuming FileDescriptor, limit: UInt32? = nil) {
        let capability = UInt(UInt32(bitPattern: Capability.interruptRouting.number))
        self.limit =
            limit
            ?? UInt32(
                clamping: (try? machine.ioctl(CLINUX_KVM_CHECK_EXTENSION, capability, named: "KVM_CHECK_EXTENSION"))
                    ?? 0)
        self.machine = machine
    }

    /// Assigns the lowest free GSI to a message.
    /// - Throws: when all are taken, or KVM refuses the message; the table is then as before.
    public func add(_ message: InterruptMessage) throws(KVMError) -> UInt32 {
        guard limit > 0 else { throw .missing(.interruptRouting) }
        return try messages.withLock { (messages) throws(KVMError) in
            guard let gsi = (Self.firstMessage..<max(limit, Self.firstMessage)).first(where: { messages[$0] == nil })
            else {
                throw .noInterruptLeft(limit: Int(limit))
            }
            try change(&messages, gsi, to: message)
            return gsi
        }
    }

    /// Changes what a GSI of ``add(_:)`` sends. Interrupts that are on their way are the one or the other.
    /// - Throws: when KVM refuses the message; the table is then as before.
    public func change(_ gsi: UInt32, to message: InterruptMessage) throws(KVMError) {
        try messages.withLock { (messages) throws(KVMError) in
            guard let before = messages[gsi], before != message else { return }
            try change(&messages, gsi, to: message)
        }
    }

    /// Frees a GSI. An eventfd that is still assigned to it has no effect.
    public func remove(_ gsi: UInt32) throws(KVMError) {
        try messages.withLock { (messages) throws(KVMError) in
            guard messages[gsi] != nil else { return }
            try change(&messages, gsi, to: nil)
        }
    }

    /// What a GSI sends; nil for a pin, or a GSI that is free.
    public subscript(gsi: UInt32) -> InterruptMessage? { messages.withLock { $0[gsi] } }

    private func change(
        _ messages: inout [UInt32: InterruptMessage], _ gsi: UInt32, to message: InterruptMessage?
    ) throws(KVMError) {
        var new = messages
        new[gsi] = message
        let table = CountedArray<kvm_irq_routing_entry>(
            headerSize: MemoryLayout<kvm_irq_routing>.size, Self.pins + new.map(Self.entry))
        try refusing("route interrupt \(gsi)") { () throws(SystemCallError) in
            _ = try unsafe machine.ioctl(
                CLINUX_KVM_SET_GSI_ROUTING, buffer: table.address, named: "KVM_SET_GSI_ROUTING")
        }
        messages = new
    }

    /// KVM's own table for its interrupt controllers.
    private static var pins: [kvm_irq_routing_entry] {
        (0..<firstMessage).flatMap { gsi in
            let ioapic = pin(gsi, chip: KVM_IRQCHIP_IOAPIC, pin: gsi)
            guard gsi < 16 else { return [ioapic] }
            return [pin(gsi, chip: gsi < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, pin: gsi % 8), ioapic]
        }
    }

    private static func pin(_ gsi: UInt32, chip: Int32, pin: UInt32) -> kvm_irq_routing_entry {
        var entry = kvm_irq_routing_entry()
        entry.gsi = gsi
        entry.type = UInt32(KVM_IRQ_ROUTING_IRQCHIP)
        // The type determines which member of the union is valid; it is all zero before.
        unsafe entry.u.irqchip = kvm_irq_routing_irqchip(irqchip: UInt32(chip), pin: pin)
        return entry
    }

    private static func entry(gsi: UInt32, message: InterruptMessage) -> kvm_irq_routing_entry {
        var entry = kvm_irq_routing_entry()
        entry.gsi = gsi
        entry.type = UInt32(KVM_IRQ_ROUTING_MSI)
        var msi = kvm_irq_routing_msi()
        msi.address_lo = UInt32(truncatingIfNeeded: message.address)
        msi.address_hi = UInt32(truncatingIfNeeded: message.address >> 32)
        msi.data = message.data
        // As above.
        unsafe entry.u.msi = msi
        return entry
    }
}
