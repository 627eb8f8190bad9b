// SPDX-License-Identifier: Apache-2.0

@testable import Devices
import Linux
import TestSupport
import Testing

/// Keeps what it gets.
private final class RecordingPort: PortDevice {
    private let list = Guarded<[UInt32]>([])
    var values: [UInt32] { list.withLock { $0 } }
    func read(_ offset: UInt16, size: Int) -> UInt32 { .max }
    func write(_ offset: UInt16, size: Int, value: UInt32) { list.withLock { $0.append(value) } }
}

/// What a device asked of its machine.
private final class Requests: Sendable {
    private let list = Guarded<[MachineRequest]>([])
    func add(_ request: MachineRequest) { list.withLock { $0.append(request) } }
    func take() -> [MachineRequest] {
        list.withLock { list in
            defer { list = [] }
            return list
        }
    }
}

@Suite(.timed) struct PlatformExitTests {
    @Test func endsWithTheStatusWritten() {
        let requests = Requests()
        let device = ExitDevice { requests.add($0) }
        device.write(0, size: 1, value: 0)
        device.write(0, size: 1, value: 63)
        device.write(0, size: 1, value: 64)
        device.write(0, size: 1, value: 0xff)
        device.write(0, size: 4, value: 0xffff_ff05)
        #expect(requests.take() == [0, 63, 63, 63, 5].map { .exit(status: $0) })
        device.write(1, size: 1, value: 1)
        #expect(device.read(0, size: 1) == .max)
        #expect(requests.take().isEmpty)
    }

    @Test func aPostCodeIsNotKept() {
        let port = PostCodePort()
        port.write(0, size: 1, value: 0x55)
        #expect(port.read(0, size: 1) == .max)
    }

    @Test func aStringIsWrittenByItsElements() {
        let port = RecordingPort()
        let codes: [UInt8] = [1, 2, 3, 4, 5, 6, 7]
        port.write(0, size: 4, string: codes.span)
        #expect(port.values == [0x0403_0201], "the rest of an element that is cut short is not written")
        port.write(0, size: 1, string: codes.span)
        #expect(port.values == [0x0403_0201] + codes.map(UInt32.init))
    }
}

@Suite(.timed) struct PlatformPowerTests {
    @Test func powersOffForS5Only() {
        let requests = Requests()
        let power = PowerController(request: { requests.add($0) }, interrupt: {})
        for value in 0..<256 as Range<UInt32> where value & 0x3c != 0x34 { power.write(0, size: 1, value: value) }
        power.write(1, size: 1, value: 0x34)
        power.write(2, size: 1, value: 0x34)
        #expect(requests.take().isEmpty)
        power.write(0, size: 1, value: 0x34)
        #expect(requests.take() == [.powerOff])
        // A wide write begins with the register.
        power.write(0, size: 4, value: 0x34)
        #expect(requests.take() == [.powerOff])
        #expect(power.read(0, size: 2) == 0)
    }

    @Test func announcesAnEventOnceToWhoReadsIt() {
        let interrupts = Requests()
        let power = PowerController(request: { _ in }, interrupt: { interrupts.add(.powerOff) })
        #expect(power.read(2, size: 1) == 0)
        power.requestPowerOff()
        #expect(interrupts.take().count == 1)
        // The neighbours do not take it.
        #expect(power.read(0, size: 2) == 0)
        #expect(power.read(2, size: 1) == 1)
        #expect(power.read(2, size: 1) == 0)
        power.requestPowerOff()
        power.requestPowerOff()
        #expect(power.read(2, size: 4) == 0xffff_ff01)
        #expect(power.read(2, size: 1) == 0)
        #expect(power.read(3, size: 1) == 0xff)
    }
}

@Suite(.timed) struct PlatformKeyboardTests {
    private let data: UInt16 = 0, command: UInt16 = 4

    private func make() -> (KeyboardController, Requests) {
        let requests = Requests()
        return (KeyboardController { requests.add($0) }, requests)
    }

    /// A driver's command: the answer, or nil when none comes.
    private func answer(_ device: KeyboardController, _ value: UInt32, parameter: UInt32? = nil) -> UInt32? {
        device.write(command, size: 1, value: value)
        if let parameter { device.write(data, size: 1, value: parameter) }
        guard device.read(command, size: 1) & 1 != 0 else { return nil }
        return device.read(data, size: 1)
    }

    @Test func resetsTheMachine() {
        let (device, requests) = make()
        device.write(command, size: 1, value: 0xfe)
        #expect(requests.take() == [.reset])
        // By the output port as well.
        device.write(command, size: 1, value: 0xd1)
        device.write(data, size: 1, value: 0xdf)
        #expect(requests.take().isEmpty)
        device.write(command, size: 1, value: 0xd1)
        device.write(data, size: 1, value: 0xfe)
        #expect(requests.take() == [.reset])
        // Other values, and the same ones elsewhere.
        device.write(command, size: 1, value: 0xff)
        device.write(data, size: 1, value: 0xfe)
        device.write(1, size: 1, value: 0xfe)
        #expect(requests.take().isEmpty)
    }

    @Test func answersAProbe() {
        let (device, _) = make()
        #expect(device.read(command, size: 1) & 3 == 0, "nothing to read, ready to be written")
        #expect(answer(device, 0xaa) == 0x55)
        let before = answer(device, 0x20)
        #expect(before == 0x74)
        #expect(answer(device, 0x60, parameter: 0x65) == nil)
        #expect(answer(device, 0x20) == 0x65)
        #expect(answer(device, 0xa7) == nil && answer(device, 0xad) == nil)
        #expect(answer(device, 0x20) == 0x75)
        #expect(answer(device, 0xa8) == nil && answer(device, 0xae) == nil)
        #expect(answer(device, 0x20) == 0x45)
        // No auxiliary port: the pattern does not come back, its test fails.
        #expect(answer(device, 0xd3, parameter: 0x5a) == 0xa5)
        #expect(answer(device, 0xa9) == 0x01 && answer(device, 0xab) == 0x01)
        #expect(answer(device, 0xd2, parameter: 0x12) == 0x12)
        #expect(answer(device, 0xd0) == 0x03)
        device.write(data, size: 1, value: 0xf2)
        #expect(device.read(data, size: 1) == 0xfe && device.read(command, size: 1) & 1 == 0)
        #expect(device.read(2, size: 1) == 0xff && device.read(0, size: 4) & 0xffff_ff00 == 0xffff_ff00)
    }
}

@Suite(.timed) struct PlatformClockTests {
    /// 2024-02-29 23:59:58 UTC, a Thursday.
    private static let leapDay: Int64 = 1_709_251_198

    private final class Clock: Sendable {
        let time: Guarded<RealTimeClock.Time>
        init(_ seconds: Int64, nanoseconds: Int64 = 0) {
            time = Guarded(.init(seconds: seconds, nanoseconds: nanoseconds))
        }
        func advance(_ seconds: Int64) { time.withLock { $0.seconds += seconds } }
        func set(nanoseconds: Int64) { time.withLock { $0.nanoseconds = nanoseconds } }
    }

    private func make(_ clock: Clock, memorySize: UInt64 = 1 << 30) -> RealTimeClock {
        RealTimeClock(memorySize: memorySize) { clock.time.withLock { $0 } }
    }

    private func read(_ rtc: RealTimeClock, _ register: UInt32) -> UInt32 {
        rtc.write(0, size: 1, value: register)
        return rtc.read(1, size: 1)
    }

    private func write(_ rtc: RealTimeClock, _ register: UInt32, _ value: UInt32) {
        rtc.write(0, size: 1, value: register)
        rtc.write(1, size: 1, value: value)
    }

    /// Century, year, month, day, day of the week, hour, minute, second.
    private func all(_ rtc: RealTimeClock) -> [UInt32] { [0x32, 9, 8, 7, 6, 4, 2, 0].map { read(rtc, $0) } }

    @Test func tellsTheTime() {
        let clock = Clock(Self.leapDay)
        let rtc = make(clock)
        #expect(all(rtc) == [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58])
        clock.advance(2)
        #expect(all(rtc) == [0x20, 0x24, 0x03, 0x01, 6, 0x00, 0x00, 0x00])
        write(rtc, 0x0b, 0x06)
        clock.advance(-1)
        #expect(all(rtc) == [20, 24, 2, 29, 5, 23, 59, 59])
        // Twelve hours: bit 7 is the afternoon, and midnight is 12.
        write(rtc, 0x0b, 0x00)
        #expect(read(rtc, 4) == 0x91)
        clock.advance(1)
        #expect(read(rtc, 4) == 0x12)
        #expect(read(rtc, 0x0d) == 0x80, "the battery is good")
    }

    @Test(
        arguments: [
            (0, [0x19, 0x70, 1, 1, 5, 0, 0, 0]), (951_782_400, [0x20, 0x00, 2, 0x29, 3, 0, 0, 0]),
            (4_107_542_399, [0x21, 0x00, 2, 0x28, 1, 0x23, 0x59, 0x59]),
            (4_107_542_400, [0x21, 0x00, 3, 1, 2, 0, 0, 0]),
            (-1, [0x19, 0x69, 0x12, 0x31, 4, 0x23, 0x59, 0x59]),
            (253_402_300_799, [0x99, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x59]),
            (.max, [0x99, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x59]),
        ] as [(Int64, [UInt32])])
    func knowsTheCalendar(seconds: Int64, registers: [UInt32]) {
        #expect(all(make(Clock(seconds))) == registers)
    }

    @Test func keepsTheTimeThatTheGuestSets() {
        let clock = Clock(Self.leapDay)
        let rtc = make(clock)
        // With the clock stopped, as drivers do it.
        write(rtc, 0x0b, 0x82)
        for (register, value) in [(0, 0x30), (2, 0x15), (4, 0x12), (7, 0x31), (8, 0x12), (9, 0x99), (0x32, 0x19)]
            as [(UInt32, UInt32)]
        {
            write(rtc, register, value)
            clock.advance(7)
        }
        #expect(all(rtc) == [0x19, 0x99, 0x12, 0x31, 6, 0x12, 0x15, 0x30])
        write(rtc, 0x0b, 0x02)
        clock.advance(11 * 3600 + 44 * 60 + 30)
        #expect(all(rtc) == [0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0])
        // And without stopping it.
        write(rtc, 4, 0x05)
        clock.advance(61)
        #expect(all(rtc) == [0x20, 0x00, 0x01, 0x01, 7, 0x05, 0x01, 0x01])
    }

    /// A battery keeps time and memory; no interrupt stays enabled (MC146818 data sheet, "RESET").
    @Test func keepsTimeAndMemoryAcrossAReset() {
        let rtc = make(Clock(Self.leapDay))
        write(rtc, 0x50, 0x5a)
        write(rtc, 0x09, 0x31)
        write(rtc, 0x0b, 0x7e)
        let before = all(rtc)
        rtc.reset()
        // The index register is back at 0, the seconds.
        let seconds = rtc.read(1, size: 1)
        #expect(seconds == before.last)
        #expect(all(rtc) == before && read(rtc, 0x50) == 0x5a && read(rtc, 0x0b) == 0x06)
    }

    @Test func warnsOfAnUpdate() {
        let clock = Clock(Self.leapDay)
        let rtc = make(clock)
        #expect(read(rtc, 0x0a) == 0x26)
        clock.set(nanoseconds: 999_800_000)
        #expect(read(rtc, 0x0a) == 0xa6)
        // A stopped clock does not update.
        write(rtc, 0x0b, 0x82)
        #expect(read(rtc, 0x0a) == 0x26)
    }

    @Test(
        arguments: [
            (512 << 10, [0, 0, 0]), (64 << 20, [0xfc00, 0x300, 0]), (1 << 30, [0xffff, 0x3f00, 0]),
            (3 << 30, [0xffff, 0xbf00, 0]),
            (8 << 30, [0xffff, 0xbf00, 0x1_4000]), (.max, [0xffff, 0xbf00, 0xff_ffff]),
        ] as [(UInt64, [UInt32])])
    func tellsTheRAMSize(memorySize: UInt64, sizes: [UInt32]) {
        let rtc = make(Clock(0), memorySize: memorySize)
        func value(_ registers: [UInt32]) -> UInt32 { registers.reversed().reduce(0) { $0 << 8 | read(rtc, $1) } }
        #expect([value([0x30, 0x31]), value([0x34, 0x35]), value([0x5b, 0x5c, 0x5d])] == sizes)
        #expect(value([0x17, 0x18]) == sizes[0] && value([0x15, 0x16]) == 640)
    }

    @Test func followsTheHost() {
        let rtc = RealTimeClock(memorySize: 1 << 30)
        let year = read(rtc, 0x32) >> 4 * 1000 + read(rtc, 0x32) & 15 * 100 + read(rtc, 9) >> 4 * 10 + read(rtc, 9) & 15
        #expect(year >= 2024)
        #expect(RealTimeClock.Time.now().nanoseconds < 1_000_000_000)
    }

    /// Whatever is written in whatever order, it goes on.
    @Test func survivesAnyDriver() {
        let clock = Clock(Self.leapDay)
        let rtc = make(clock)
        var state: UInt64 = 1
        for _ in 0..<50_000 {
            state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
            let value = UInt32(state >> 32)
            rtc.write(UInt16(value >> 30), size: Int(value >> 27 & 7), value: value)
            _ = rtc.read(UInt16(value >> 25 & 3), size: Int(value >> 22 & 7))
            // Registers of the time more often than chance would.
            write(rtc, [0, 2, 4, 6, 7, 8, 9, 0x32, 0x0a, 0x0b][Int(value % 10)], value >> 8 & 0xff)
        }
        write(rtc, 0x0b, 0x06)
        #expect(read(rtc, 8) >= 1 && read(rtc, 8) <= 12 && read(rtc, 7) <= 31)
    }
}
