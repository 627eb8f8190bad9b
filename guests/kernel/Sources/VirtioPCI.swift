// SPDX-License-Identifier: Apache-2.0

/// A virtio device that is a PCI function (virtio 1.2 §4.1), with MSI-X: one message for all queues, one for changes of
/// the configuration.
final class VirtioPCI {
    let deviceID: UInt32
    private(set) var common = Address(0)
    private(set) var notifications = Address(0)
    private(set) var device = Address(0)
    private var notificationStride: UInt64 = 0
    /// The lines of both messages.
    private let line: Int
    private var hasChanged = false

    /// The first line for messages: those before are pins.
    private static let firstLine = 24

    /// - Parameters:
    ///   - space: the function's configuration space.
    ///   - number: of the function among those of virtio, from 0.
    init(_ space: Address, number: Int) throws(Failure) {
        deviceID = UInt32(space.load(2) as UInt16) &- 0x1040
        line = Self.firstLine + 2 * number
        guard line + 1 < LocalAPIC.timerLine else { throw Failure("there are too many PCI devices") }
        // Memory decoded, messages sent.
        space.store((space.load(4) as UInt16) | 6, 4)
        var capability = UInt64(space.load(0x34) as UInt8)
        var remaining = 48
        var messages: Address?
        while capability >= 0x40, remaining > 0 {
            remaining -= 1
            let here = space + capability
            switch here.load() as UInt8 {
            case 0x09: try readStructure(here, space)
            case 0x11:
                let table: UInt32 = here.load(4)
                messages = try Self.bar(space, UInt8(table & 7)) + UInt64(table & ~7)
                here.store(UInt16(0x8000), 2)
            default: break
            }
            capability = UInt64(here.load(1) as UInt8)
        }
        guard common.value != 0, notifications.value != 0 else {
            throw Failure("a PCI function of virtio has no structures for drivers")
        }
        guard let messages else { throw Failure("a PCI function of virtio has no MSI-X") }
        for message in 0..<2 {
            let entry = messages + UInt64(16 * message)
            entry.store(0xfee0_0000 | LocalAPIC.identifier << 12)
            entry.store(UInt32(0), 4)
            entry.store(LocalAPIC.firstVector + UInt32(line + message), 8)
            entry.store(UInt32(0), 12)
        }
    }

    private func readStructure(_ capability: Address, _ space: Address) throws(Failure) {
        let kind: UInt8 = capability.load(3)
        guard kind == 1 || kind == 2 || kind == 4 else { return }
        let place = try Self.bar(space, capability.load(4)) + UInt64(capability.load(8) as UInt32)
        switch kind {
        case 1: common = place
        case 2: (notifications, notificationStride) = (place, UInt64(capability.load(16) as UInt32))
        default: device = place
        }
    }

    /// Where a BAR is; everything below 4 GiB is mapped.
    private static func bar(_ space: Address, _ index: UInt8) throws(Failure) -> Address {
        guard index < 6 else { throw Failure("a PCI function of virtio has a structure in BAR \(UInt64(index))") }
        let low: UInt32 = space.load(0x10 + 4 * UInt64(index))
        let high: UInt32 = low & 7 == 4 && index < 5 ? space.load(0x14 + 4 * UInt64(index)) : 0
        guard low & 1 == 0, low & ~0xf != 0, high == 0 else {
            throw Failure("BAR \(UInt64(index)) of a PCI function is not in memory below 4 GiB")
        }
        return Address(UInt64(low & ~0xf))
    }

    func notify(queue: UInt32) {
        // A queue's number is 16 bits; one that does not exist may have an address that does not either.
        guard queue < 0x200 else { return }
        (notifications + UInt64(queue) * notificationStride).store(UInt16(truncatingIfNeeded: queue))
    }

    /// Calls `handler` for both messages.
    func handleInterrupts(_ handler: @escaping () -> Void) {
        interrupts.handle(line: line, handler)
        interrupts.handle(line: line + 1) { [self] in  // a driver lives as long as the kernel
            hasChanged = true
            handler()
        }
    }

    /// What MMIO has in a register: used buffers, and whether the configuration has changed since the last call.
    var interruptStatus: UInt32 {
        defer { hasChanged = false }
        return hasChanged ? 3 : 1
    }

    /// Assigns the messages, which a reset takes away.
    func assignMessages() {
        common.store(UInt16(1), 16)
        for queue in 0..<(common.load(18) as UInt16) {
            common.store(queue, 22)
            common.store(UInt16(0), 26)
        }
    }

    /// The virtio functions of bus 0.
    static func find() -> [VirtioPCI] {
        guard let configuration = acpi.pciConfiguration else { return [] }
        var functions: [VirtioPCI] = []
        for device in UInt64(1)..<32 {
            for function in UInt64(0)..<8 {
                let space = Address(configuration + device << 15 + function << 12)
                let identity: UInt32 = space.load()
                if function == 0, identity == .max { break }
                if identity & 0xffff == 0x1af4, identity >> 16 > 0x1040 {
                    do throws(Failure) { functions.append(try VirtioPCI(space, number: functions.count)) } catch {
                        Console.print(error.reason)
                    }
                }
                // Only a device that says so has further functions.
                let header: UInt8 = space.load(14)
                if function == 0, header & 0x80 == 0 { break }
            }
        }
        return functions
    }
}
