// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing
import Virtio

@testable import Devices

@Suite(.timed) struct NetworkReceiveTests {
    private let base = NetworkDriver.buffers

    /// The header that the device gives with a frame in so many buffers.
    private func header(buffers: UInt8) -> [UInt8] { Array(plainHeader.dropLast(2)) + [buffers, 0] }

    @Test(
        arguments: [[], .eventIndex, .mergeableBuffers, [.mergeableBuffers, .eventIndex, .indirectDescriptors]]
            as [FeatureSet])
    func aFrameComesInOneBuffer(_ features: FeatureSet) throws {
        let (driver, wire) = try Wire.make()
        try driver.start(features)
        let head = try driver.offerBuffer(at: base, [2048])
        driver.kick(0)
        try wire.send(plainHeader + frame(60))
        let used = try driver.used(0)
        #expect(used == (head, 72))
        #expect(try driver.bytes(base, 72) == header(buffers: 1) + frame(60))
        #expect(driver.device.counters.receivedFrames == 1 && driver.device.counters.receivedBytes == 60)
        #expect(driver.device.counters.receiveDrops == 0)
    }

    /// Wherever the buffer is cut, also within the header.
    @Test(
        arguments: [[1, 2047], [12, 2036], [11, 1, 2036], [5, 5, 5, 5, 2028], [0, 12, 0, 2036, 0], [10, 2038]]
            as [[UInt32]])
    func aBufferMayBeInPieces(_ lengths: [UInt32]) throws {
        for features in [[], .mergeableBuffers] as [FeatureSet] {
            let (driver, wire) = try Wire.make()
            try driver.start(features)
            try driver.offerBuffer(at: base, lengths)
            driver.kick(0)
            try wire.send(plainHeader + frame(1500))
            #expect(try driver.used(0).written == 1512)
            #expect(try driver.bytes(base, 1512) == header(buffers: 1) + frame(1500))
        }
    }

    @Test func aFrameIsSpreadOverMergedBuffers() throws {
        let (driver, wire) = try Wire.make()
        try driver.start(.mergeableBuffers)
        for index in 0..<20 as Range<UInt64> { try driver.offerBuffer(at: base + index * 0x1000, [100]) }
        driver.kick(0)
        try wire.send(plainHeader + frame(300))
        var bytes: [UInt8] = []
        for (index, length) in [100, 100, 100, 12].enumerated() {
            let used = try driver.used(0)
            #expect(used == (UInt16(index), length))
            bytes += try driver.bytes(base + UInt64(index) * 0x1000, length)
        }
        #expect(bytes == header(buffers: 4) + frame(300))
        // A frame that ends where a buffer ends takes no other.
        try wire.send(plainHeader + frame(188))
        #expect(try driver.used(0) == (4, 100))
        #expect(try driver.used(0) == (5, 100))
        #expect(try driver.bytes(base + 0x4000, 12) == header(buffers: 2))
        try wire.send(plainHeader + frame(14))
        #expect(try driver.used(0) == (6, 26))
    }

    /// The largest frame that Linux makes, over as many buffers as a guest gives it.
    @Test func aLargeFrameIsSpreadOverManyBuffers() throws {
        let (driver, wire) = try Wire.make()
        try driver.start(.mergeableBuffers)
        for index in 0..<64 as Range<UInt64> { try driver.offerBuffer(at: base + index * 0x1000, [1536]) }
        driver.kick(0)
        try wire.send(plainHeader + frame(65549))
        var bytes: [UInt8] = []
        for index in 0..<43 as Range<UInt64> {
            bytes += try driver.bytes(base + index * 0x1000, try driver.used(0).written)
        }
        #expect(bytes == header(buffers: 43) + frame(65549))
    }

    /// The MTU and the Ethernet header, with a VLAN tag or without, and not a byte more; what is to be segmented is not
    /// bound by it.
    @Test(arguments: [4096, 256] as [UInt32]) func noFrameAboveANegotiatedMTU(buffer: UInt32) throws {
        let (driver, wire) = try Wire.make(mtu: 1000)
        try driver.start([.mtu, .mergeableBuffers])
        func tagged(_ count: Int, _ type: [UInt8]) -> [UInt8] { Array(frame(count)[..<12]) + type + frame(count - 14) }
        let segmented: [UInt8] = [0, 1] + plainHeader[2...], marked: [UInt8] = [0, 0x80] + plainHeader[2...]
        let packets: [(bytes: [UInt8], passes: Bool)] = [
            (plainHeader + tagged(1014, [8, 0]), true), (plainHeader + tagged(1015, [8, 0]), false),
            (plainHeader + tagged(4000, [8, 0]), false),
            (plainHeader + tagged(1018, [0x81, 0]), true), (plainHeader + tagged(1019, [0x81, 0]), false),
            (plainHeader + tagged(1018, [0x88, 0xa8]), true),
            (plainHeader + tagged(1018, [0x88, 0xcc]), false), (marked + tagged(1015, [8, 0]), false),
            (marked + tagged(1014, [8, 0]), true),
            (segmented + tagged(3000, [8, 0]), true), (plainHeader + frame(60), true),
        ]
        for index in 0..<128 as Range<UInt64> { try driver.offerBuffer(at: base + index * 0x1000, [buffer]) }
        driver.kick(0)
        for packet in packets { try wire.send(packet.bytes) }
        for packet in packets where packet.passes {
            var bytes: [UInt8] = []
            repeat {
                let used = try driver.used(0)
                bytes += try driver.bytes(base + UInt64(used.head) * 0x1000, used.written)
            } while bytes.count < packet.bytes.count
            #expect(bytes.dropFirst(12).elementsEqual(packet.bytes.dropFirst(12)))
        }
        let counters = driver.device.counters
        #expect(counters.receiveAboveMTU.value == 5 && counters.receiveDrops == 5 && counters.receivedFrames == 6)
        #expect(
            driver.lines.all.first
                == "warning: a frame for the guest was dropped: it exceeds the MTU that the guest has negotiated")
    }

    @Test func withoutTheFeatureNoMTUIsPromised() throws {
        let (driver, wire) = try Wire.make(mtu: 1000)
        try driver.start(.mergeableBuffers)
        try driver.offerBuffer(at: base, [4096])
        driver.kick(0)
        try wire.send(plainHeader + frame(3000))
        #expect(try driver.used(0).written == 3012)
    }

    // MARK: No frame is lost for want of buffers

    @Test func framesWaitForTheFirstBuffer() throws {
        let (driver, wire) = try Wire.make()
        try driver.start()
        for index in 0..<5 { try wire.send(plainHeader + frame(60, seed: index)) }
        for index in 0..<5 {
            try driver.offerBuffer(at: base + UInt64(index) * 0x1000, [2048])
            driver.kick(0)
            #expect(try driver.used(0).written == 72)
            #expect(try driver.bytes(base + UInt64(index) * 0x1000 + 12, 60) == frame(60, seed: index))
        }
        #expect(driver.device.counters.receivedFrames == 5 && driver.device.counters.receiveDrops == 0)
    }

    /// A frame that has begun to arrive waits for the rest of its buffers.
    @Test(arguments: [12, 0])
    func aFrameWaitsForMoreMergedBuffers(_ headerSize: Int) throws {
        let (driver, wire) = try Wire.make(headerSize: headerSize)
        try driver.start(.mergeableBuffers)
        try driver.offerBuffer(at: base, [200])
        driver.kick(0)
        try wire.send((headerSize == 0 ? [] : plainHeader) + frame(1000))
        for index in 1..<6 as Range<UInt64> {
            try driver.offerBuffer(at: base + index * 200, [100, 100])
            driver.kick(0)
        }
        var written: [Int] = []
        for _ in 0..<6 { written.append(try driver.used(0).written) }
        #expect(written == [200, 200, 200, 200, 200, 12])
        #expect(try driver.bytes(base, 1012) == header(buffers: 6) + frame(1000))
        #expect(driver.device.counters.receiveDrops == 0)
    }

    /// More frames than buffers, and more chains in all than any list has entries; every one arrives, in order.
    @Test(arguments: [[], .eventIndex, .mergeableBuffers, [.mergeableBuffers, .eventIndex]] as [FeatureSet])
    func aLongRowOfFramesArrivesInOrder(_ features: FeatureSet) throws {
        let (driver, wire) = try Wire.make()
        try driver.start(features, sizes: [8, 8, 8])
        let length: UInt32 = features.contains(.mergeableBuffers) ? 64 : 512
        for slot in 0..<8 as Range<UInt64> { try driver.offerBuffer(at: base + slot * 512, [length]) }
        driver.kick(0)
        for index in 0..<3_000 {
            let count = 14 + index * 31 % 300
            try wire.send(plainHeader + frame(count, seed: index))
            var bytes: [UInt8] = []
            repeat {
                let used = try driver.used(0)
                let slot = UInt64(used.head) * 512
                bytes += try driver.bytes(base + slot, used.written)
                try driver.offerBuffer(at: base + slot, [length])
            } while bytes.count < count + 12
            driver.kick(0)
            try #require(Array(bytes.dropFirst(12)) == frame(count, seed: index))
        }
        #expect(driver.device.counters.receivedFrames == 3_000 && driver.device.counters.receiveDrops == 0)
    }

    // MARK: What cannot be delivered is counted

    @Test(arguments: [12, 0])
    func aFrameTooLongForItsBufferIsDropped(_ headerSize: Int) throws {
        let (driver, wire) = try Wire.make(headerSize: headerSize)
        let header = headerSize == 0 ? [] : plainHeader
        try driver.start()
        try driver.offerBuffer(at: base, [100])
        try driver.offerBuffer(at: base + 0x1000, [2048])
        driver.kick(0)
        try wire.send(header + frame(89))
        try wire.send(header + frame(88))
        try wire.send(header + frame(1000))
        #expect(try driver.used(0) == (0, 100))
        #expect(try driver.bytes(base, 100) == self.header(buffers: 1) + frame(88))
        #expect(try driver.used(0) == (1, 1012))
        #expect(driver.device.counters.receiveTooLong.value == 1 && driver.device.counters.receivedFrames == 2)
    }

    @Test func aFrameTooLongForTheWholeQueueIsDropped() throws {
        let (driver, wire) = try Wire.make()
        try driver.start(.mergeableBuffers, sizes: [4, 4, 4])
        for index in 0..<4 as Range<UInt64> { try driver.offerBuffer(at: base + index * 0x1000, [100]) }
        driver.kick(0)
        try wire.send(plainHeader + frame(389))
        try wire.send(plainHeader + frame(388))
        for index in 0..<4 as Range<UInt16> { #expect(try driver.used(0) == (index, 100)) }
        #expect(driver.device.counters.receiveTooLong.value == 1 && driver.device.counters.receivedFrames == 1)
        #expect(
            driver.lines.all == [
                "warning: a frame for the guest was dropped: it is longer than the guest's receive buffers"
            ])
    }

    /// What the host's header says is for drivers that asked for it.
    @Test func flagsThatWereNotNegotiatedAreCleared() throws {
        let (driver, wire) = try Wire.make()
        try driver.start()
        try driver.offerBuffer(at: base, [2048])
        driver.kick(0)
        try wire.send([2] + plainHeader.dropFirst() + frame(60))
        _ = try driver.used(0)
        #expect(try driver.bytes(base, 12) == header(buffers: 1))
    }

    /// Buffers that break the rules go back empty, and no frame is lost by them.
    @Test(arguments: [[], .mergeableBuffers] as [FeatureSet])
    func badBuffersAreGivenBack(_ features: FeatureSet) throws {
        let (driver, wire) = try Wire.make()
        try driver.start(features)
        try driver.offerBuffer(at: base, [0])
        try driver.offerBuffer(at: base, [11])
        try driver.offer(0, [.init(address: base, length: 2048, isWritable: false)])
        try driver.offer(
            0,
            [.init(address: base, length: 12, isWritable: false), .init(address: base, length: 2048, isWritable: true)])
        try driver.offerBuffer(at: base, [2048])
        driver.kick(0)
        try wire.send(plainHeader + frame(60))
        for _ in 0..<4 { #expect(try driver.used(0).written == 0) }
        #expect(try driver.used(0).written == 72)
        #expect(driver.device.counters.badReceiveBuffers.value == 4 && driver.device.counters.receivedFrames == 1)
        #expect(
            driver.lines.all.first
                == "warning: a receive buffer was returned unused: it is not writable, or too short for a header"
        )
        #expect(!driver.status.contains(.needsReset))
    }

    /// More bad buffers than are looked at in one go.
    @Test func aFloodOfBadBuffersEnds() throws {
        let (driver, wire) = try Wire.make()
        try driver.start(sizes: [256, 8, 8])
        for _ in 0..<256 { try driver.offerBuffer(at: base, [0]) }
        driver.kick(0)
        for _ in 0..<256 { #expect(try driver.used(0).written == 0) }
        for _ in 0..<255 { try driver.offerBuffer(at: base, [11]) }
        try driver.offerBuffer(at: base, [2048])
        driver.kick(0)
        try wire.send(plainHeader + frame(60))
        for _ in 0..<255 { #expect(try driver.used(0).written == 0) }
        #expect(try driver.used(0).written == 72)
    }

    // MARK: Starting and stopping

    @Test func framesFromBeforeTheDriverAreDroppedAndCounted() throws {
        let (driver, wire) = try Wire.make()
        for index in 0..<3 { try wire.send(plainHeader + frame(60, seed: index)) }
        try driver.start { driver in
            try driver.offerBuffer(at: base, [2048])
        }
        #expect(driver.device.counters.receiveWithoutDriver.value == 3)
        #expect(driver.lines.all == ["info: a frame for the guest was dropped: no driver was there to receive it"])
        try wire.send(plainHeader + frame(100))
        #expect(try driver.used(0).written == 112)
    }

    @Test func aResetEndsAllAndANewDriverWorks() throws {
        let (driver, wire) = try Wire.make()
        for round in 0..<20 {
            try driver.start(round % 2 == 0 ? .mergeableBuffers : .eventIndex)
            try driver.offerBuffer(at: base, [2048])
            driver.kick(0)
            try wire.send(plainHeader + frame(60, seed: round))
            #expect(try driver.used(0).written == 72)
            #expect(try driver.bytes(base + 12, 60) == frame(60, seed: round))
        }
    }

    /// A reset in the middle of a frame that waits for buffers: it is counted as lost.
    @Test func aWaitingFrameIsCountedAtReset() throws {
        let (driver, wire) = try Wire.make()
        try driver.start(.mergeableBuffers)
        try driver.offerBuffer(at: base, [100])
        driver.kick(0)
        try wire.send(plainHeader + frame(1000))
        // The device has taken the frame off the wire once a second one behind it is all there is.
        try wait { try driver.bytes(base + 12, 88) == Array(frame(1000).prefix(88)) }
        driver.write(0, 0x070)
        #expect(driver.device.counters.receiveWithoutDriver.value == 1)
        #expect(driver.device.counters.receivedFrames == 0)
    }

    @Test func oneQueueIsResetAlone() throws {
        let (driver, wire) = try Wire.make()
        try driver.start([.ringReset, .mergeableBuffers])
        for index in 0..<4 as Range<UInt64> { try driver.offerBuffer(at: base + index * 0x1000, [2048]) }
        driver.kick(0)
        try wire.send(plainHeader + frame(60))
        #expect(try driver.used(0) == (0, 72))
        try driver.restart(0)
        try wire.send(plainHeader + frame(61))
        try driver.sendAndWait(plainHeader + frame(62))
        #expect(try wire.next() == plainHeader + frame(62))
        try driver.offerBuffer(at: base, [2048])
        driver.kick(0)
        #expect(try driver.used(0) == (0, 73))
    }

    // MARK: A hostile driver

    @Test func aBrokenRingNeedsAResetAndThenWorks() throws {
        let (driver, wire) = try Wire.make()
        try driver.start()
        // An available index beyond the queue's size.
        try driver.memory.ram.write(300 as UInt16, at: .init(driver.queues[0].available + 2))
        driver.kick(0)
        try wait { driver.status.contains(.needsReset) }
        try driver.start(.mergeableBuffers)
        #expect(!driver.status.contains(.needsReset))
        try driver.offerBuffer(at: base, [2048])
        driver.kick(0)
        try wire.send(plainHeader + frame(60))
        #expect(try driver.used(0).written == 72)
    }

    @Test(arguments: [0xffff_ffff_ffff_f000, 0xd000_0000, 16 << 20, (16 << 20) - 100] as [UInt64])
    func buffersOutsideRAMNeedAReset(_ address: UInt64) throws {
        let (driver, wire) = try Wire.make()
        try driver.start(.mergeableBuffers)
        try wire.send(plainHeader + frame(60))
        try driver.offerBuffer(at: address, [2048])
        driver.kick(0)
        try wait { driver.status.contains(.needsReset) }
        #expect(driver.device.counters.receivedFrames == 0)
    }
}
