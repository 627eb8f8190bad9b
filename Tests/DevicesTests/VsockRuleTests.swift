// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import GuestMemory
import Linux
import TestSupport
import Testing
@testable import Devices
@testable import Virtio

/// Credit, many streams, and drivers that break the rules.
@Suite(.timed) struct VsockRuleTests {
    private func bytes(_ count: Int, seed: UInt64 = 1) -> [UInt8] {
        var random = SeededGenerator(seed: seed)
        return (0..<count).map { _ in UInt8(truncatingIfNeeded: random.next()) }
    }

    // MARK: Credit

    @Test func aPeerThatDoesNotReadFillsTheCredit() throws {
        let driver = try VsockDriver()
        try driver.provide(8)
        let listener = try driver.listen(7)
        let socket = try driver.connect(10, to: 7, listener)
        // The driver counts as the device does: it sends no more than there is room for.
        let piece = bytes(32 << 10)
        var sent = 0, seen = UInt32(0)
        driver.queue = VsockDriver.receive
        while sent - Int(seen) + piece.count <= VsockTable.bufferSize {
            try driver.send(.data, port: 10, to: 7, piece)
            sent += piece.count
            while try driver.hasPacket {
                let packet = try driver.next()
                #expect(packet.operation == .creditUpdate)
                seen = packet.header.forwarded
            }
        }
        #expect(sent > VsockTable.bufferSize)
        // Another connection is not affected.
        let other = try driver.connect(11, to: 7, listener)
        try driver.send(.data, port: 11, to: 7, [1])
        #expect(other.read(1) == [1])
        let count = sent / piece.count
        for _ in 0..<count { #expect(socket.read(piece.count) == piece) }
        while seen != UInt32(sent) {
            let packet = try driver.next()
            #expect(packet.operation == .creditUpdate)
            // What is left is less than a step.
            seen = packet.header.forwarded
            if UInt32(sent) - seen < VsockConnections.updateStep { break }
        }
        try driver.send(.creditRequest, port: 10, to: 7)
        let answer = try driver.next()
        #expect(answer.operation == .creditUpdate && answer.header.forwarded == UInt32(sent))
        #expect(driver.device.counters.creditViolations.value == 0)
    }

    @Test func whoSendsMoreThanItsCreditIsReset() throws {
        let driver = try VsockDriver()
        try driver.provide(30)
        let socket = try driver.connect(10, to: 7, try driver.listen(7))
        let piece = bytes(64 << 10)
        var packet: VsockPacket?
        for _ in 0..<40 where packet?.operation != .reset {
            try driver.send(.data, port: 10, to: 7, piece)
            while try driver.hasPacket {
                packet = try driver.next()
            }
        }
        #expect(packet?.operation == .reset)
        #expect(driver.device.counters.creditViolations.value == 1)
        #expect(driver.lines.all.count == 1)
        // What the socket had taken is read before the end.
        #expect(socket.read(1) == [piece[0]])
        try driver.send(.data, port: 10, to: 7, [1])
        #expect(try driver.next().operation == .reset)
    }

    @Test func theDeviceSendsNoMoreThanItsCredit() throws {
        let driver = try VsockDriver()
        driver.window = 100
        try driver.provide(8)
        let socket = try driver.connect(10, to: 7, try driver.listen(7))
        let data = bytes(250)
        try socket.write(data)
        #expect(try driver.receive(100, port: 10) == Array(data[..<100]))
        #expect(try driver.next().operation == .creditRequest)
        try driver.send(.creditUpdate, port: 10, to: 7, forwarded: 100)
        #expect(try driver.receive(100, port: 10) == Array(data[100..<200]))
        #expect(try driver.next().operation == .creditRequest)
        // An older figure, as of a packet that was overtaken, changes nothing.
        try driver.send(.creditUpdate, port: 10, to: 7, forwarded: 50)
        try driver.send(.creditUpdate, port: 10, to: 7, forwarded: 160)
        #expect(try driver.receive(50, port: 10) == Array(data[200...]))
    }

    @Test func aWindowOfNothingStopsTheFlow() throws {
        let driver = try VsockDriver()
        driver.window = 0
        try driver.provide(4)
        let socket = try driver.connect(10, to: 7, try driver.listen(7))
        try socket.write("x")
        #expect(try driver.next().operation == .creditRequest)
        driver.window = 10
        try driver.send(.creditUpdate, port: 10, to: 7)
        #expect(try driver.receive(1, port: 10) == Array("x".utf8))
    }

    @Test func whoConfirmsWhatWasNotSentIsReset() throws {
        let driver = try VsockDriver()
        try driver.provide(4)
        let socket = try driver.connect(10, to: 7, try driver.listen(7))
        try driver.send(.creditUpdate, port: 10, to: 7, forwarded: 1)
        #expect(try driver.next().operation == .reset)
        #expect(socket.isAtEnd && driver.device.counters.creditViolations.value == 1)
    }

    // MARK: Many streams

    @Test func aFloodLeavesRoomForOthers() throws {
        let driver = try VsockDriver()
        try driver.provide(8)
        let listener = try driver.listen(7)
        let sockets = try (0..<20).map { try driver.connect(UInt32(100 + $0), to: 7, listener) }
        // The first one has more than anybody else; packets of all others come within one round.
        try sockets[0].write(bytes(150_000))
        _ = try driver.next()
        for socket in sockets[1...] { try socket.write("y") }
        var others: Set<UInt32> = []
        var flood = 0
        while others.count < 19 {
            let packet = try driver.next()
            if packet.header.destinationPort == 100 {
                flood += packet.data.count
            } else {
                others.insert(packet.header.destinationPort)
            }
        }
        #expect(flood < 150_000)
    }

    @Test func buffersOfAnyShapeAreUsed() throws {
        let driver = try VsockDriver()
        try driver.provide(1)
        let socket = try driver.connect(10, to: 7, try driver.listen(7))
        // One of a byte, one of none, one that is too short for a header, one of many bytes. One of ours is there.
        for size in [45, 44, 20, 8000] { try driver.offerBuffers(1, size: size) }
        let data = bytes(4096 + 1 + 7956)
        try socket.write(data)
        driver.queue = VsockDriver.receive
        driver.kick()
        #expect(try driver.next(replacing: false).data == Array(data[..<4096]))
        #expect(try driver.next(replacing: false).data == [data[4096]])
        // The two in the middle come back unused.
        try wait { driver.device.counters.receivedBytes.value == UInt64(data.count) }
        #expect(driver.device.counters.badReceiveBuffers.value == 2)
        #expect(driver.device.counters.receivedBytes.value == UInt64(data.count))
    }

    // MARK: Packets against the rules

    private static let wrong: [@Sendable (inout VsockHeader) -> Void] = [
        { $0.type = 2 }, { $0.type = 0 }, { $0.destination = 1 }, { $0.destination = 2 << 32 | 2 }, { $0.source = 4 },
        { $0.operation = 0 }, { $0.operation = 8 }, { $0.operation = 2 },
    ]

    @Test(arguments: wrong.indices) func aPacketThatMakesNoSenseIsReset(_ index: Int) throws {
        let driver = try VsockDriver()
        try driver.provide(4)
        let socket = try driver.connect(10, to: 7, try driver.listen(7))
        var header = driver.header(.data, port: 10, to: 7)
        Self.wrong[index](&header)
        try driver.send(header, [1])
        let answer = try driver.next()
        #expect(answer.operation == .reset)
        #expect(answer.header.source == header.destination && answer.header.destination == 3)
        #expect(answer.header.sourcePort == 7 && answer.header.destinationPort == 10)
        #expect(driver.device.counters.badPackets.value == 1)
        // A wrong address is nobody's connection.
        if index >= 5 { #expect(socket.isAtEnd) } else { #expect(socket.isQuiet) }
    }

    @Test func resetsAreNotAnswered() throws {
        let driver = try VsockDriver()
        try driver.provide(2)
        try driver.send(.reset, port: 1, to: 2)
        var header = driver.header(.reset, port: 1, to: 2)
        header.type = 9
        try driver.send(header)
        try driver.send(.data, port: 5, to: 6, [1])
        let answer = try driver.next()
        #expect(answer.operation == .reset && answer.header.sourcePort == 6)
    }

    @Test func packetsThatAreCutAreReset() throws {
        let driver = try VsockDriver()
        try driver.provide(4)
        let socket = try driver.connect(10, to: 7, try driver.listen(7))
        // Nothing can be answered to half a header.
        try driver.send(raw: [UInt8](repeating: 0xff, count: 43))
        var header = driver.header(.data, port: 10, to: 7)
        header.length = 5
        // More bytes than the length: those behind it are not the packet's.
        try driver.send(header, [1, 2, 3, 4, 5, 6])
        #expect(socket.read(5) == [1, 2, 3, 4, 5])
        header.length = .max
        try driver.send(header, [7])
        #expect(try driver.next().operation == .reset)
        #expect(socket.isAtEnd && driver.device.counters.badPackets.value == 2)
    }

    @Test func answersWithoutBuffersHoldTheSenderBack() throws {
        let driver = try VsockDriver()
        // Each packet causes a reset, and there is nowhere to put them: at some time the device takes no more.
        driver.queue = VsockDriver.transmit
        let header = VsockDriver.bytes(driver.header(.data, port: 1, to: 2))
        try driver.ram.write(header, at: GuestAddress(0x80_0000))
        var sent = 0
        while sent < 1024 {
            _ = try driver.offer([.init(address: 0x80_0000, length: 44, isWritable: false)])
            driver.kick()
            try driver.wait(for: 1)
            sent += 1
        }
        for _ in 0..<3 { _ = try driver.offer([.init(address: 0x80_0000, length: 44, isWritable: false)]) }
        driver.kick()
        usleep(20_000)
        #expect(try driver.usedCount() == 0)
        try driver.provide(8)
        for _ in 0..<20 { #expect(try driver.next().operation == .reset) }
        driver.queue = VsockDriver.transmit
        try driver.wait(for: 3)
    }

    @Test func aBufferOutsideRAMStopsTheDeviceUntilItsReset() throws {
        let driver = try VsockDriver()
        try driver.provide(2)
        let socket = try driver.connect(10, to: 7, try driver.listen(7))
        driver.queue = VsockDriver.transmit
        _ = try driver.offer([.init(address: 15 << 20, length: 2 << 20, isWritable: false)])
        driver.kick()
        while driver.read(0x070) & 64 == 0 { driver.transport.irqfd.event.wait() }
        #expect(socket.isAtEnd)
        try driver.restart()
        try driver.provide(2)
        _ = try driver.connect(10, to: 8, try driver.listen(8))
    }

    // MARK: A hostile guest

    @Test(arguments: [FeatureSet.transport, [.transport, .packedRing]])
    func aGuestThatRewritesPacketsUnderItsEyes(_ features: FeatureSet) throws {
        // The good driver does not name the events that it waits for.
        let driver = try VsockDriver(features.subtracting(.eventIndex))
        let listener = try driver.listen(7), number = listener.number
        _ = clinux_fcntl_value(number, F_SETFL, Int(O_NONBLOCK))
        let path = driver.directory.vsock
        let guest = HostileGuest(
            driver.transport, ram: driver.ram, sizes: [64, 64, 64], features: features.union(driver.device.features)
        ) { queue, random in
            guard queue == VsockDriver.transmit else { return [] }
            var header = VsockHeader(
                .request, from: random.chance(95) ? 3 : random.next(), port: UInt32(random.below(8)),
                to: random.chance(95) ? 2 : random.next(),
                port: random.chance(70) ? 7 : 1_073_741_824 + UInt32(random.below(4)))
            header.operation = UInt16(random.chance(95) ? random.below(8) : random.next() & 0xffff)
            header.length = random.chance(80) ? UInt32(random.below(600)) : UInt32(truncatingIfNeeded: random.next())
            if random.chance(3) { header.type = UInt16(truncatingIfNeeded: random.next()) }
            header.flags = UInt32(random.below(5))
            header.bufferSize = random.chance(70) ? 4096 : UInt32(truncatingIfNeeded: random.next())
            header.forwarded = random.chance(80) ? 0 : UInt32(truncatingIfNeeded: random.next())
            return VsockDriver.bytes(header)
        }
        let counters = driver.device.counters
        let end = Guarded<[Int32]>([])
        try guest.attack(rounds: 40, served: { [counters.badPackets.value] }) { random in
            // The host's side: peers that come, send, read or leave.
            end.withLock { sockets in
                if sockets.count < 8, random.chance(20), let socket = HostSocket.connectedNow(path) {
                    sockets.append(dup(socket.number))
                    socket.send("CONNECT \(random.below(8))\n")
                }
                let accepted = random.chance(20) ? clinux_accept_nonblocking(number) : -1
                if accepted >= 0 { sockets.append(accepted) }
                guard !sockets.isEmpty else { return }
                let index = Int(random.below(UInt64(sockets.count)))
                var room = [UInt8](repeating: 7, count: 3000)
                switch random.below(4) {
                case 0: _ = recv(sockets[index], &room, room.count, Int32(MSG_DONTWAIT))
                case 1: _ = send(sockets[index], room, room.count, Int32(MSG_DONTWAIT | MSG_NOSIGNAL))
                case 2: if random.chance(20) { shutdown(sockets[index], Int32(random.below(3))) }
                default: if random.chance(30) { close(sockets.remove(at: index)) }
                }
            }
        }
        end.withLock { for socket in $0 { close(socket) } }
        // It comes back with a reset and serves a good driver. The backlog has old connections.
        try driver.restart()
        try driver.provide(4)
        let other = try driver.listen(8)
        let socket = try driver.connect(10, to: 8, other)
        try driver.send(.data, port: 10, to: 8, [1, 2])
        #expect(socket.read(2) == [1, 2], "seed \(guest.seed)")
    }
}
