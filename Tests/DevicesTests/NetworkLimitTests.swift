// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import Linux
import TestSupport
import Testing
import Virtio

@testable import Devices

/// `rx-bps=`, `rx-pps=`, `tx-bps=` and `tx-pps=`. Only lower bounds of time are tested: those hold on any host.
@Suite(.timed) struct NetworkLimitTests {
    private func milliseconds(_ body: () throws -> Void) throws -> UInt64 {
        let start = TimerFD.now
        try body()
        return TimerFD.now - start
    }

    private func limits(receive: RateLimit = .none, transmit: RateLimit = .none) -> NetworkLimits {
        var limits = NetworkLimits()
        (limits.receive, limits.transmit) = (receive, transmit)
        return limits
    }

    @Test func sentFramesWait() throws {
        let (driver, wire) = try Wire.make(
            limits: limits(transmit: RateLimit(operations: .init(perSecond: 100, burst: 1))))
        try driver.start()
        let time = try milliseconds { () throws in
            for index in 0..<8 {
                try driver.send(
                    plainHeader + frame(60, seed: index), at: NetworkDriver.buffers + UInt64(index) * 0x1000)
            }
            for index in 0..<8 { #expect(try wire.next() == plainHeader + frame(60, seed: index)) }
        }
        #expect(time >= 65)
        #expect(driver.device.throttled.transmit > 0 && driver.device.throttled.receive == 0)
        // Counted after they are on the wire.
        try wait { driver.device.counters.sentFrames == 8 }
    }

    /// Frames wait in the TAP.
    @Test func receivedFramesWait() throws {
        let (driver, wire) = try Wire.make(
            limits: limits(receive: RateLimit(bytes: .init(perSecond: 100_000, burst: 1000))))
        try driver.start()
        for index in 0..<6 as Range<UInt64> {
            try driver.offerBuffer(at: NetworkDriver.buffers + index * 0x1000, [2048])
        }
        driver.kick(0)
        let time = try milliseconds { () throws in
            for index in 0..<6 { try wire.send(plainHeader + frame(1000, seed: index)) }
            for index in 0..<6 as Range<UInt64> {
                #expect(try driver.used(0).written == 1012)
                #expect(
                    try driver.bytes(NetworkDriver.buffers + index * 0x1000 + 12, 1000)
                        == frame(1000, seed: Int(index)))
            }
        }
        // 1,000 bytes are there at once, and the last frame may begin when one byte is.
        #expect(time >= 35)
        #expect(driver.device.throttled.receive > 0 && driver.device.counters.receiveDrops == 0)
    }

    /// The next frame is due in a minute: a reset, and a pause, do not wait for it.
    @Test func whatWaitsHoldsNothingUp() throws {
        let slow = RateLimit(bytes: .init(perSecond: 1, burst: 1))
        let (driver, wire) = try Wire.make(limits: limits(receive: slow, transmit: slow))
        try driver.start()
        try driver.sendAndWait(plainHeader + frame(60))
        #expect(try wire.next() == plainHeader + frame(60))
        try driver.send(plainHeader + frame(60))
        try wait { driver.device.throttled.transmit > 0 }
        for index in 0..<2 as Range<UInt64> {
            try driver.offerBuffer(at: NetworkDriver.buffers + index * 0x1000, [2048])
        }
        driver.kick(0)
        for _ in 0..<2 { try wire.send(plainHeader + frame(60)) }
        _ = try driver.used(0)
        try wait { driver.device.throttled.receive > 0 }
        let quiet = Guarded(false)
        driver.device.pause { quiet.withLock { $0 = true } }
        try wait { quiet.withLock { $0 } }
        driver.device.resume()
        driver.device.reset()
        #expect(!wire.isReadable && driver.device.counters.sentFrames == 1)
        #expect(driver.device.counters.receivedFrames == 1)
    }

    /// A driver that has its frames dropped gets no more of the host's time by it.
    @Test func droppedFramesCountToo() throws {
        let (driver, _) = try Wire.make(
            limits: limits(transmit: RateLimit(operations: .init(perSecond: 100, burst: 1))))
        try driver.start()
        let time = try milliseconds { () throws in
            for _ in 0..<6 { try driver.sendAndWait([UInt8](repeating: 0, count: 13)) }
        }
        #expect(time >= 45 && driver.device.counters.sendMalformed.value == 6)
    }
}
