// SPDX-License-Identifier: Apache-2.0

/// Nanoseconds: a duration, or the time since the machine's first tick.
typealias Nanoseconds = UInt64

let milliseconds: Nanoseconds = 1_000_000
let seconds: Nanoseconds = 1_000_000_000

/// Time, from the time-stamp counter.
final class Clock: @unchecked Sendable {
    /// Ticks of the time-stamp counter in a second.
    private(set) var frequency: UInt64 = 1_000_000_000
    /// The source of the frequency.
    private(set) var source: StaticString = "a default"
    /// Nanoseconds per tick, times 2³².
    private var scale: UInt64 = 1 << 32

    /// Since the counter's zero.
    var now: Nanoseconds {
        let (high, low) = timestamp().multipliedFullWidth(by: scale)
        return high << 32 | UInt64(low) >> 32
    }

    /// Spins for `span`.
    func spin(_ span: Nanoseconds) {
        let end = now + span
        while now < end { spinPause() }
    }

    /// Determines the frequency: from CPUID or KVM's clock, or by measurement if neither has it.
    func start() {
        if let told = Self.crystal() {
            (frequency, source) = (told, "CPUID 0x15")
        } else if let told = Hypervisor.timestampFrequency {
            (frequency, source) = (told, "CPUID 0x40000010")
        } else if let told = Self.kvmClock() {
            (frequency, source) = (told, "kvmclock")
        } else {
            (frequency, source) = (Self.measured(), "the PIT")
        }
        scale = (1_000_000_000 << 32) / frequency
    }

    private static func crystal() -> UInt64? {
        guard CPUID(0).eax >= 0x15 else { return nil }
        let leaf = CPUID(0x15)
        guard leaf.eax != 0, leaf.ebx != 0, leaf.ecx != 0 else { return nil }
        return sane(UInt64(leaf.ecx) * UInt64(leaf.ebx) / UInt64(leaf.eax))
    }

    /// KVM's paravirtual clock contains the scale from ticks to nanoseconds; it is enabled only while it is read.
    private static func kvmClock() -> UInt64? {
        let clockSource2: UInt32 = 1 << 3
        let systemTime: UInt32 = 0x4b56_4d01
        guard Hypervisor.isKVM, CPUID(0x4000_0001).eax & clockSource2 != 0, let page = unsafe pages.allocate() else {
            return nil
        }
        defer { unsafe pages.release(page, pages: 1) }
        page.fill(count: 32)
        writeMSR(systemTime, page.value | 1)
        let multiplier: UInt32 = page.load(24)
        let shift = Int8(bitPattern: page.load(28))
        writeMSR(systemTime, 0)
        guard multiplier != 0, shift > -32, shift < 32 else { return nil }
        let frequency = (1_000_000_000 << 32) / UInt64(multiplier)
        return sane(shift > 0 ? frequency >> UInt64(shift) : frequency << UInt64(-shift))
    }

    /// Ten milliseconds of the PIT's channel 2.
    private static func measured() -> UInt64 {
        let count: UInt16 = 11932  // of 1.193182 MHz
        writePort8(0x61, readPort8(0x61) & 0xfc | 0x01)  // gate open, speaker off
        writePort8(0x43, 0xb0)  // channel 2, both bytes, mode 0
        writePort8(0x42, UInt8(truncatingIfNeeded: count))
        writePort8(0x42, UInt8(truncatingIfNeeded: count >> 8))
        let start = timestamp()
        var polls = 0
        while readPort8(0x61) & 0x20 == 0 && polls < 1_000_000 { polls += 1 }
        return sane((timestamp() - start) * 100) ?? 1_000_000_000
    }

    private static func sane(_ frequency: UInt64) -> UInt64? {
        frequency >= 10_000_000 && frequency <= 20_000_000_000 ? frequency : nil
    }
}

let clock = Clock()

/// The hypervisor's CPUID leaves.
enum Hypervisor {
    private static var highestLeaf: UInt32 { CPUID(1).ecx >> 31 == 1 ? CPUID(0x4000_0000).eax : 0 }

    static var isKVM: Bool {
        guard CPUID(1).ecx >> 31 == 1 else { return false }
        let leaf = CPUID(0x4000_0000)
        return leaf.ebx == 0x4b4d_564b && leaf.ecx == 0x564b_4d56 && leaf.edx == 0x4d  // KVMKVMKVM
    }

    static var timestampFrequency: UInt64? {
        guard highestLeaf >= 0x4000_0010, highestLeaf < 0x4000_1000 else { return nil }
        let kilohertz = CPUID(0x4000_0010).eax
        return kilohertz >= 10_000 && kilohertz <= 20_000_000 ? UInt64(kilohertz) * 1000 : nil
    }
}
