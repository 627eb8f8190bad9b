// SPDX-License-Identifier: Apache-2.0

import Glibc
import GuestMemory
import Linux
import TestSupport
import Testing
@testable import Devices
@testable import Virtio

@Suite(.timed) struct VsockDeviceTests {
    static let rings: [FeatureSet] = [.version1, [.version1, .packedRing]]

    private func bytes(_ count: Int, seed: UInt64 = 1) -> [UInt8] {
        var random = SeededGenerator(seed: seed)
        return (0..<count).map { _ in UInt8(truncatingIfNeeded: random.next()) }
    }

    @Test func isASocketDeviceWithThreeQueues() throws {
        let driver = try VsockDriver()
        #expect(driver.read(0x008) == 19)
        for (queue, size) in [(0, 256), (1, 256), (2, 64), (3, 0)] as [(UInt32, UInt32)] {
            driver.write(0x030, queue)
            #expect(driver.read(0x034) == size)
        }
        #expect(driver.configuration(0, 8) == 3)
        driver.write(0x014, 0)
        #expect(driver.read(0x010) & 3 == 1)
    }

    // MARK: Connections of the guest

    @Test(arguments: rings) func theGuestConnectsToASocketOfItsPort(_ features: FeatureSet) throws {
        let driver = try VsockDriver(features)
        try driver.provide(8)
        let listener = try driver.listen(5000)
        let socket = try driver.connect(1024, to: 5000, listener)
        let out = bytes(10_000), back = bytes(20_000, seed: 2)
        try driver.send(.data, port: 1024, to: 5000, out)
        #expect(socket.read(out.count) == out)
        try socket.write(back)
        #expect(try driver.receive(back.count, port: 1024) == back)
        let counters = driver.device.counters
        #expect(counters.sentBytes.value == 10_000 && counters.receivedBytes.value == 20_000)
        #expect(counters.guestConnections.value == 1 && counters.connections == 1)
        // The guest closes it: the answer to a full shutdown is a reset.
        try driver.send(.shutdown, port: 1024, to: 5000, flags: 3)
        #expect(try driver.next().operation == .reset)
        #expect(socket.isAtEnd)
        #expect(counters.connections == 0 && counters.badPackets.value == 0)
    }

    @Test func aPortWithoutAListenerIsRefused() throws {
        let driver = try VsockDriver()
        try driver.provide(2)
        try driver.send(.request, port: 1, to: 99)
        let answer = try driver.next()
        #expect(answer.operation == .reset)
        #expect(answer.header.source == 2 && answer.header.destination == 3)
        #expect(answer.header.sourcePort == 99 && answer.header.destinationPort == 1)
        #expect(driver.device.counters.guestRefusals.value == 1)
        // A socket without a listener, too.
        let path = "\(driver.directory.vsock)_98"
        try HostSocket.listening(path).end()
        try driver.send(.request, port: 1, to: 98)
        #expect(try driver.next().operation == .reset)
        #expect(driver.lines.all.isEmpty)
    }

    @Test func aFullBacklogIsWaitedFor() throws {
        let driver = try VsockDriver()
        try driver.provide(4)
        let listener = try driver.listen(7, backlog: 0)
        // The first one fills the backlog; the second one is connected when that is accepted.
        _ = try HostSocket.connected("\(driver.directory.vsock)_7")
        try driver.send(.request, port: 10, to: 7)
        let other = try driver.listen(8)
        let second = try driver.connect(10, to: 8, other)
        _ = try listener.accept()
        #expect(try driver.next().operation == .response)
        withExtendedLifetime(second) {}
        _ = try listener.accept()
    }

    @Test func aSecondRequestForAConnectionEndsIt() throws {
        let driver = try VsockDriver()
        try driver.provide(4)
        let listener = try driver.listen(7)
        let socket = try driver.connect(10, to: 7, listener)
        try driver.send(.request, port: 10, to: 7)
        #expect(try driver.next().operation == .reset)
        #expect(socket.isAtEnd)
        _ = try driver.connect(10, to: 7, listener)
    }

    // MARK: Connections of the host

    @Test(arguments: rings) func theHostConnectsToAPortOfTheGuest(_ features: FeatureSet) throws {
        let driver = try VsockDriver(features)
        try driver.provide(4)
        var sockets: [HostSocket] = []
        for number in 0..<3 as Range<UInt32> {
            let socket = try HostSocket.connected(driver.directory.vsock)
            sockets.append(socket)
            // What follows the line is the guest's.
            try socket.write("CONNECT 52\nhello")
            let request = try driver.next()
            #expect(request.operation == .request && request.header.destinationPort == 52)
            #expect(request.header.source == 2 && request.header.destination == 3)
            let port = request.header.sourcePort
            #expect(port == 1_073_741_824 + number)
            #expect(socket.isQuiet)
            try driver.send(.response, port: 52, to: port)
            #expect(socket.read(14) == Array("OK \(port)\n".utf8))
            #expect(try driver.receive(5, port: 52) == Array("hello".utf8))
            try driver.send(.data, port: 52, to: port, Array("answer".utf8))
            #expect(socket.read(6) == Array("answer".utf8))
        }
        #expect(driver.device.counters.hostConnections.value == 3)
    }

    @Test func aRefusalIsAnEndWithoutBytes() throws {
        let driver = try VsockDriver()
        try driver.provide(2)
        let socket = try HostSocket.connected(driver.directory.vsock)
        try socket.write("CONNECT 52\n")
        let port = try driver.next().header.sourcePort
        try driver.send(.reset, port: 52, to: port)
        #expect(socket.isAtEnd)
        #expect(driver.device.counters.hostRefusals.value == 1)
    }

    @Test func aClientThatGivesUpIsReportedToTheGuest() throws {
        let driver = try VsockDriver()
        try driver.provide(2)
        let socket = try HostSocket.connected(driver.directory.vsock)
        try socket.write("CONNECT 52\n")
        let port = try driver.next().header.sourcePort
        socket.end()
        let reset = try driver.next()
        #expect(reset.operation == .reset && reset.header.sourcePort == port)
    }

    @Test(arguments: [
        "HELLO 52\n", "CONNECT\n", "CONNECT x\n", "CONNECT 4294967296\n", "\n", String(repeating: "C", count: 32),
    ])
    func aClientThatSendsSomethingElseIsClosed(_ line: String) throws {
        let driver = try VsockDriver()
        let socket = try HostSocket.connected(driver.directory.vsock)
        try socket.write(line)
        #expect(socket.isAtEnd)
        #expect(driver.device.counters.hostRefusals.value == 1)
    }

    @Test func aLineMayComeInParts() throws {
        let driver = try VsockDriver()
        try driver.provide(1)
        let socket = try HostSocket.connected(driver.directory.vsock)
        for part in ["con", "nect  ", "5", "2\r\n"] {
            try socket.write(part)
            usleep(2_000)
        }
        #expect(try driver.next().header.destinationPort == 52)
    }

    @Test(arguments: [
        ("CONNECT 1\n", VsockCommand.connect(port: 1, length: 10)),
        ("connect 1\nmore", .connect(port: 1, length: 10)),
        ("cOnNeCt   4294967295 x y\n", .connect(port: .max, length: 25)),
        ("CONNECT 5\r\n", .connect(port: 5, length: 11)),
        ("CONNECT 5", .incomplete), ("", .incomplete), ("CONNECT5\n", .invalid), ("CONNECT 5x\n", .invalid),
        ("CONNECT -5\n", .invalid), ("CONNECT 99999999999\n", .invalid), ("CONNECTED 5\n", .invalid),
    ])
    func linesAreParsed(_ line: String, _ expected: VsockCommand) {
        let bytes = Array(line.utf8)
        #expect(VsockCommand(bytes.span) == expected)
    }

    // MARK: Ends

    @Test func theGuestClosesItsSendingSide() throws {
        let driver = try VsockDriver()
        try driver.provide(8)
        let socket = try driver.connect(10, to: 7, try driver.listen(7))
        try driver.send(.data, port: 10, to: 7, [1, 2, 3])
        try driver.send(.shutdown, port: 10, to: 7, flags: 2)
        #expect(socket.read(10) == [1, 2, 3])
        // The other direction goes on.
        try socket.write("still here")
        #expect(try driver.receive(10, port: 10) == Array("still here".utf8))
        socket.end()
        let end = try driver.next()
        #expect(end.operation == .shutdown && end.header.flags == 3)
        // What is sent after a shutdown is against the rules.
        try driver.send(.data, port: 10, to: 7, [4])
        #expect(try driver.next().operation == .reset)
    }

    @Test func theHostClosesItsSendingSide() throws {
        let driver = try VsockDriver()
        try driver.provide(8)
        let socket = try driver.connect(10, to: 7, try driver.listen(7))
        try socket.write(bytes(9_000))
        socket.endSending()
        #expect(try driver.receive(9_000, port: 10) == bytes(9_000))
        let end = try driver.next()
        #expect(end.operation == .shutdown && end.header.flags == 2)
        try driver.send(.data, port: 10, to: 7, [7])
        #expect(socket.read(1) == [7])
        socket.end()
        let close = try driver.next()
        #expect(close.operation == .shutdown && close.header.flags == 3)
        try driver.send(.reset, port: 10, to: 7)
        #expect(driver.device.counters.connections == 0)
    }

    @Test func dataThatCameBeforeTheEndIsDelivered() throws {
        let driver = try VsockDriver()
        let listener = try driver.listen(7)
        try driver.provide(1)
        try driver.send(.request, port: 10, to: 7)
        #expect(try driver.next(replacing: false).operation == .response)
        let socket = try listener.accept()
        // There is no buffer for any of it yet.
        try socket.write(bytes(30_000))
        socket.end()
        try driver.provide(6)
        #expect(try driver.receive(30_000, port: 10) == bytes(30_000))
        let end = try driver.next()
        #expect(end.operation == .shutdown && end.header.flags == 3)
    }

    @Test func aConnectionWhosePeerIsGoneIsReset() throws {
        let driver = try VsockDriver()
        try driver.provide(4)
        let socket = try driver.connect(10, to: 7, try driver.listen(7))
        socket.end()
        #expect(try driver.next().operation == .shutdown)
        try driver.send(.data, port: 10, to: 7, [1])
        #expect(try driver.next().operation == .reset)
    }

    // MARK: Life

    @Test func aResetEndsAllConnectionsAndKeepsTheSockets() throws {
        let driver = try VsockDriver()
        try driver.provide(4)
        let listener = try driver.listen(7)
        let socket = try driver.connect(10, to: 7, listener)
        driver.write(0x070, 0)
        #expect(socket.isAtEnd)
        // A client that comes without a driver is answered by the next one.
        let client = try HostSocket.connected(driver.directory.vsock)
        try client.write("CONNECT 1\n")
        try driver.restart()
        try driver.provide(2)
        #expect(try driver.next().operation == .request)
        _ = try driver.connect(10, to: 7, listener)
        #expect(driver.device.counters.connections == 1)
    }

    @Test func aPauseHoldsEverythingBack() throws {
        let driver = try VsockDriver()
        try driver.provide(8)
        let listener = try driver.listen(7)
        let socket = try driver.connect(10, to: 7, listener)
        let isQuiet = Guarded(false)
        driver.device.pause { isQuiet.withLock { $0 = true } }
        try wait { isQuiet.withLock { $0 } }
        let client = try HostSocket.connected(driver.directory.vsock)
        try client.write("CONNECT 1\n")
        try socket.write("later")
        usleep(20_000)
        driver.queue = VsockDriver.receive
        #expect(try driver.usedCount() == 0)
        driver.device.resume()
        let packets = [try driver.next(), try driver.next()]
        #expect(Set(packets.map(\.operation)) == [.data, .request])
        try driver.send(.data, port: 10, to: 7, [1])
        #expect(socket.read(1) == [1])
    }

    @Test(arguments: rings) func aTransportResetIsAnEvent(_ features: FeatureSet) throws {
        let driver = try VsockDriver(features)
        try driver.provide(8)
        let socket = try driver.connect(10, to: 7, try driver.listen(7))
        let client = try HostSocket.connected(driver.directory.vsock)
        let head = try driver.offerEvent()
        driver.device.resetTransport()
        driver.queue = VsockDriver.event
        try driver.wait(for: 1)
        #expect(driver.written[head] == 4)
        #expect(try driver.event() == 0)
        #expect(socket.isAtEnd && driver.device.counters.connections == 0)
        // The listening socket stays.
        _ = client
        let next = try HostSocket.connected(driver.directory.vsock)
        try next.write("CONNECT 1\n")
        #expect(try driver.next().operation == .request)
        // Without a buffer, or with one that is too short, it comes as soon as there is one.
        _ = try driver.offerEvent(3)
        driver.device.resetTransport()
        driver.queue = VsockDriver.event
        try driver.wait(for: 1)
        #expect(try driver.ram.readUInt32(at: GuestAddress(0x70_0000)) == 0xeeee_eeee)
        _ = try driver.offerEvent()
        driver.kick()
        try driver.wait(for: 1)
        #expect(try driver.event() == 0)
    }

    @Test func aTransportResetInAPauseIsReportedAfterwards() throws {
        let driver = try VsockDriver()
        let isQuiet = Guarded(false)
        driver.device.pause { isQuiet.withLock { $0 = true } }
        try wait { isQuiet.withLock { $0 } }
        _ = try driver.offerEvent()
        driver.device.resetTransport()
        usleep(10_000)
        driver.queue = VsockDriver.event
        #expect(try driver.usedCount() == 0)
        driver.device.resume()
        try driver.wait(for: 1)
    }

    @Test func aQueueIsResetAlone() throws {
        let driver = try VsockDriver([.version1, .ringReset])
        try driver.provide(2)
        let socket = try driver.connect(10, to: 7, try driver.listen(7))
        driver.queue = VsockDriver.transmit
        driver.write(0x030, 1)
        driver.write(0x0c0, 1)
        try driver.setUp()
        try driver.send(.data, port: 10, to: 7, [9])
        #expect(socket.read(1) == [9])
    }
}
