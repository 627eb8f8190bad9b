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

/// What a test waits for does not come: a sentence instead of a test that never ends.
struct NothingCame: Error, CustomStringConvertible {
    let description: String
}

/// Waits until `condition` holds, for what comes without an interrupt.
func wait(_ condition: () throws -> Bool, sourceLocation: SourceLocation = #_sourceLocation) throws {
    for _ in 0..<30_000 {
        if try condition() { return }
        usleep(1_000)
    }
    throw NothingCame(description: "what is waited for in line \(sourceLocation.line) does not come")
}

/// Lines of a log.
final class Lines: Sendable {
    private let lines = Guarded<[String]>([])
    var all: [String] { lines.withLock { $0 } }
    var add: @Sendable (DeviceEvents.Level, String) -> Void {
        { level, line in
            if level != .debug { self.lines.withLock { $0.append("\(level): \(line)") } }
        }
    }
}

/// The driver of a network card, working on the card's registers and on rings in a guest's RAM. It does what the test
/// asks, right or wrong.
final class NetworkDriver {
    let memory: GuestMemory
    let device: NetworkDevice
    /// What the host's log got.
    let lines = Lines()
    let transport: MMIOTransport
    private(set) var queues: [Queue] = []

    static let receive = 0, transmit = 1, control = 2
    /// Where buffers are; the rings are below.
    static let buffers: UInt64 = 0x10_0000

    init(
        _ attachment: consuming NetworkAttachment, address: String = "52:54:00:00:00:02", isAddressLocked: Bool = false,
        limits: NetworkLimits = .none, metadata: MetadataService? = nil
    ) throws {
        memory = try GuestMemory(size: 16 << 20)
        device = try NetworkDevice(
            name: "net0", address: MACAddress(parsing: address), attachment: attachment,
            isAddressLocked: isAddressLocked, limits: limits, metadata: metadata,
            events: DeviceEvents(log: lines.add))
        try device.start()
        transport = try MMIOTransport(device: device, memory: memory)
    }

    deinit { device.reset() }

    // MARK: Registers

    func read(_ offset: UInt64) -> UInt32 { UInt32(truncatingIfNeeded: transport.read(at: offset, size: 4)) }
    func write(_ value: UInt32, _ offset: UInt64) { transport.write(UInt64(value), at: offset, size: 4) }
    func configuration(_ offset: UInt64, _ size: Int) -> UInt64 { transport.read(at: 0x100 + offset, size: size) }
    var status: DeviceStatus { DeviceStatus(rawValue: read(0x070)) }

    var offered: FeatureSet {
        write(0, 0x014)
        let low = read(0x010)
        write(1, 0x014)
        return FeatureSet(rawValue: UInt128(read(0x010)) << 32 | UInt128(low))
    }

    /// Negotiates; false when the device does not take these features.
    func negotiate(_ features: FeatureSet) -> Bool {
        write(0, 0x070)
        write(3, 0x070)
        let wanted = features.union(.version1)
        for word in 0..<FeatureSet.words {
            write(word, 0x024)
            write(wanted[word: word], 0x020)
        }
        write(11, 0x070)
        return status.contains(.featuresOK)
    }

    /// Resets, negotiates and starts with fresh rings.
    func start(
        _ features: FeatureSet = [], sizes: [UInt16] = [256, 256, 64], omitting: Set<Int> = [],
        prepare: (NetworkDriver) throws -> Void = { _ in }
    ) throws {
        try #require(negotiate(features))
        queues = []
        for (index, size) in sizes.enumerated() {
            queues.append(Queue(ram: memory.ram, size: size, base: 0x1_0000 * UInt64(index + 1)))
            try queues[index].clear()
            if !omitting.contains(index) { setUp(index) }
        }
        try prepare(self)
        write(15, 0x070)
    }

    /// Tells the device where a queue's rings are.
    func setUp(_ index: Int) {
        let queue = queues[index]
        write(UInt32(index), 0x030)
        write(UInt32(queue.size), 0x038)
        for (offset, address) in [(0x080, queue.descriptors), (0x090, queue.available), (0x0a0, queue.used)]
            as [(UInt64, UInt64)]
        {
            write(UInt32(truncatingIfNeeded: address), offset)
            write(UInt32(truncatingIfNeeded: address >> 32), offset + 4)
        }
        write(1, 0x044)
    }

    /// Resets one queue and gives it empty rings.
    func restart(_ index: Int) throws {
        write(UInt32(index), 0x030)
        write(1, 0x0c0)
        queues[index] = Queue(ram: memory.ram, size: queues[index].size, base: queues[index].descriptors)
        try queues[index].clear()
        setUp(index)
    }

    // MARK: Queues

    struct Piece {
        var address: UInt64
        var length: UInt32
        var isWritable: Bool
    }

    /// The driver's view of one queue.
    struct Queue {
        let ram: GuestRAM
        let size: UInt16
        let descriptors: UInt64
        var available: UInt64 { descriptors + 16 * UInt64(size) }
        var used: UInt64 { (available + 6 + 2 * UInt64(size) + 3) & ~3 }
        var nextDescriptor: UInt16 = 0
        var availableIndex: UInt16 = 0
        var seenUsed: UInt16 = 0

        init(ram: GuestRAM, size: UInt16, base: UInt64) {
            self.ram = ram
            self.size = size
            descriptors = base
        }

        func clear() throws { try ram.fill(at: GuestAddress(descriptors), count: 26 * UInt64(size) + 32) }

        /// Offers a chain in the next free descriptors, and shows it to the device; it is heard at the next kick.
        /// - Returns: its head.
        @discardableResult
        mutating func offer(_ pieces: [Piece]) throws -> UInt16 {
            let head = nextDescriptor
            for (index, piece) in pieces.enumerated() {
                let entry = GuestAddress(descriptors + 16 * UInt64(nextDescriptor))
                let isLast = index == pieces.count - 1
                nextDescriptor = (nextDescriptor + 1) % size
                try ram.write(piece.address, at: entry)
                try ram.write(piece.length, at: entry &+ 8)
                try ram.write((piece.isWritable ? 2 : 0) | (isLast ? 0 : 1) as UInt16, at: entry &+ 12)
                try ram.write(nextDescriptor, at: entry &+ 14)
            }
            try ram.write(head, at: GuestAddress(available + 4 + 2 * UInt64(availableIndex % size)))
            availableIndex &+= 1
            try ram.write(availableIndex, at: GuestAddress(available + 2))
            return head
        }

        /// The next chain that the device has returned.
        mutating func takeUsed() throws -> (head: UInt16, written: Int)? {
            guard try ram.readUInt16(at: GuestAddress(used + 2)) != seenUsed else { return nil }
            let entry = GuestAddress(used + 4 + 8 * UInt64(seenUsed % size))
            seenUsed &+= 1
            // used_event: an interrupt at the next one.
            try ram.write(seenUsed, at: GuestAddress(available + 4 + 2 * UInt64(size)))
            return (UInt16(truncatingIfNeeded: try ram.readUInt32(at: entry)), Int(try ram.readUInt32(at: entry &+ 4)))
        }
    }

    func kick(_ queue: Int) { write(UInt32(queue), 0x050) }

    @discardableResult
    func offer(_ queue: Int, _ pieces: [Piece]) throws -> UInt16 { try queues[queue].offer(pieces) }

    /// Waits for the next chain that the device returns.
    func used(_ queue: Int) throws -> (head: UInt16, written: Int) {
        while true {
            if let used = try queues[queue].takeUsed() { return used }
            var line = pollfd(fd: transport.irqfd.event.rawValue, events: Int16(POLLIN), revents: 0)
            guard unsafe poll(&line, 1, 30_000) == 1 else {
                throw NothingCame(description: "no interrupt for queue \(queue)")
            }
            transport.irqfd.event.drain()
            write(3, 0x064)
        }
    }

    /// Whether the device has returned a chain by now.
    func hasUsed(_ queue: Int) throws -> Bool {
        try memory.ram.readUInt16(at: GuestAddress(queues[queue].used + 2)) != queues[queue].seenUsed
    }

    // MARK: Frames

    /// Offers a receive buffer of pieces of the given lengths, one behind the other; returns its head.
    @discardableResult
    func offerBuffer(at address: UInt64, _ lengths: [UInt32], queue: Int = NetworkDriver.receive) throws -> UInt16 {
        var next = address
        return try offer(
            queue,
            lengths.map { length in
                defer { next += UInt64(length) }
                return Piece(address: next, length: length, isWritable: true)
            })
    }

    /// Sends bytes, header included, cut into pieces of the given lengths (the last takes the rest), and kicks.
    func send(
        _ bytes: [UInt8], cut lengths: [Int] = [], at address: UInt64 = NetworkDriver.buffers + 0x20_0000,
        queue: Int = NetworkDriver.transmit
    ) throws {
        try memory.ram.write(bytes, at: GuestAddress(address))
        var pieces: [Piece] = []
        var done = 0
        for length in lengths + [bytes.count - lengths.reduce(0, +)] {
            pieces.append(Piece(address: address + UInt64(done), length: UInt32(length), isWritable: false))
            done += length
        }
        try offer(queue, pieces)
        kick(queue)
    }

    /// Sends and waits until the device has taken it.
    func sendAndWait(_ bytes: [UInt8], cut lengths: [Int] = [], queue: Int = NetworkDriver.transmit) throws {
        try send(bytes, cut: lengths, queue: queue)
        #expect(try used(queue).written == 0)
    }

    func bytes(_ address: UInt64, _ count: Int) throws -> [UInt8] {
        try memory.ram.readBytes(at: GuestAddress(address), count: count)
    }

    /// A command on the control queue; returns the answer, nil when the device gave none.
    func command(_ bytes: [UInt8], answerLength: UInt32 = 1, queue: Int = NetworkDriver.control) throws -> UInt8? {
        let answer = try offerCommand(bytes, answerLength: answerLength, queue: queue)
        kick(queue)
        return try used(queue).written == 0 ? nil : memory.ram.readUInt8(at: answer)
    }

    /// Makes a command available without a kick; returns where its answer will be.
    func offerCommand(_ bytes: [UInt8], answerLength: UInt32 = 1, queue: Int) throws -> GuestAddress {
        let address = Self.buffers + 0x80_0000
        try memory.ram.write(bytes + [0xee], at: GuestAddress(address))
        let answer = address + UInt64(bytes.count)
        try offer(
            queue,
            [
                Piece(address: address, length: UInt32(bytes.count), isWritable: false),
                Piece(address: answer, length: answerLength, isWritable: true),
            ])
        return GuestAddress(answer)
    }
}

/// The other end of a card: what a TAP's host side is, made of a socket.
final class Wire {
    private var socket: FileDescriptor?

    private init(_ socket: consuming FileDescriptor) { self.socket = consume socket }

    /// A wire, and the descriptor of its end where the card belongs, which the caller closes.
    /// - Parameter isStream: frames are not kept apart.
    static func open(isStream: Bool = false) throws -> (wire: Wire, card: Int32) {
        var ends: [Int32] = [0, 0]
        // The kernel fills the two elements.
        let kind = (isStream ? SOCK_STREAM : SOCK_SEQPACKET).rawValue
        try #require(unsafe socketpair(AF_UNIX, Int32(kind | SOCK_CLOEXEC.rawValue), 0, &ends) == 0)
        try #require(clinux_fcntl_value(ends[0], F_SETFL, Int(O_NONBLOCK)) == 0)
        return (Wire(FileDescriptor(owning: ends[1])), ends[0])
    }

    /// A card and the other end of its wire.
    static func make(
        headerSize: Int = 12, mtu: Int = 1500, isAddressLocked: Bool = false, limits: NetworkLimits = .none,
        metadata: MetadataService? = nil
    ) throws -> (driver: NetworkDriver, wire: Wire) {
        let (wire, card) = try open()
        let tap = TAPDevice(FileDescriptor(owning: card), name: try InterfaceName("wire"), headerSize: headerSize)
        return (
            try NetworkDriver(
                NetworkAttachment(tap: tap, mtu: mtu), isAddressLocked: isAddressLocked, limits: limits,
                metadata: metadata), wire
        )
    }

    /// A card with several pairs of queues, and the other end of each one's wire.
    static func make(pairs: Int) throws -> (driver: NetworkDriver, wires: [Wire]) {
        let ends = try (0..<pairs).map { _ in try open() }
        let queues = ends.map { TAPQueue(standIn: FileDescriptor(owning: $0.card)) }
        let tap = TAPDevice(queues, name: try InterfaceName("wire"), headerSize: 12)
        return (try NetworkDriver(NetworkAttachment(tap: tap)), ends.map(\.wire))
    }

    var number: Int32 { socket?.rawValue ?? -1 }

    func send(_ bytes: [UInt8]) throws {
        let sent = unsafe bytes.withUnsafeBytes {
            unsafe Glibc.send(number, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL))
        }
        guard sent == bytes.count else { throw SystemCallError.last("send") }
    }

    /// The next frame with its header; waits for it.
    func next() throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 128 << 10)
        let count = try next(into: &bytes)
        return Array(bytes.prefix(count))
    }

    /// The same without allocating; returns how many bytes there are.
    @discardableResult
    func next(into bytes: inout [UInt8]) throws -> Int {
        guard waitForFrame(milliseconds: 30_000) else { throw NothingCame(description: "no frame from the card") }
        // The kernel writes within the array.
        let count = unsafe bytes.withUnsafeMutableBytes { unsafe recv(number, $0.baseAddress, $0.count, 0) }
        guard count >= 0 else { throw SystemCallError.last("recv") }
        return count
    }

    /// Whether a frame has come by now.
    var isReadable: Bool { waitForFrame(milliseconds: 0) }

    func waitForFrame(milliseconds: Int32) -> Bool {
        var waiting = pollfd(fd: number, events: Int16(POLLIN), revents: 0)
        return unsafe poll(&waiting, 1, milliseconds) == 1
    }

    /// Ends it, as an interface is removed.
    func cut() { socket = nil }
}

/// A header of zeros.
let plainHeader = [UInt8](repeating: 0, count: 12)

/// A frame of `count` bytes whose content tells frames and places apart.
func frame(_ count: Int, seed: Int = 0) -> [UInt8] {
    (0..<count).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ $0 >> 8 &+ seed &* 13) }
}
