// SPDX-License-Identifier: Apache-2.0

@testable import Devices
import Glibc
import GuestMemory
import Linux
import Synchronization
import TestSupport
import Testing
@testable import Virtio

/// A sink that takes as much as the test lets it.
private final class BoundedSink: SerialSink {
    private let state = Guarded((room: Int.max, bytes: [UInt8]()))

    var bytes: [UInt8] { state.withLock { $0.bytes } }
    func setRoom(_ room: Int) { state.withLock { $0.room = room } }

    func take(_ bytes: Span<UInt8>) -> Int {
        var copy: [UInt8] = []
        for index in bytes.indices { copy.append(bytes[index]) }
        return state.withLock { state in
            let taken = min(state.room, copy.count)
            if state.room != .max { state.room -= taken }
            state.bytes += copy[..<taken]
            return taken
        }
    }
}

/// The driver of a virtio console.
private final class ConsoleDriver: QueueDriver {
    private static let receive = 0, transmit = 1

    let device: ConsoleDevice
    let sink: BoundedSink
    let room: EventFD

    init(_ features: FeatureSet = [.version1], inputDelay: Int = 1) throws {
        sink = BoundedSink()
        room = try EventFD()
        let signal = Shared(try room.duplicate())
        device = try ConsoleDevice(name: "con0", sink: sink, onRoom: { signal.event.signal() }, inputDelay: inputDelay)
        try super.init(driving: device, features: features, queues: 2)
    }

    private final class Shared: Sendable {
        let event: EventFD
        init(_ event: consuming EventFD) { self.event = event }
    }

    /// Makes a buffer of output available, in chains of `pieces` descriptors.
    func print(_ bytes: [UInt8], at address: UInt64 = QueueDriver.data, pieces: Int = 1) throws {
        queue = Self.transmit
        try ram.write(bytes, at: GuestAddress(address))
        let length = bytes.count / pieces
        let buffers = (0..<pieces).map { piece in
            Buffer(
                address: address + UInt64(piece * length),
                length: piece == pieces - 1 ? bytes.count - piece * length : length, isWritable: false)
        }
        _ = try offer(buffers)
        kick()
    }

    func waitForPrinted(_ count: Int = 1) throws {
        queue = Self.transmit
        try wait(for: count)
    }

    /// Waits for a buffer as a driver does that polls, and names the place of the next one in the events' field.
    func pollPrinted() throws {
        queue = Self.transmit
        while try !hasUsed() { usleep(10) }
        try takeUsedAndNameTheNext()
    }

    /// Makes a buffer for input available.
    func offerInput(_ length: Int, at address: UInt64 = QueueDriver.data + 0x10_0000) throws -> UInt32 {
        queue = Self.receive
        let head = try offer([Buffer(address: address, length: length, isWritable: true)])
        kick()
        return head
    }

    /// Waits until a buffer has come back, and returns what is in it.
    func input(_ head: UInt32, at address: UInt64 = QueueDriver.data + 0x10_0000) throws -> [UInt8] {
        queue = Self.receive
        try wait(for: 1)
        return try ram.readBytes(at: GuestAddress(address), count: Int(try #require(written[head])))
    }
}

extension [UInt8] {
    fileprivate func ends(with text: String) -> Bool { suffix(text.utf8.count).elementsEqual(text.utf8) }
}

@Suite(.timed) struct ConsoleDeviceTests {
    private static let features: [FeatureSet] = [
        .version1, [.version1, .packedRing], [.version1, .consoleSize],
    ]

    private func bytes(_ count: Int, from first: Int = 0) -> [UInt8] {
        (0..<count).map { UInt8(truncatingIfNeeded: ($0 + first) &* 7 ^ ($0 + first) >> 8) }
    }

    @Test func isAConsoleWithTwoQueues() throws {
        let driver = try ConsoleDriver()
        #expect(driver.read(0x008) == 3)
        for (queue, size) in [(0 as UInt32, 64 as UInt32), (1, 64), (2, 0)] {
            driver.write(0x030, queue)
            #expect(driver.read(0x034) == size)
        }
    }

    @Test(arguments: features) func whatTheGuestPrintsGoesToTheSink(features: FeatureSet) throws {
        let driver = try ConsoleDriver(features)
        try driver.print(Array("hello, ".utf8))
        try driver.waitForPrinted()
        let long = bytes(10_000)
        try driver.print(long, pieces: 3)
        try driver.waitForPrinted()
        // Nothing to print.
        try driver.print([])
        try driver.waitForPrinted()
        #expect(driver.sink.bytes == Array("hello, ".utf8) + long)
        #expect(driver.device.counters.sent.value == UInt64(7 + long.count))
    }

    @Test(arguments: features) func inputGoesToTheDriversBuffers(features: FeatureSet) throws {
        let driver = try ConsoleDriver(features)
        // Before the driver has a buffer, and after.
        let keys = Array("ls -l\r".utf8)
        #expect(driver.device.receive(keys.span) == keys.count)
        #expect(try driver.input(driver.offerInput(4)) == Array(keys[..<4]))
        #expect(try driver.input(driver.offerInput(100)) == Array(keys[4...]))
        let head = try driver.offerInput(100)
        #expect(driver.device.receive(keys.span) == keys.count)
        #expect(try driver.input(head) == keys)
        #expect(driver.device.counters.received.value == 12)
    }

    /// A sink that takes nothing: what there is room for waits in the device, and then buffers do. All of it arrives in
    /// its order once the sink takes it.
    @Test(arguments: features) func aSlowReaderHoldsTheGuestAndLosesNothing(features: FeatureSet) throws {
        let driver = try ConsoleDriver(features)
        driver.sink.setRoom(10)
        let pieces = 5, length = 24 << 10
        for piece in 0..<pieces {
            let place = QueueDriver.data + UInt64(piece * length)
            try driver.print(bytes(length, from: piece * length), at: place)
        }
        // Two fit, and a part of the third.
        try driver.waitForPrinted(2)
        #expect(driver.sink.bytes == bytes(10))
        #expect(try eventually { driver.device.pendingOutput == ConsoleLine.outputCapacity })
        #expect(!driver.device.flush())
        driver.sink.setRoom(.max)
        #expect(try eventually { driver.device.flush() && driver.sink.bytes.count == pieces * length })
        try driver.waitForPrinted(pieces - 2)
        #expect(driver.sink.bytes == bytes(pieces * length))
    }

    /// A driver that is reset, as at a power-off, while its last words wait.
    @Test func aResetKeepsWhatWasPrinted() throws {
        let driver = try ConsoleDriver()
        driver.sink.setRoom(0)
        try driver.print(Array("going down".utf8))
        try driver.waitForPrinted()
        driver.write(0x070, 0)
        #expect(driver.device.pendingOutput == 10)
        driver.sink.setRoom(.max)
        #expect(driver.device.flush())
        #expect(driver.sink.bytes == Array("going down".utf8))
    }

    /// A driver that is being set up may not listen yet. One that prints does.
    @Test func inputWaitsForADriverThatListens() throws {
        let driver = try ConsoleDriver(inputDelay: 3_600_000)
        #expect(driver.device.receive([0x61].span) == 1)
        let head = try driver.offerInput(8)
        // The thread has served the buffer's notification before this request.
        _ = driver.device.flush()
        #expect(driver.device.counters.received.value == 0)
        try driver.print(Array("login: ".utf8))
        #expect(try driver.input(head) == [0x61])
    }

    /// A caller that offers more than there is room for is told when there is some.
    @Test func inputWithoutRoomStaysWithTheCaller() throws {
        let driver = try ConsoleDriver()
        let keys = bytes(10_000)
        var taken = driver.device.receive(keys.span)
        #expect(taken > 0 && taken < keys.count && driver.room.drain() == 0)
        var arrived: [UInt8] = []
        while arrived.count < keys.count {
            arrived += try driver.input(driver.offerInput(512))
            if driver.room.drain() > 0 { taken += driver.device.receive(keys.span.extracting(taken...)) }
        }
        #expect(arrived == keys)
    }

    @Test func theDriverLearnsTheTerminalsSize() throws {
        let driver = try ConsoleDriver([.version1, .consoleSize])
        let before = driver.read(0x0fc)
        driver.transport.irqfd.event.drain()
        driver.device.setSize(TerminalSize(columns: 132, rows: 43))
        #expect(driver.configuration(0, 2) == 132 && driver.configuration(2, 2) == 43)
        #expect(driver.read(0x0fc) != before && driver.read(0x060) & 2 != 0)
        #expect(driver.transport.irqfd.event.drain() == 1)
        // The same again is no change.
        driver.device.setSize(TerminalSize(columns: 132, rows: 43))
        #expect(driver.transport.irqfd.event.drain() == 0)
    }

    @Test func aDriverThatDidNotAskIsNotTold() throws {
        let driver = try ConsoleDriver()
        driver.device.setSize(TerminalSize(columns: 80, rows: 25))
        #expect(driver.read(0x060) & 2 == 0)
    }

    /// §5.3.4: before the driver, and without one.
    @Test func anEmergencyWriteIsACharacter() throws {
        let driver = try ConsoleDriver()
        driver.write(0x070, 0)
        for byte in "panic".utf8 { driver.transport.write(UInt64(byte), at: 0x108, size: 4) }
        // Nothing else in the configuration space can be written.
        driver.transport.write(0x41, at: 0x100, size: 4)
        #expect(driver.sink.bytes == Array("panic".utf8))
    }

    @Test(arguments: features) func aPauseHoldsInputAndOutputBack(features: FeatureSet) throws {
        let driver = try ConsoleDriver(features)
        let quiet = Atomic<Bool>(false)
        driver.device.pause { quiet.store(true, ordering: .releasing) }
        #expect(try eventually { quiet.load(ordering: .acquiring) })
        let head = try driver.offerInput(16)
        try driver.print(Array("later".utf8))
        #expect(driver.device.receive([0x61, 0x62].span) == 2)
        // A request that the thread serves after what came before it.
        _ = driver.device.flush()
        #expect(driver.sink.bytes.isEmpty && driver.device.counters.received.value == 0)
        driver.device.resume()
        try driver.waitForPrinted()
        #expect(try driver.input(head) == [0x61, 0x62])
        #expect(driver.sink.bytes == Array("later".utf8))
    }

    /// A driver that waits for its buffers by polling takes no interrupt for them. One that does not gets it.
    @Test(arguments: [[.version1, .eventIndex], [.version1, .eventIndex, .packedRing]] as [FeatureSet])
    func aDriverThatPollsGetsNoInterrupt(features: FeatureSet) throws {
        let driver = try ConsoleDriver(features)
        driver.transport.irqfd.event.drain()
        let rounds = 20
        for round in 0..<rounds {
            try driver.print(Array("\(round) ".utf8))
            try driver.pollPrinted()
        }
        driver.transport.irqfd.event.drain()
        try driver.print(Array("end".utf8))
        repeat { driver.transport.irqfd.event.wait() } while try !driver.hasUsed()
        #expect(driver.sink.bytes.starts(with: "0 1 2 ".utf8) && driver.sink.bytes.ends(with: "19 end"))
        // The timer may have run out between a buffer's return and the poll, on a machine with other work.
        #expect(driver.transport.function.counters.interrupts.value < UInt64(rounds))
    }

    /// A chain that is read-only has no room for input: it comes back empty, and the input goes to the next.
    @Test func aBufferThatCannotBeWrittenIsReturned() throws {
        let driver = try ConsoleDriver()
        driver.queue = 0
        _ = try driver.offer([.init(address: QueueDriver.data, length: 16, isWritable: false)])
        let head = try driver.offerInput(16)
        #expect(driver.device.receive([0x7a].span) == 1)
        driver.queue = 0
        try driver.wait(for: 2)
        #expect(driver.written[head] == 1)
        #expect(driver.transport.function.counters.errors.value == 1)
    }

    @Test func aChainOutsideOfMemoryNeedsAReset() throws {
        let driver = try ConsoleDriver()
        driver.queue = 1
        _ = try driver.offer([.init(address: 1 << 40, length: 16, isWritable: false)])
        driver.kick()
        #expect(try eventually { driver.read(0x070) & 64 != 0 })
        try driver.start(.version1)
        try driver.print(Array("again".utf8))
        try driver.waitForPrinted()
        #expect(driver.sink.bytes == Array("again".utf8))
    }
}
