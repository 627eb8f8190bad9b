// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import GuestMemory
import HostNetwork
import Linux
import TestSupport
import Testing
import Virtio

@testable import Devices

/// A card whose frames go through a UNIX stream socket, each behind its length.
@Suite(.timed) struct NetworkStreamTests {
    private static let tx = NetworkDriver.transmit

    /// Offers receive buffers of 2 KiB.
    private func offer(_ driver: NetworkDriver, _ range: Range<UInt64>) throws {
        for index in range { try driver.offerBuffer(at: NetworkDriver.buffers + index % 256 * 0x1000, [2048]) }
        driver.kick(0)
    }

    /// Waits for the next frame that the card gives the guest.
    private func received(_ driver: NetworkDriver) throws -> [UInt8] {
        let used = try driver.used(0)
        let bytes = try driver.bytes(NetworkDriver.buffers + UInt64(used.head % 256) * 0x1000, used.written)
        #expect(Array(bytes.prefix(10)) == Array(plainHeader.prefix(10)))
        return Array(bytes.dropFirst(12))
    }

    // MARK: Frames

    @Test func aDriverSeesACardWithoutOffloads() throws {
        let (driver, _) = try StreamPeer.make(mtu: 65520)
        #expect(driver.offered.isSuperset(of: [.mac, .linkStatus, .mtu, .mergeableBuffers, .controlQueue]))
        #expect(driver.offered.isDisjoint(with: [.checksum, .guestChecksum, .hostTSO4, .networkMultiqueue]))
        #expect(driver.configuration(10, 2) == 65520 && driver.device.queuePairs.count == 1)
        #expect(driver.device.hostDrops == nil && driver.device.hostInterface == "peer")
        try driver.start()
        // What only a virtio header could describe.
        try driver.sendAndWait([1] + plainHeader.dropFirst() + frame(60))
        #expect(driver.device.counters.sendMalformed.value == 1)
    }

    @Test(arguments: [[], [12], [5, 7, 1, 1, 30], [12, 14]]) func aFrameGoesOutBehindItsLength(cut: [Int]) throws {
        let (driver, peer) = try StreamPeer.make()
        try driver.start(.mergeableBuffers)
        for size in [14, 60, 1514, 65554] {
            try driver.sendAndWait(plainHeader + frame(size), cut: size == 14 ? [] : cut)
            #expect(try peer.next() == frame(size))
        }
        #expect(driver.device.counters.sentFrames == 4 && driver.device.counters.sentBytes == 14 + 60 + 1514 + 65554)
        try driver.sendAndWait(plainHeader + frame(13))
        try driver.sendAndWait(plainHeader + frame(65555))
        #expect(driver.device.counters.sendMalformed.value == 2 && !peer.isReadable)
    }

    /// A driver may pad a frame to the shortest that Ethernet has, and passt drops such packets.
    @Test func paddingIsCutOff() throws {
        let (driver, peer) = try StreamPeer.make()
        try driver.start()
        func frame(_ header: [UInt8], length: Int = 60) -> [UInt8] {
            let start = [UInt8](repeating: 2, count: 12) + header
            return start + (start.count..<length).map { UInt8($0) }
        }
        let ip4: [UInt8] = [8, 0, 0x45, 0], ip6: [UInt8] = [0x86, 0xdd, 0x60, 0, 0, 0], tag: [UInt8] = [0x81, 0, 0, 5]
        for (sent, length) in [
            (frame(ip4 + [0, 40]), 54), (frame(ip4 + [0, 29]), 43), (frame(tag + ip4 + [0, 40]), 58),
            (frame(ip6 + [0, 2]), 56), (frame(ip6 + [0, 0]), 54),
            // Packets that fill their frame, or cannot be as long as they state; other kinds; other lengths.
            (frame(ip4 + [0, 46]), 60), (frame(ip4 + [0, 47]), 60), (frame(ip4 + [0, 19]), 60),
            (frame(ip4 + [255, 255]), 60), (frame(ip6 + [255, 255]), 60), (frame([8, 6, 0, 40]), 60),
            (frame(ip4 + [0, 40], length: 61), 61), (frame(ip4 + [0, 40], length: 59), 59),
        ] {
            for cut in [[], [12], [12, 14, 2, 30]] {
                try driver.sendAndWait(plainHeader + sent, cut: cut)
                #expect(try peer.next() == Array(sent.prefix(length)))
            }
        }
    }

    @Test func framesAreCutApart() throws {
        let (driver, peer) = try StreamPeer.make()
        try driver.start(.mergeableBuffers)
        try offer(driver, 0..<64)
        // Several in one write, and the beginning of another.
        let frames = (0..<5).map { frame(60 + 300 * $0, seed: $0) }
        try peer.send(frames.flatMap(peer.behindLength) + peer.behindLength(frame(99)).prefix(7))
        for frame in frames { #expect(try received(driver) == frame) }
        // The rest of it, byte by byte; the length of the next, too.
        for byte in peer.behindLength(frame(99)).dropFirst(7) { try peer.send([byte]) }
        #expect(try received(driver) == frame(99))
        for byte in peer.behindLength(frame(14)) { try peer.send([byte]) }
        #expect(try received(driver) == frame(14))
        #expect(driver.device.counters.receivedFrames == 7 && driver.device.counters.receiveDrops == 0)
    }

    /// More than a turn's worth comes in one read: no event of the socket announces the rest.
    @Test func manyFramesInOneRead() throws {
        let (driver, peer) = try StreamPeer.make()
        try driver.start(.mergeableBuffers)
        let count = 1000
        try peer.send((0..<count).flatMap { peer.behindLength(frame(20 + $0 % 7, seed: $0)) })
        try offer(driver, 0..<256)
        for index in 0..<count {
            #expect(try received(driver) == frame(20 + index % 7, seed: index))
            try offer(driver, UInt64(256 + index)..<UInt64(257 + index))
        }
    }

    /// Each is longer than what is left of the reader's buffer sooner or later.
    @Test func longFramesAreSpreadOverBuffers() throws {
        let (driver, peer) = try StreamPeer.make(mtu: 65520)
        try driver.start(.mergeableBuffers)
        for seed in 0..<20 {
            let size = 65535 + seed
            let sender = try Thread.start(name: "peer", stackSize: 1 << 20) {
                try? peer.send(peer.behindLength(frame(size, seed: seed)))
            }
            for index in 0..<9 as Range<UInt64> {
                try driver.offerBuffer(at: NetworkDriver.buffers + index * 8192, [8192])
            }
            driver.kick(0)
            let counts = try (0..<9).map { _ in try driver.used(0).written }
            sender.join()
            #expect(counts.reduce(0, +) == size + 12)
            let bytes = try driver.bytes(NetworkDriver.buffers, size + 12)
            #expect(bytes[10] == 9 && Array(bytes.dropFirst(12)) == frame(size, seed: seed))
        }
    }

    @Test func aFrameTooLongForItsBufferIsDropped() throws {
        let (driver, peer) = try StreamPeer.make()
        try driver.start()
        try offer(driver, 0..<4)
        try peer.send(peer.behindLength(frame(3000)) + peer.behindLength(frame(70)))
        #expect(try received(driver) == frame(70))
        #expect(driver.device.counters.receiveTooLong.value == 1)
    }

    // MARK: Partial writes

    /// Sends frames until the socket takes no more; the last one that the card accepted is cut.
    private func fill(_ driver: NetworkDriver) throws -> Int {
        var sent = 0
        for seed in 0..<200 {
            let at = NetworkDriver.buffers + 0x20_0000 + UInt64(seed % 2) * 0x2_0000
            try driver.send(plainHeader + frame(60_000, seed: seed), at: at)
            sent += 1
            try wait { try driver.hasUsed(Self.tx) || driver.device.counters.sendWaits.value > 0 }
            guard try driver.hasUsed(Self.tx) else { return sent }
            _ = try driver.used(Self.tx)
        }
        throw NothingCame(description: "the socket takes everything")
    }

    @Test func whatTheSocketDoesNotTakeComesLater() throws {
        let (driver, peer) = try StreamPeer.make(sendBuffer: 10_000)
        try driver.start()
        // The last one waits in the queue, behind the tail of the one before.
        let sent = try fill(driver)
        #expect(sent > 1 && driver.device.counters.sentFrames == UInt64(sent - 1))
        for seed in 0..<sent { #expect(try peer.next() == frame(60_000, seed: seed)) }
        _ = try driver.used(Self.tx)
        try driver.sendAndWait(plainHeader + frame(61))
        #expect(try peer.next() == frame(61) && driver.device.counters.sendDrops == 0)
    }

    /// The tail is sent with no driver there, and is not lost with one that is reset.
    @Test(arguments: [false, true]) func aResetDoesNotLoseTheFraming(isStartedAgain: Bool) throws {
        let (driver, peer) = try StreamPeer.make(sendBuffer: 10_000)
        try driver.start()
        let sent = try fill(driver)
        driver.write(0, 0x070)
        if isStartedAgain {
            try driver.start()
            try driver.send(plainHeader + frame(333))
        }
        for seed in 0..<sent - 1 { #expect(try peer.next() == frame(60_000, seed: seed)) }
        if isStartedAgain {
            #expect(try peer.next() == frame(333))
        } else {
            try driver.start()
            try driver.sendAndWait(plainHeader + frame(334))
            #expect(try peer.next() == frame(334))
        }
    }

    @Test func theTailIsSentInAPause() throws {
        let (driver, peer) = try StreamPeer.make(sendBuffer: 10_000)
        try driver.start()
        let sent = try fill(driver)
        try pause(driver)
        for seed in 0..<sent - 1 { #expect(try peer.next() == frame(60_000, seed: seed)) }
        // The next one waits for the guest.
        #expect(!peer.isReadable)
        driver.device.resume()
        #expect(try peer.next() == frame(60_000, seed: sent - 1))
    }

    private func pause(_ driver: NetworkDriver) throws {
        let isQuiet = Guarded(false)
        driver.device.pause { isQuiet.withLock { $0 = true } }
        try wait { isQuiet.withLock { $0 } }
    }

    // MARK: Resets and pauses

    @Test func aPauseKeepsFrames() throws {
        let (driver, peer) = try StreamPeer.make()
        try driver.start(.mergeableBuffers)
        try offer(driver, 0..<256)
        try peer.send(peer.behindLength(frame(60)))
        #expect(try received(driver) == frame(60))
        try pause(driver)
        try peer.send((0..<700).flatMap { peer.behindLength(frame(40, seed: $0)) })
        #expect(try !driver.hasUsed(0))
        driver.device.resume()
        for seed in 0..<255 { #expect(try received(driver) == frame(40, seed: seed)) }
        // The rest is in the reader; a pause then is no end of it.
        try pause(driver)
        try offer(driver, 256..<400)
        driver.device.resume()
        driver.kick(0)
        for seed in 255..<399 { #expect(try received(driver) == frame(40, seed: seed)) }
    }

    @Test func aFrameThatHasComeInPartSurvivesAReset() throws {
        let (driver, peer) = try StreamPeer.make()
        try driver.start(.mergeableBuffers)
        try offer(driver, 0..<4)
        let bytes = peer.behindLength(frame(200))
        try peer.send(peer.behindLength(frame(60)) + bytes.prefix(50))
        #expect(try received(driver) == frame(60))
        driver.write(0, 0x070)
        try driver.start(.mergeableBuffers)
        try offer(driver, 0..<4)
        try peer.send(Array(bytes.dropFirst(50)) + peer.behindLength(frame(61)))
        #expect(try received(driver) == frame(200))
        #expect(try received(driver) == frame(61))
    }

    @Test func framesFromBeforeTheDriverAreDropped() throws {
        let (driver, peer) = try StreamPeer.make()
        try peer.send(
            peer.behindLength(frame(60)) + peer.behindLength(frame(61)) + peer.behindLength(frame(62)).prefix(9))
        try driver.start(.mergeableBuffers)
        #expect(driver.device.counters.receiveWithoutDriver.value == 2)
        try offer(driver, 0..<4)
        try peer.send(Array(peer.behindLength(frame(62)).dropFirst(9)))
        #expect(try received(driver) == frame(62))
    }

    // MARK: The link

    @Test func thePulledCableKeepsTheFraming() throws {
        let (driver, peer) = try StreamPeer.make()
        try driver.start([.linkStatus, .mergeableBuffers])
        try offer(driver, 0..<4)
        try peer.send(Array(peer.behindLength(frame(80)).prefix(30)))
        #expect(!driver.device.setCable(isPluggedIn: false))
        try peer.send(Array(peer.behindLength(frame(80)).dropFirst(30)) + peer.behindLength(frame(81)))
        try driver.sendAndWait(plainHeader + frame(60))
        try wait { driver.device.counters.receiveLinkDown.value == 2 }
        #expect(driver.device.counters.sendLinkDown.value == 1 && !peer.isReadable)
        #expect(driver.device.setCable(isPluggedIn: true))
        try peer.send(peer.behindLength(frame(82)))
        #expect(try received(driver) == frame(82))
        try driver.sendAndWait(plainHeader + frame(61))
        #expect(try peer.next() == frame(61))
    }

    @Test func aPeerThatIsGoneIsALinkThatIsDown() throws {
        let (driver, peer) = try StreamPeer.make()
        try driver.start([.linkStatus, .mergeableBuffers])
        try offer(driver, 0..<4)
        // What it has sent before arrives.
        try peer.send(peer.behindLength(frame(60)) + peer.behindLength(frame(61)).prefix(20))
        peer.close()
        #expect(try received(driver) == frame(60))
        try wait { !driver.device.isLinkUp && driver.configuration(6, 2) == 0 }
        for _ in 0..<3 { try driver.sendAndWait(plainHeader + frame(60)) }
        #expect(driver.device.counters.sendLinkDown.value == 3)
        #expect(!driver.device.setCable(isPluggedIn: true) && driver.device.hostProblem == "peer is gone")
        try driver.start(.linkStatus)
        try driver.sendAndWait(plainHeader + frame(60))
        #expect(driver.device.counters.sendLinkDown.value == 4 && !driver.status.contains(.needsReset))
        #expect(
            driver.lines.all.filter { !$0.hasPrefix("info") } == [
                "warning: the link is down: peer has closed the connection"
            ])
    }

    @Test func aPeerThatIsGoneInThePartOfAFrame() throws {
        let (driver, peer) = try StreamPeer.make(sendBuffer: 10_000)
        try driver.start(.linkStatus)
        try offer(driver, 0..<4)
        _ = try fill(driver)
        peer.close()
        // The one that has waited is dropped.
        _ = try driver.used(Self.tx)
        try wait { !driver.device.isLinkUp }
        #expect(driver.device.counters.sendLinkDown.value == 1)
    }

    @Test(arguments: [0, 1, 13, 65555, 0x0100_0000, 0xffff_ffff] as [UInt32])
    func anImpossibleLengthEndsTheConnection(length: UInt32) throws {
        let (driver, peer) = try StreamPeer.make()
        try driver.start([.linkStatus, .mergeableBuffers])
        try offer(driver, 0..<8)
        try peer.send(
            peer.behindLength(frame(60)) + (0..<4).map { UInt8(truncatingIfNeeded: length >> (24 - 8 * $0)) }
                + frame(500))
        #expect(try received(driver) == frame(60))
        try wait { !driver.device.isLinkUp && driver.configuration(6, 2) == 0 }
        #expect(try peer.isAtEnd())
        try driver.sendAndWait(plainHeader + frame(60))
        try driver.start([.linkStatus, .mergeableBuffers])
        try offer(driver, 0..<8)
        try driver.sendAndWait(plainHeader + frame(60))
        #expect(try driver.device.counters.sendLinkDown.value == 2 && !driver.hasUsed(0))
        #expect(
            driver.lines.all.filter { !$0.hasPrefix("info") } == [
                "warning: the link is down: peer sent a frame with the length \(length), which is impossible; the connection was closed"
            ])
    }

    // MARK: Options

    @Test func theAddressIsLocked() throws {
        let (driver, peer) = try StreamPeer.make(isAddressLocked: true)
        try driver.start()
        var own = frame(60)
        own.replaceSubrange(6..<12, with: [0x52, 0x54, 0, 0, 0, 2])
        for cut in [[], [12], [12, 3, 8], [20]] {
            try driver.sendAndWait(plainHeader + own, cut: cut)
            #expect(try peer.next() == own)
        }
        try driver.sendAndWait(plainHeader + frame(60))
        #expect(driver.device.counters.sendForeignSource.value == 1 && !peer.isReadable)
    }

    @Test func limitsHoldFramesBack() throws {
        var limits = NetworkLimits()
        limits.receive.operations = .init(perSecond: 20, burst: 1)
        limits.transmit.operations = .init(perSecond: 20, burst: 1)
        let (driver, peer) = try StreamPeer.make(limits: limits)
        try driver.start(.mergeableBuffers)
        try offer(driver, 0..<16)
        try peer.send((0..<4).flatMap { peer.behindLength(frame(60, seed: $0)) })
        for seed in 0..<4 { #expect(try received(driver) == frame(60, seed: seed)) }
        for seed in 0..<4 {
            try driver.send(
                plainHeader + frame(60, seed: seed), at: NetworkDriver.buffers + 0x20_0000 + UInt64(seed) * 0x1000)
        }
        for seed in 0..<4 { #expect(try peer.next() == frame(60, seed: seed)) }
        #expect(driver.device.throttled.receive > 0 && driver.device.throttled.transmit > 0)
    }

    @Test func framesAboveTheMTUAreDropped() throws {
        let (driver, peer) = try StreamPeer.make(mtu: 1400)
        try driver.start([.mergeableBuffers, .mtu])
        try offer(driver, 0..<4)
        try peer.send(peer.behindLength(frame(1415)) + peer.behindLength(frame(1414)))
        #expect(try received(driver) == frame(1414))
        #expect(driver.device.counters.receiveAboveMTU.value == 1)
    }
}

/// The program at the other end of a stream.
private final class StreamPeer: @unchecked Sendable {
    // Used by one thread at a time.
    private var socket: FileDescriptor?

    private init(_ socket: consuming FileDescriptor) { self.socket = consume socket }

    /// A card and its peer.
    /// - Parameter sendBuffer: bytes that the card's socket holds, roughly; nil for what is usual.
    static func make(
        mtu: Int = 1500, isAddressLocked: Bool = false, limits: NetworkLimits = .none, sendBuffer: Int32? = nil
    ) throws -> (driver: NetworkDriver, peer: StreamPeer) {
        var ends: [Int32] = [0, 0]
        // The kernel fills the two elements.
        try #require(unsafe socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &ends) == 0)
        if var size = sendBuffer {
            try #require(unsafe setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &size, 4) == 0)
        }
        let peer = StreamPeer(FileDescriptor(owning: ends[1]))
        let stream = FrameStream(FileDescriptor(owning: ends[0]), name: "peer")
        return (
            try NetworkDriver(
                NetworkAttachment(stream: stream, mtu: mtu), isAddressLocked: isAddressLocked, limits: limits), peer
        )
    }

    private var number: Int32 { socket?.rawValue ?? -1 }

    func behindLength(_ frame: [UInt8]) -> [UInt8] {
        (0..<4).map { UInt8(truncatingIfNeeded: frame.count >> (24 - 8 * $0)) } + frame
    }

    func send(_ bytes: [UInt8]) throws {
        var rest = bytes[...]
        while !rest.isEmpty {
            let sent = unsafe rest.withUnsafeBytes {
                unsafe Glibc.send(number, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL))
            }
            guard sent > 0 else { throw SystemCallError.last("send") }
            rest = rest.dropFirst(sent)
        }
    }

    /// The next frame; waits for it.
    func next() throws -> [UInt8] {
        let length = try take(4).reduce(0) { $0 << 8 | Int($1) }
        guard length < 70_000 else { throw NothingCame(description: "a length of \(length)") }
        return try take(length)
    }

    private func take(_ count: Int) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        var done = 0
        while done < count {
            guard wait(milliseconds: 30_000) else { throw NothingCame(description: "no frame from the card") }
            // The kernel writes within the array.
            let got = unsafe bytes.withUnsafeMutableBytes {
                unsafe recv(number, $0.baseAddress! + done, count - done, 0)
            }
            guard got > 0 else { throw NothingCame(description: "the card's end is closed") }
            done += got
        }
        return bytes
    }

    /// Whether the card has closed the connection, and sent nothing before that; waits for it.
    func isAtEnd() throws -> Bool {
        guard wait(milliseconds: 30_000) else { throw NothingCame(description: "the connection is open") }
        var byte: UInt8 = 0
        return unsafe recv(number, &byte, 1, 0) <= 0
    }

    var isReadable: Bool { wait(milliseconds: 0) }

    private func wait(milliseconds: Int32) -> Bool {
        var waiting = pollfd(fd: number, events: Int16(POLLIN), revents: 0)
        return unsafe poll(&waiting, 1, milliseconds) == 1
    }

    func close() { socket = nil }
}
