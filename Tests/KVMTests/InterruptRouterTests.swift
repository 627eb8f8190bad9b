// SPDX-License-Identifier: Apache-2.0

import CLinux
import Linux
import TestSupport
import Testing

@testable import KVM

/// A guest that waits for interrupts, and writes the vector of each to port 0x10. Vectors 0x40 and 0x41 are for
/// messages, 0x50 is pin 16 of the IOAPIC (edge-triggered), 0x60 + n is pin n of the PICs.
private struct ListeningGuest: ~Copyable {
    let tiny: TinyMachine
    var machine: VirtualMachine { _read { yield tiny.machine } }

    struct NotReady: Error {}

    static let localAPIC: UInt64 = 0xfee0_0000
    private static let vectors: [UInt8] = [0x40, 0x41, 0x50, 0x65, 0x6b]

    init() throws {
        // fs: the local APIC; es: the IOAPIC. A store of 32 bits to a register of theirs:
        func store(_ segment: UInt8, _ offset: UInt16, _ value: UInt32) -> [UInt8] {
            [segment, 0x66, 0xc7, 0x06] + bytes(offset) + bytes(value)
        }
        func bytes(_ value: some FixedWidthInteger) -> [UInt8] {
            (0..<value.bitWidth / 8).map { UInt8(truncatingIfNeeded: value >> ($0 * 8)) }
        }
        func out(_ port: UInt8, _ value: UInt8) -> [UInt8] { [0xb0, value, 0xe6, port] }
        let (apic, ioapic): (UInt8, UInt8) = (0x64, 0x26)
        var code: [UInt8] = store(apic, 0xf0, 0x1ff)
        code += store(ioapic, 0, 0x31) + store(ioapic, 0x10, 0) + store(ioapic, 0, 0x30) + store(ioapic, 0x10, 0x50)
        // Both PICs (8259A data sheet): vectors from 0x60 and 0x68 on, all pins unmasked, an automatic end of
        // interrupt.
        code += out(0x20, 0x11) + out(0x21, 0x60) + out(0x21, 4) + out(0x21, 3) + out(0x21, 0)
        code += out(0xa0, 0x11) + out(0xa1, 0x68) + out(0xa1, 2) + out(0xa1, 3) + out(0xa1, 0)
        // Ready: sti; hlt; jmp to the hlt
        code += out(0x10, 0) + [0xfb, 0xf4, 0xeb, 0xfd]
        let tiny = try TinyMachine(code: code, irqchip: true)
        for vector in Self.vectors {
            // A handler for each, and its place in the table: the vector to the port, an end of interrupt, iret.
            let place = 0x2000 + UInt16(vector) * 32
            let handler = out(0x10, vector) + store(apic, 0xb0, 0) + [0xcf]
            unsafe UnsafeMutableRawBufferPointer(start: tiny.memory.start + Int(place), count: handler.count).copyBytes(
                from: handler)
            unsafe tiny.memory.start.storeBytes(of: UInt32(place), toByteOffset: Int(vector) * 4, as: UInt32.self)
        }
        var system = try tiny.cpu.systemRegisters()
        (system.fs.base, system.es.base, system.ss.base) = (Self.localAPIC, 0xfec0_0000, 0)
        try tiny.cpu.setSystemRegisters(system)
        var registers = try tiny.cpu.registers()
        registers.rsp = 0x8000
        try tiny.cpu.setRegisters(registers)
        // Up to its hlt.
        guard case .port(let ready) = try tiny.run(), ready.port == 0x10, ready[0] == 0 else { throw NotReady() }
        self.tiny = tiny
    }

    /// The vector of the next interrupt; waits for it.
    func next() throws -> UInt32? {
        guard case .port(let access) = try tiny.run(), access.port == 0x10 else { return nil }
        return access[0]
    }

    static func message(_ vector: UInt32) -> InterruptMessage { InterruptMessage(address: localAPIC, data: vector) }
}

@Suite(.timed) struct InterruptRouterTests {
    /// What a masked MSI-X vector relies on: the eventfd keeps a signal, and is empty when it has been sent.
    @Test func aSignalFromBeforeTheAssignmentIsSentOnce() throws {
        let guest = try ListeningGuest(), router = try guest.machine.interruptRouter()
        let event = try EventFD(), gsi = try router.add(ListeningGuest.message(0x40))
        for _ in 0..<3 {
            event.signal()
            let isKept = event.isSignalled
            #expect(isKept)
            try guest.machine.assignIRQFD(event, gsi: gsi)
            event.drain()
            #expect(try guest.next() == 0x40)
            event.signal()
            #expect(try guest.next() == 0x40)
            try guest.machine.deassignIRQFD(event, gsi: gsi)
            let isLeft = event.isSignalled
            #expect(!isLeft)
        }
    }

    @Test func aMessageInterruptsUntilItsEventFDIsDeassigned() throws {
        let guest = try ListeningGuest(), router = try guest.machine.interruptRouter()
        let first = try EventFD(), second = try EventFD()
        let gsi = try router.add(ListeningGuest.message(0x40))
        #expect(gsi == InterruptRouter.firstMessage && router[gsi] == ListeningGuest.message(0x40))
        try guest.machine.assignIRQFD(first, gsi: gsi)
        first.signal()
        #expect(try guest.next() == 0x40)
        let other = try router.add(ListeningGuest.message(0x41))
        #expect(other == gsi + 1)
        try guest.machine.assignIRQFD(second, gsi: other)
        second.signal()
        #expect(try guest.next() == 0x41)
        // What comes next is the second's: the first has no way to the guest any more.
        try guest.machine.deassignIRQFD(first, gsi: gsi)
        first.signal()
        second.signal()
        #expect(try guest.next() == 0x41)
        #expect(first.drain() == 1, "somebody else has taken the count")
    }

    @Test func aMessageIsChangedAndRemoved() throws {
        let guest = try ListeningGuest(), router = try guest.machine.interruptRouter()
        let first = try EventFD(), second = try EventFD()
        let gsi = try router.add(ListeningGuest.message(0x40)), other = try router.add(ListeningGuest.message(0x40))
        try guest.machine.assignIRQFD(first, gsi: gsi)
        try guest.machine.assignIRQFD(second, gsi: other)
        try router.change(gsi, to: ListeningGuest.message(0x41))
        first.signal()
        #expect(try guest.next() == 0x41)
        try router.remove(gsi)
        #expect(router[gsi] == nil)
        first.signal()
        second.signal()
        #expect(try guest.next() == 0x40, "a GSI that was removed has interrupted")
        // It is free for the next message, which the eventfd that is still assigned to it signals.
        #expect(try router.add(ListeningGuest.message(0x41)) == gsi)
        first.signal()
        #expect(try guest.next() == 0x41)
        // Nothing happens to GSIs that are no messages.
        try router.change(16, to: ListeningGuest.message(0x40))
        try router.remove(16)
        #expect(router[16] == nil)
    }

    /// The whole table is replaced with each change, and the pins must be in it.
    @Test func pinsStayWhatTheyAre() throws {
        let guest = try ListeningGuest(), router = try guest.machine.interruptRouter()
        let pins = [(5, 0x65), (11, 0x6b), (16, 0x50)] as [(UInt32, UInt32)]
        func expectInterrupts() throws {
            for (gsi, vector) in pins {
                try guest.machine.interruptLine(gsi: gsi).pulse()
                #expect(try guest.next() == vector, "pin \(gsi)")
            }
        }
        try expectInterrupts()
        let gsi = try router.add(ListeningGuest.message(0x40))
        try expectInterrupts()
        try router.remove(gsi)
        try expectInterrupts()
    }

    @Test func thereAreNoMoreMessagesThanKVMRoutes() throws {
        let tiny = try TinyMachine(code: [0xf4], irqchip: true)
        #expect(try System().check(.interruptRouting) > 1000)
        let router = InterruptRouter(try tiny.machine.descriptor.duplicate(), limit: 40)
        #expect(try (24..<40).map { _ in try router.add(ListeningGuest.message(0x40)) } == Array(24..<40))
        do throws(KVMError) {
            _ = try router.add(ListeningGuest.message(0x40))
            Issue.record("a GSI beyond the limit")
        } catch { #expect(error.description.contains("all 40 interrupt routes")) }
        // The lowest that is free.
        for gsi: UInt32 in [39, 30] { try router.remove(gsi) }
        #expect(try router.add(ListeningGuest.message(0x41)) == 30)
        #expect(
            router[29] == ListeningGuest.message(0x40) && router[30] == ListeningGuest.message(0x41)
                && router[39] == nil)
        do throws(KVMError) {
            _ = try InterruptRouter(
                try refusing("x") { () throws(SystemCallError) in try tiny.machine.descriptor.duplicate() }, limit: 0
            )
            .add(ListeningGuest.message(0x40))
            Issue.record("KVM without routing")
        } catch { #expect(error.description.contains("KVM_CAP_IRQ_ROUTING")) }
    }
}
