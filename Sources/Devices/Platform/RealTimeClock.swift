// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux
internal import Platform

/// The MC146818 clock with its CMOS RAM at ports 0x70 and 0x71: the time of day, and how much RAM there is.
///
/// Its time is the host's plus what the guest has set it apart. Its interrupt is not wired.
public final class RealTimeClock: ByteWideDevice {
    /// Time since 1970 in UTC.
    public struct Time: Sendable {
        public var seconds: Int64
        public var nanoseconds: Int64

        public init(seconds: Int64, nanoseconds: Int64) { (self.seconds, self.nanoseconds) = (seconds, nanoseconds) }

        /// The host's clock.
        public static func now() -> Time {
            var time = timespec()
            // The clock exists; the call cannot fail with a valid pointer.
            unsafe clock_gettime(CLOCK_REALTIME, &time)
            return Time(seconds: Int64(time.tv_sec), nanoseconds: Int64(time.tv_nsec))
        }
    }

    private enum Register {
        static let a = 0x0a, b = 0x0b, c = 0x0c, d = 0x0d, century = 0x32
        static let time = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, century]
    }
    private enum ControlB {
        static let set: UInt8 = 1 << 7, binary: UInt8 = 1 << 2, hours24: UInt8 = 1 << 1
        /// The three interrupts' enable bits and the square wave's.
        static let clearedByReset: UInt8 = 0x78
    }

    private struct State {
        var index = 0
        var ram: [UInt8]
        /// Seconds between the guest's clock and the host's.
        var offset: Int64 = 0
        /// What the guest is about to set, while the SET bit stops the clock.
        var stopped: CalendarTime?
    }

    private let state: Guarded<State>
    private let now: @Sendable () -> Time

    /// - Parameters:
    ///   - memorySize: bytes of guest RAM.
    ///   - now: the clock that it follows.
    public init(memorySize: UInt64, now: @escaping @Sendable () -> Time = Time.now) {
        var ram = [UInt8](repeating: 0, count: 128)
        func store(_ value: UInt64, at register: Int, bytes: Int) {
            for index in 0..<bytes { ram[register + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * index)) }
        }
        let low = min(memorySize, PhysicalLayout.hole.lowerBound)
        store(640, at: 0x15, bytes: 2)
        // KiB beyond the first MiB, 64 KiB units beyond 16 MiB and beyond 4 GiB: as QEMU's and Bochs's firmware reads
        // them.
        let extended = min((low - min(low, 1 << 20)) >> 10, 0xffff)
        store(extended, at: 0x17, bytes: 2)
        store(extended, at: 0x30, bytes: 2)
        store(min((low - min(low, 16 << 20)) >> 16, 0xffff), at: 0x34, bytes: 2)
        store(min((memorySize - low) >> 16, 0xff_ffff), at: 0x5b, bytes: 3)
        ram[Register.a] = 0x26
        ram[Register.b] = ControlB.hours24
        ram[Register.d] = 0x80
        state = Guarded(State(ram: ram))
        self.now = now
    }

    /// Resets the clock with the machine: disables the interrupts. Time and memory are kept by the battery (MC146818
    /// data sheet, "RESET").
    public func reset() {
        state.withLock { state in
            state.index = 0
            state.ram[Register.b] &= ~ControlB.clearedByReset
        }
    }

    func readByte(_ offset: UInt16) -> UInt8 {
        // The index port is write-only.
        guard offset == 1 else { return 0xff }
        return state.withLock { state in
            if Register.time.contains(state.index) {
                let time = state.stopped ?? CalendarTime(seconds: now().seconds &+ state.offset)
                return time.register(state.index, format: state.ram[Register.b])
            }
            switch state.index {
            case Register.a:
                // "Update in progress" is set 244 µs before the seconds change, so that what is read after checking it
                // fits together (MC146818 data sheet, "Update Cycle").
                let isUpdating = state.stopped == nil && now().nanoseconds >= 1_000_000_000 - 244_000
                return state.ram[Register.a] | (isUpdating ? 0x80 : 0)
            case Register.c: return 0
            default: return state.ram[state.index]
            }
        }
    }

    func writeByte(_ offset: UInt16, _ value: UInt8) {
        state.withLock { state in
            switch (offset, state.index) {
            case (0, _):
                // Bit 7 masks the NMI, which nothing raises here.
                state.index = Int(value & 0x7f)
            case (1, Register.b):
                state.ram[Register.b] = value
                if value & ControlB.set != 0 {
                    state.stopped = state.stopped ?? CalendarTime(seconds: now().seconds &+ state.offset)
                } else if let set = state.stopped {
                    state.offset = set.seconds &- now().seconds
                    state.stopped = nil
                }
            case (1, let index) where Register.time.contains(index):
                var time = state.stopped ?? CalendarTime(seconds: now().seconds &+ state.offset)
                time.set(index, value, format: state.ram[Register.b])
                if state.stopped != nil { state.stopped = time } else { state.offset = time.seconds &- now().seconds }
            case (1, Register.a): state.ram[Register.a] = value & 0x7f
            case (1, Register.c), (1, Register.d): break
            case (1, let index): state.ram[index] = value
            default: break
            }
        }
    }

    /// Date and time of day as the registers split them.
    private struct CalendarTime {
        var second, minute, hour, day, month: Int
        var year: Int

        /// From seconds since 1970, by the proleptic Gregorian calendar.
        init(seconds: Int64) {
            // Years 0 to 9999 are what the registers can hold.
            let seconds = min(max(seconds, -62_167_219_200), 253_402_300_799)
            let (days, rest) = Self.floorDivide(seconds, 86_400)
            (second, minute, hour) = (rest % 60, rest / 60 % 60, rest / 3600)
            // Years that begin in March end with the leap day; eras of 400 years have the same number of days.
            let (era, dayOfEra) = Self.floorDivide(Int64(days) + 719_468, 146_097)
            let yearOfEra = (dayOfEra - dayOfEra / 1460 + dayOfEra / 36_524 - dayOfEra / 146_096) / 365
            let dayOfYear = dayOfEra - (365 * yearOfEra + yearOfEra / 4 - yearOfEra / 100)
            let shifted = (5 * dayOfYear + 2) / 153
            day = dayOfYear - (153 * shifted + 2) / 5 + 1
            month = shifted < 10 ? shifted + 3 : shifted - 9
            year = yearOfEra + era * 400 + (month <= 2 ? 1 : 0)
        }

        /// Days since 1970, where the fields may be out of their ranges as a guest has set them.
        private var days: Int {
            let shiftedYear = month <= 2 ? year - 1 : year
            let (era, yearOfEra) = Self.floorDivide(Int64(shiftedYear), 400)
            let dayOfYear = (153 * (month > 2 ? month - 3 : month + 9) + 2) / 5 + day - 1
            return era * 146_097 + yearOfEra * 365 + yearOfEra / 4 - yearOfEra / 100 + dayOfYear - 719_468
        }

        var seconds: Int64 { Int64(days) * 86_400 + Int64(hour * 3600 + minute * 60 + second) }

        func register(_ index: Int, format: UInt8) -> UInt8 {
            var value =
                switch index {
                case 0x00: second
                case 0x02: minute
                case 0x04: hour
                // 1 is Sunday; 1970 began on a Thursday.
                case 0x06: Self.floorDivide(Int64(days) + 4, 7).rest + 1
                case 0x07: day
                case 0x08: month
                case 0x09: year % 100
                default: year / 100
                }
            var afternoon: UInt8 = 0
            if index == 0x04, format & ControlB.hours24 == 0 {
                afternoon = value >= 12 ? 0x80 : 0
                value = (value + 11) % 12 + 1
            }
            let byte = UInt8(truncatingIfNeeded: value)
            return (format & ControlB.binary != 0 ? byte : (byte / 10) << 4 | byte % 10) | afternoon
        }

        mutating func set(_ index: Int, _ byte: UInt8, format: UInt8) {
            let isTwelveHours = index == 0x04 && format & ControlB.hours24 == 0
            let digits = isTwelveHours ? byte & 0x7f : byte
            var value = Int(format & ControlB.binary != 0 ? digits : (digits >> 4) &* 10 &+ digits & 0xf)
            if isTwelveHours { value = value % 12 + (byte & 0x80 != 0 ? 12 : 0) }
            switch index {
            case 0x00: second = value
            case 0x02: minute = value
            case 0x04: hour = value
            case 0x07: day = value
            // The calendar's arithmetic wants a month that exists.
            case 0x08: month = min(max(value, 1), 12)
            case 0x09: year = year / 100 * 100 + value % 100
            case 0x32: year = min(value, 99) * 100 + year % 100
            default: break  // the day of the week follows from the date
            }
        }

        private static func floorDivide(_ value: Int64, _ divisor: Int64) -> (quotient: Int, rest: Int) {
            let (quotient, rest) = value.quotientAndRemainder(dividingBy: divisor)
            return rest < 0 ? (Int(quotient - 1), Int(rest + divisor)) : (Int(quotient), Int(rest))
        }
    }
}
