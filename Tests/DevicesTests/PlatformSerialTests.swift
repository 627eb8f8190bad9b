// SPDX-License-Identifier: Apache-2.0

@testable import Devices
import Glibc
import Linux
import Synchronization
import TestSupport
import Testing

/// A sink that takes as much as the test lets it.
private final class TestSink: SerialSink {
    private struct State {
        var room = Int.max
        var bytes: [UInt8] = []
        var calls = 0
    }
    private let state = Guarded(State())

    var text: String { state.withLock { String(decoding: $0.bytes, as: UTF8.self) } }
    var bytes: [UInt8] { state.withLock { $0.bytes } }
    var calls: Int { state.withLock { $0.calls } }
    func setRoom(_ room: Int) { state.withLock { $0.room = room } }

    func take(_ bytes: Span<UInt8>) -> Int {
        var copy: [UInt8] = []
        for index in bytes.indices { copy.append(bytes[index]) }
        return state.withLock { state in
            let taken = min(state.room, copy.count)
            state.room -= state.room == .max ? 0 : taken
            state.bytes += copy[..<taken]
            state.calls += 1
            return taken
        }
    }
}

private final class Counter: Sendable {
    private let value = Atomic<Int>(0)
    var count: Int { value.load(ordering: .sequentiallyConsistent) }
    func add() { value.add(1, ordering: .sequentiallyConsistent) }
    /// The count since the last call.
    func take() -> Int { value.exchange(0, ordering: .sequentiallyConsistent) }
}

/// The port with a driver's view of it.
private struct Bench: Sendable {
    let sink = TestSink()
    let interrupts = Counter()
    let rooms = Counter()
    let port: SerialPort

    init() {
        let (interrupts, rooms) = (interrupts, rooms)
        port = SerialPort(sink: sink, interrupt: { interrupts.add() }, onRoom: { rooms.add() })
    }

    func read(_ offset: UInt16) -> UInt8 { UInt8(truncatingIfNeeded: port.read(offset, size: 1)) }
    func write(_ offset: UInt16, _ value: UInt8) { port.write(offset, size: 1, value: UInt32(value)) }
    func send(_ text: String) { for byte in text.utf8 { write(0, byte) } }
    func receive(_ bytes: [UInt8]) -> Int { port.receive(bytes.span) }
    func readAll() -> [UInt8] {
        var bytes: [UInt8] = []
        while read(5) & 1 != 0 { bytes.append(read(0)) }
        return bytes
    }
}

@Suite(.timed) struct PlatformSerialTests {
    private let data: UInt16 = 0, interruptEnable: UInt16 = 1, identity: UInt16 = 2, lineControl: UInt16 = 3
    private let modemControl: UInt16 = 4, lineStatus: UInt16 = 5, modemStatus: UInt16 = 6, scratch: UInt16 = 7

    @Test func isFoundBy8250Probes() {
        let bench = Bench()
        // Scratch register, interrupt enable's upper bits, the FIFOs' announcement.
        bench.write(scratch, 0x5a)
        #expect(bench.read(scratch) == 0x5a)
        bench.write(interruptEnable, 0xff)
        #expect(bench.read(interruptEnable) == 0x0f)
        bench.write(interruptEnable, 0)
        bench.write(identity, 0x01)
        #expect(bench.read(identity) >> 6 == 3)
        bench.write(identity, 0x00)
        #expect(bench.read(identity) >> 6 == 0)
        // The divisor is behind DLAB, and the registers it covers keep their values.
        bench.write(interruptEnable, 0x05)
        bench.write(lineControl, 0x83)
        bench.write(data, 0x0c)
        bench.write(interruptEnable, 0x01)
        #expect(bench.read(data) == 0x0c && bench.read(interruptEnable) == 0x01)
        bench.write(lineControl, 0x03)
        #expect(bench.read(interruptEnable) == 0x05 && bench.read(lineControl) == 0x03)
        #expect(bench.sink.bytes.isEmpty)
        #expect(bench.read(lineStatus) == 0x60 && bench.read(modemStatus) == 0xb0)
    }

    @Test func sendsInOrder() {
        let bench = Bench()
        bench.send("hello, ")
        let text = Array("world".utf8)
        bench.port.write(0, size: 1, string: text.span)
        bench.send("\n")
        #expect(bench.sink.text == "hello, world\n")
        // A string is one call.
        #expect(bench.sink.calls == 7 + 1 + 1)
        #expect(bench.port.pendingOutput == 0)
    }

    /// Two CPUs send, a third reads what comes in, and the loop of the main thread flushes and feeds: no byte is lost
    /// or overtakes another of its sender.
    @Test func severalCPUsUseItAtOnce() throws {
        let bench = Bench(), count = 4000
        func sender(_ number: UInt8) throws -> Linux.Thread {
            try .start(name: "sender") {
                for index in 0..<count {
                    while bench.read(lineStatus) & 0x20 == 0 { Linux.Thread.yield() }
                    bench.write(data, number << 7 | UInt8(index & 0x7f))
                }
            }
        }
        final class Received: Sendable { let bytes = Guarded<[UInt8]>([]) }
        let received = Received()
        let first = try sender(0), second = try sender(1)
        let reader = try Linux.Thread.start(name: "reader") {
            while received.bytes.withLock({ $0.count }) < count {
                guard bench.read(lineStatus) & 1 != 0 else { Linux.Thread.yield(); continue }
                let byte = bench.read(data)
                received.bytes.withLock { $0.append(byte) }
            }
        }
        let input = (0..<count).map { UInt8(truncatingIfNeeded: $0 &* 7) }
        var rest = input[...], round = 0
        while !rest.isEmpty {
            rest = rest.dropFirst(bench.receive(Array(rest.prefix(100))))
            bench.sink.setRoom(round % 2 == 0 ? 3 : .max)
            _ = bench.port.flush()
            round += 1
        }
        // Nothing that a sender waits for may be left to do.
        bench.sink.setRoom(.max)
        _ = bench.port.flush()
        first.join()
        second.join()
        reader.join()
        #expect(received.bytes.withLock { $0 } == input)
        bench.sink.setRoom(.max)
        #expect(bench.port.flush() && bench.port.droppedOutput == 0)
        for sender in 0..<2 as Range<UInt8> {
            #expect(
                bench.sink.bytes.filter { $0 >> 7 == sender }.map { Int($0 & 0x7f) } == (0..<count).map { $0 & 0x7f })
        }
    }

    @Test func interruptsOnceForEachTimeTheTransmitterBecomesEmpty() {
        let bench = Bench()
        bench.write(identity, 0x01)
        // Switching it on with the transmitter empty is an interrupt already.
        bench.write(interruptEnable, 0x02)
        #expect(bench.interrupts.take() == 1)
        #expect(bench.read(identity) == 0xc2)
        // Reading it took it back.
        #expect(bench.read(identity) == 0xc1)
        bench.send("0123456789abcdef")
        #expect(bench.interrupts.take() == 1)
        #expect(bench.read(identity) == 0xc2)
        // Nothing sent, nothing to report.
        #expect(bench.read(identity) == 0xc1)
        #expect(bench.interrupts.take() == 0)
        bench.write(interruptEnable, 0x00)
        bench.send("x")
        #expect(bench.interrupts.take() == 0)
        // Still pending when it is switched on again.
        bench.write(interruptEnable, 0x02)
        #expect(bench.interrupts.take() == 1)
    }

    @Test func holdsTheDriverBackWhenTheSinkIsFull() {
        let bench = Bench()
        bench.write(interruptEnable, 0x02)
        _ = bench.read(identity)
        _ = bench.interrupts.take()
        bench.sink.setRoom(3)
        var sent: [UInt8] = []
        // A driver that looks at THRE before each byte.
        while bench.read(lineStatus) & 0x20 != 0 {
            let byte = UInt8(truncatingIfNeeded: sent.count)
            bench.write(data, byte)
            sent.append(byte)
            guard sent.count < 100_000 else { break }
        }
        #expect(sent.count < 100_000, "the transmitter never ran full")
        #expect(bench.port.pendingOutput == sent.count - 3)
        #expect(bench.port.droppedOutput == 0)
        #expect(bench.read(lineStatus) & 0x60 == 0)
        // What it reported before it ran full is one interrupt; being full takes that back.
        #expect(bench.read(identity) & 0x0f == 0x01)
        _ = bench.interrupts.take()
        // A driver that looked just before sends a page in one instruction: there is room.
        let page = [UInt8](repeating: 0x2e, count: 4095)
        bench.port.write(0, size: 1, string: page.span)
        #expect(bench.port.droppedOutput == 0)
        // Some room brings it on, and the interrupt; all of it the "shift register is empty".
        bench.sink.setRoom(8000)
        #expect(!bench.port.flush())
        #expect(bench.interrupts.take() == 1)
        #expect(bench.read(identity) & 0x0f == 0x02)
        #expect(bench.read(lineStatus) & 0x60 == 0x20)
        bench.sink.setRoom(.max)
        #expect(bench.port.flush())
        #expect(bench.read(lineStatus) & 0x60 == 0x60)
        #expect(bench.sink.bytes == sent + page)
    }

    @Test func countsWhatADriverLosesThatIgnoresTheStatus() {
        let bench = Bench()
        bench.sink.setRoom(0)
        let burst = [UInt8](repeating: 1, count: SerialPort.ringCapacity + 10)
        bench.port.write(0, size: 1, string: burst.span)
        #expect(bench.port.pendingOutput == SerialPort.ringCapacity)
        #expect(bench.port.droppedOutput == 10)
    }

    @Test func receivesSixteenBytesAtATimeAndLosesNone() {
        let bench = Bench()
        bench.write(identity, 0xc1)
        bench.write(interruptEnable, 0x01)
        let input = (0..<100).map { UInt8($0) }
        var offered = bench.receive(input)
        #expect(offered == 16)
        #expect(bench.interrupts.take() == 1)
        #expect(bench.receive([99]) == 0)
        #expect(bench.read(identity) == 0xc4)
        var read: [UInt8] = []
        while read.count < input.count {
            let rooms = bench.rooms.count
            #expect(bench.read(lineStatus) & 0x03 == 0x01)
            read.append(bench.read(data))
            // The console offers the rest when it is notified.
            if bench.rooms.count > rooms { offered += bench.receive(Array(input[offered...])) }
        }
        #expect(read == input)
        #expect(bench.read(lineStatus) & 1 == 0)
        #expect(bench.read(identity) == 0xc1)
        // Six refusals, each told once; the seventh piece went in whole.
        #expect(bench.rooms.count == 6)
        #expect(bench.interrupts.take() == 6)
    }

    /// Keys that are typed while the guest starts come after its driver has set the port up, which empties the FIFO.
    @Test(arguments: [
        [(2, 0x07)], [(1, 0x01)], [(2, 0x00), (2, 0x01)], [(3, 0x80), (0, 0x01), (3, 0x03), (1, 0x00), (2, 0x07)],
    ])
    func keepsInputUntilTheDriverIsThere(setUp: [(register: UInt16, value: UInt8)]) {
        let bench = Bench()
        #expect(bench.receive([1, 2, 3]) == 0)
        for (register, value) in setUp {
            #expect(bench.rooms.take() == 0)
            bench.write(register, value)
        }
        #expect(bench.rooms.take() == 1)
        let taken = bench.receive([1, 2, 3])
        #expect(taken > 0)
        #expect(bench.readAll() == Array([1, 2, 3][..<taken]))
    }

    @Test func reportsInputBelowTheTriggerLevelAsATimeout() {
        let bench = Bench()
        bench.write(identity, 0x81)
        bench.write(interruptEnable, 0x01)
        #expect(bench.receive(Array(repeating: 7, count: 7)) == 7)
        #expect(bench.read(identity) == 0xcc)
        #expect(bench.receive([8]) == 1)
        #expect(bench.read(identity) == 0xc4)
        // The line was high all the time: one edge.
        #expect(bench.interrupts.take() == 1)
    }

    @Test func holdsOneByteWithoutFIFOs() {
        let bench = Bench()
        #expect(bench.read(lineStatus) & 1 == 0)
        #expect(bench.receive([1, 2]) == 1)
        #expect(bench.read(data) == 1)
        #expect(bench.rooms.take() == 1)
        #expect(bench.receive([2]) == 1)
        // Switching the FIFOs on empties what is there.
        bench.write(identity, 0x01)
        #expect(bench.read(lineStatus) & 1 == 0)
        #expect(bench.receive([3]) == 1)
        bench.write(identity, 0x03)
        #expect(bench.readAll().isEmpty)
    }

    @Test func offersInputAgainAfterTheDriverClearedTheFIFO() {
        let bench = Bench()
        bench.write(identity, 0x01)
        #expect(bench.receive(Array(repeating: 1, count: 20)) == 16)
        #expect(bench.rooms.take() == 0)
        bench.write(identity, 0x03)
        #expect(bench.rooms.take() == 1)
    }

    @Test func loopsBackWithModemLinesAndOverrun() {
        let bench = Bench()
        bench.write(identity, 0x01)
        bench.write(interruptEnable, 0x0c)
        _ = bench.interrupts.take()
        bench.write(modemControl, 0x10)
        #expect(bench.read(modemStatus) & 0xf0 == 0)
        _ = bench.interrupts.take()
        // RTS and OUT2, as 8250 drivers test it.
        bench.write(modemControl, 0x1a)
        #expect(bench.interrupts.take() == 1)
        #expect(bench.read(identity) == 0xc0)
        #expect(bench.read(modemStatus) == 0x99)
        #expect(bench.read(modemStatus) == 0x90)
        // The ring indicator reports only its end.
        bench.write(modemControl, 0x14)
        #expect(bench.read(modemStatus) & 0x44 == 0x40)
        bench.write(modemControl, 0x10)
        #expect(bench.read(modemStatus) & 0x44 == 0x04)
        // Bytes come back and do not reach the console, whose input waits.
        bench.send("0123456789abcdefg")
        #expect(bench.receive([1]) == 0)
        _ = bench.interrupts.take()
        #expect(bench.read(identity) == 0xc6)
        #expect(bench.read(lineStatus) & 0x03 == 0x03)
        #expect(bench.read(lineStatus) & 0x03 == 0x01, "reading clears the overrun")
        #expect(String(decoding: bench.readAll(), as: UTF8.self) == "0123456789abcdef")
        #expect(bench.sink.bytes.isEmpty)
        #expect(bench.rooms.take() == 0)
        bench.write(modemControl, 0x00)
        #expect(bench.rooms.take() == 1)
        #expect(bench.receive([1]) == 1)
    }

    @Test func ranksInterrupts() {
        let bench = Bench()
        bench.write(identity, 0x01)
        bench.write(modemControl, 0x10)
        bench.write(modemControl, 0x12)
        bench.send("0123456789abcdefg")
        bench.write(interruptEnable, 0x0f)
        #expect(bench.read(identity) & 0x0f == 0x6)
        _ = bench.read(lineStatus)
        #expect(bench.read(identity) & 0x0f == 0x4)
        _ = bench.readAll()
        #expect(bench.read(identity) & 0x0f == 0x2)
        #expect(bench.read(identity) & 0x0f == 0x0)
        _ = bench.read(modemStatus)
        #expect(bench.read(identity) & 0x0f == 0x1)
    }

    @Test func splitsWideAccesses() {
        let bench = Bench()
        bench.port.write(6, size: 2, value: 0x7700)
        #expect(bench.read(scratch) == 0x77)
        // Status in the low byte, scratch in the high one, beyond the port all ones.
        #expect(bench.port.read(6, size: 2) == 0x77b0)
        #expect(bench.port.read(6, size: 4) == 0xffff_77b0)
        #expect(bench.port.read(7, size: 4) == 0xffff_ff77)
        bench.port.write(7, size: 4, value: 0x1234_5678)
        #expect(bench.read(scratch) == 0x78)
        #expect(bench.port.read(65535, size: 4) & 0xff == 0xff)
        #expect(bench.port.read(0, size: 0) == 0 && bench.port.read(0, size: -1) == 0)
        // `rep outsw` to the transmitter: the high bytes go to the next register.
        let words: [UInt8] = [0x41, 0x00, 0x42, 0x00, 0x43]
        bench.port.write(0, size: 2, string: words.span)
        #expect(bench.sink.text == "AB")
        bench.port.write(0, size: 3, string: words.span)
        bench.port.write(0, size: 0, string: words.span)
        #expect(bench.sink.text == "AB")
        bench.port.write(7, size: 1, string: words.span)
        #expect(bench.read(scratch) == 0x43)
    }

    @Test func resetKeepsOutputOnItsWay() {
        let bench = Bench()
        bench.write(identity, 0x01)
        bench.write(interruptEnable, 0x0f)
        #expect(bench.receive(Array(repeating: 1, count: 20)) == 16)
        bench.sink.setRoom(0)
        bench.send("last words")
        bench.port.reset()
        #expect(bench.read(interruptEnable) == 0 && bench.read(identity) == 0x01)
        #expect(bench.rooms.take() == 0)
        bench.write(identity, 0x01)
        #expect(bench.rooms.take() == 1)
        bench.sink.setRoom(.max)
        #expect(bench.port.flush())
        #expect(bench.sink.text == "last words")
    }

    /// Random register accesses of any width and order never trap and never lose a byte that was accepted.
    @Test(arguments: 0..<4) func survivesAnyDriver(seed: UInt64) {
        var state = seed
        func random(_ bound: UInt64) -> UInt64 {
            state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
            return state >> 33 % bound
        }
        let bench = Bench()
        for _ in 0..<20_000 {
            switch random(8) {
            case 0: bench.sink.setRoom(Int(random(100)))
            case 1: _ = bench.receive(Array(repeating: UInt8(random(256)), count: Int(random(40))))
            case 2: bench.port.flush()
            case 3:
                let bytes = [UInt8](repeating: 1, count: Int(random(300)))
                bench.port.write(UInt16(random(10)), size: Int(random(6)), string: bytes.span)
            case 4, 5: _ = bench.port.read(UInt16(random(10)), size: Int(random(5)))
            default: bench.port.write(UInt16(random(10)), size: Int(random(5)), value: UInt32(random(1 << 31)))
            }
            #expect(bench.port.pendingOutput <= SerialPort.ringCapacity)
        }
    }
}

@Suite(.timed) struct PlatformDescriptorSinkTests {
    @Test func writesUntilThePipeIsFullAndGoesOn() throws {
        var ends: [Int32] = [0, 0]
        try #require(unsafe pipe(&ends) == 0)
        let reader = FileDescriptor(owning: ends[0])
        let writer = FileDescriptor(owning: ends[1])
        try writer.setNonBlocking(true)
        let full = Counter()
        let sink = DescriptorSink(writer, onFull: { full.add() })
        let port = SerialPort(sink: sink, interrupt: {}, onRoom: {})
        // A pipe holds 64 KiB by default.
        let block = (0..<4096).map { UInt8(truncatingIfNeeded: $0 * 7) }
        var written = 0
        while full.count == 0, written < 1 << 20 {
            port.write(0, size: 1, string: block.span)
            written += block.count
        }
        #expect(full.count == 1 && port.pendingOutput > 0)
        var read: [UInt8] = []
        var chunk = [UInt8](repeating: 0, count: 8192)
        while read.count < written {
            let count = try unsafe chunk.withUnsafeMutableBytes { unsafe try reader.read(into: $0) }
            read += chunk[..<count]
            port.flush()
        }
        #expect(port.pendingOutput == 0 && port.droppedOutput == 0)
        #expect(read == (0..<written).map { UInt8(truncatingIfNeeded: $0 % 4096 * 7) })
    }

    @Test func goesOnWhenNobodyReads() throws {
        let blocked = SignalSet([SIGPIPE])
        let before = blocked.block()
        defer { before.restore() }
        var ends: [Int32] = [0, 0]
        try #require(unsafe pipe(&ends) == 0)
        close(ends[0])
        let port = SerialPort(
            sink: DescriptorSink(FileDescriptor(owning: ends[1]), onFull: {}), interrupt: {}, onRoom: {})
        let text: [UInt8] = Array("to nobody".utf8)
        port.write(0, size: 1, string: text.span)
        #expect(port.pendingOutput == 0)
        // The signal that write(2) raised is for nobody either.
        #expect(SignalSet.next(from: try blocked.descriptor()) == SIGPIPE)
    }
}
