// SPDX-License-Identifier: Apache-2.0

import Linux
import PCI
import TestSupport
import Testing

@Suite(.timed) struct MSIXTableTests {
    private let platform = RecordingPlatform()
    private let events: [IRQFD]
    private let table: MSIXTable

    init() throws {
        events = try (0..<3).map { _ in try IRQFD() }
        table = MSIXTable(count: 3, sources: events, platform: platform, report: { _ in })
    }

    private static func control(
        _ isEnabled: Bool = true, masked: Bool = false, master: Bool = true
    ) -> MSIXTable.Control {
        var control = MSIXTable.Control()
        (control.isEnabled, control.isMasked, control.isBusMaster) = (isEnabled, masked, master)
        return control
    }

    private func set(_ vector: UInt64, _ data: UInt32, address: UInt64 = 0xfee0_1000, masked: Bool = false) {
        table.writeTable(address, at: vector * 16, size: 8)
        table.writeTable(UInt64(data), at: vector * 16 + 8, size: 4)
        table.writeTable(masked ? 1 : 0, at: vector * 16 + 12, size: 4)
    }

    private func message(_ source: Int) -> MSIMessage? { platform.message(of: events[source].event) }

    @Test func asAfterPowerOn() {
        for vector in 0..<3 as Range<UInt64> {
            #expect(table.readTable(at: vector * 16, size: 8) == 0)
            #expect(table.readTable(at: vector * 16 + 8, size: 8) == 1 << 32, "not masked")
        }
        #expect((0..<3).allSatisfy { table.vector(of: $0) == MSIXTable.noVector } && table.vector(of: 3) == 0xffff)
        #expect(table.readPendingBits(at: 0, size: 8) == 0)
    }

    @Test func whatCanBeWritten() {
        table.writeTable(.max, at: 16, size: 8)
        table.writeTable(.max, at: 24, size: 8)
        #expect(
            table.readTable(at: 16, size: 8) == 0xffff_ffff_ffff_fffc
                && table.readTable(at: 24, size: 8) == 0x1_ffff_ffff)
        #expect(table.readTable(at: 20, size: 4) == 0xffff_ffff && table.readTable(at: 28, size: 4) == 1)
        for (offset, size, ones) in [
            (16, 1, 0xff), (16, 2, 0xffff), (18, 4, 0xffff_ffff), (20, 8, .max), (48, 4, 0xffff_ffff),
            (.max - 3, 4, 0xffff_ffff),
        ]
            as [(UInt64, Int, UInt64)]
        {
            #expect(table.readTable(at: offset, size: size) == ones)
            table.writeTable(0, at: offset, size: size)
        }
        #expect(table.readTable(at: 16, size: 8) == 0xffff_ffff_ffff_fffc)
        #expect(table.readPendingBits(at: 8, size: 4) == 0xffff_ffff && table.readPendingBits(at: 0, size: 2) == 0xffff)
        #expect(table.readPendingBits(at: 4, size: 4) == 0)
    }

    @Test func aMaskedVectorIsPending() {
        table.setControl(Self.control())
        set(1, 0x41)
        table.assign(1, to: 0)
        #expect(message(0) == MSIMessage(address: 0xfee0_1000, data: 0x41))
        set(1, 0x41, masked: true)
        #expect(message(0) == nil && table.readPendingBits(at: 0, size: 8) == 0)
        events[0].event.signal()
        #expect(table.readPendingBits(at: 0, size: 8) == 2 && table.readPendingBits(at: 0, size: 4) == 2)
        set(1, 0x52)
        #expect(message(0)?.data == 0x52 && events[0].isSignalled, "the pending one is sent")
        #expect(table.readPendingBits(at: 0, size: 8) == 0)
        #expect(platform.routes.count == 1 && platform.mistakes == [])
    }

    @Test func theFunctionsMask() {
        table.setControl(Self.control(masked: true))
        for vector in 0..<3 as Range<UInt64> { set(vector, UInt32(0x40 + vector)) }
        for source in 0..<3 { table.assign(UInt16(source), to: source) }
        #expect(platform.connectionCount == 0)
        for event in events { event.event.signal() }
        #expect(table.readPendingBits(at: 0, size: 8) == 7)
        table.setControl(Self.control())
        #expect(platform.connectionCount == 3 && table.readPendingBits(at: 0, size: 8) == 0)
        table.setControl(Self.control(master: false))
        #expect(platform.connectionCount == 0)
        table.setControl(Self.control(false))
        #expect(platform.routes.isEmpty)
        table.setControl(Self.control())
        #expect(platform.connectionCount == 3)
        table.disconnectAll()
        #expect(platform.connectionCount == 0 && platform.routes.isEmpty && platform.mistakes == [])
    }

    @Test func whatIsSignalledWithoutAVectorIsForgotten() {
        table.setControl(Self.control())
        set(0, 0x40)
        events[0].event.signal()
        table.assign(0, to: 0)
        #expect(!events[0].isSignalled)
        table.assign(3, to: 0)
        #expect(table.vector(of: 0) == MSIXTable.noVector && message(0) == nil)
        table.assign(0, to: 0)
        #expect(message(0)?.data == 0x40)
        table.unassignAll()
        #expect(message(0) == nil)
        table.assign(0, to: 3)
        #expect(platform.mistakes == [])
    }

    /// A write that is not to the local APICs would be one to memory: it is not made.
    @Test(arguments: [0, 0x1000, 0xfed0_0000, 0xfef0_0000, 0x1_fee0_0000, 0xffff_ffff_fee0_0000] as [UInt64])
    func messagesToOtherAddresses(address: UInt64) {
        table.setControl(Self.control())
        table.assign(0, to: 0)
        set(0, 0x40, address: address)
        #expect(message(0) == nil)
        set(0, 0x40)
        #expect(message(0) != nil)
        set(0, 0x40, address: address)
        #expect(message(0) == nil && platform.mistakes == [])
    }

    @Test func aVectorOfSeveralSources() {
        table.setControl(Self.control())
        set(2, 0x42)
        for source in 0..<3 { table.assign(2, to: source) }
        #expect((0..<3).allSatisfy { message($0)?.data == 0x42 } && platform.routes.count == 1)
        set(2, 0x43)
        #expect((0..<3).allSatisfy { message($0)?.data == 0x43 } && platform.routes.count == 1)
        set(2, 0x43, masked: true)
        events[1].event.signal()
        #expect(table.readPendingBits(at: 0, size: 8) == 4)
    }

    @Test func refusalsAreReportedAndTriedAgain() {
        let reports = Guarded(0)
        let table = MSIXTable(
            count: 1, sources: [events[0]], platform: platform, report: { _ in reports.withLock { $0 += 1 } })
        platform.setRefusing(true)
        table.setControl(Self.control())
        table.writeTable(0xfee0_0000, at: 0, size: 8)
        table.writeTable(0x40, at: 8, size: 8)
        table.assign(0, to: 0)
        #expect(reports.withLock { $0 } == 1 && message(0) == nil)
        platform.setRefusing(false)
        table.writeTable(0, at: 12, size: 4)
        #expect(message(0)?.data == 0x40)
    }

    /// Another thread signals without a pause while the driver masks, unmasks and moves the vector: every signal is
    /// sent, and none while the vector is masked.
    @Test func masksUnderFire() throws {
        let machine = CountingPlatform(), event = try IRQFD(), signals = 20_000
        let table = MSIXTable(count: 1, sources: [event], platform: machine, report: { _ in })
        table.setControl(Self.control())
        table.writeTable(0xfee0_0000, at: 0, size: 8)
        table.writeTable(0, at: 8, size: 8)
        table.assign(0, to: 0)
        machine.watch(event)
        let device = try Thread.start(name: "device") {
            for _ in 0..<signals {
                event.event.signal()
                machine.poll()
            }
        }
        for round in 0..<3000 as Range<UInt64> {
            table.writeTable(1, at: 12, size: 4)
            let before = machine.sent
            table.writeTable(round & 0xff, at: 8, size: 4)
            _ = table.readPendingBits(at: 0, size: 8)
            #expect(machine.sent == before, "sent while masked")
            table.writeTable(0, at: 12, size: 4)
            if round % 16 == 0 {
                table.setControl(Self.control(masked: true))
                table.setControl(Self.control())
            }
        }
        device.join()
        machine.poll()
        #expect(machine.sent == UInt64(signals))
    }
}

/// Sends the signals of one eventfd as KVM does, and counts them.
private final class CountingPlatform: PCIPlatform {
    private struct State {
        var isConnected = false
        var sent: UInt64 = 0
        var event: IRQFD?
    }
    private let state = Guarded(State())

    var sent: UInt64 { state.withLock { $0.sent } }
    func watch(_ event: IRQFD) { state.withLock { $0.event = event } }

    /// What the kernel does at a signal.
    func poll() {
        state.withLock { state in
            if state.isConnected, let event = state.event { state.sent += event.event.drain() }
        }
    }

    func addRoute(_ message: MSIMessage) -> UInt32 { 24 }
    func changeRoute(_ route: UInt32, to message: MSIMessage) {}
    func removeRoute(_ route: UInt32) {}
    func connect(_ event: borrowing EventFD, to route: UInt32) {
        let count = event.drain()
        state.withLock { state in
            state.isConnected = true
            state.sent += count
        }
    }
    func disconnect(_ event: borrowing EventFD, from route: UInt32) { state.withLock { $0.isConnected = false } }
    func connectDoorbell(_ event: borrowing EventFD, at address: UInt64) {}
    func disconnectDoorbell(_ event: borrowing EventFD, at address: UInt64) {}
    func setInterruptPin(_ isAsserted: Bool) {}
}
