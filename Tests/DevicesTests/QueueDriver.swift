// SPDX-License-Identifier: Apache-2.0

@testable import Devices
import GuestMemory
import Linux
import TestSupport
import Testing
@testable import Virtio

/// The driver of a device with one queue, or with several that are alike: the queues in guest RAM and the registers of
/// the transport.
class QueueDriver {
    /// A buffer of a chain.
    struct Buffer {
        let address: UInt64
        let length: Int
        let isWritable: Bool
    }

    static let queueSize = 64
    static let table = GuestAddress(0x1_0000), available = GuestAddress(0x2_0000), used = GuestAddress(0x3_0000)
    /// Memory for headers and data begins here.
    static let data: UInt64 = 0x10_0000

    let memory: GuestMemory
    let ram: GuestRAM
    let transport: MMIOTransport
    /// How far a queue has come.
    private struct State {
        var nextDescriptor = 0
        var nextAvailable: UInt16 = 0
        var seenUsed: UInt16 = 0
        /// What used entries said, by head.
        var written: [UInt32: UInt32] = [:]
        /// Of a packed queue: the wrap counters, the next used descriptor, and the lengths of chains in flight.
        var availableWrap = true
        var usedWrap = true
        var nextUsed = 0
        var lengths: [UInt16: Int] = [:]
    }

    private var states: [State]
    private var isPacked = false
    /// The queue that all below is about.
    var queue = 0
    var written: [UInt32: UInt32] { states[queue].written }

    /// A ring of the queue; the queues' rings of a kind are behind each other.
    private func place(_ ring: GuestAddress) -> GuestAddress { ring &+ UInt64(queue) * 0x1000 }

    /// - Parameter memory: nil for 16 MiB of ordinary pages.
    init(
        driving device: any VirtioDevice, features: FeatureSet, queues: Int = 1, memory wanted: GuestMemory? = nil
    ) throws {
        states = Array(repeating: State(), count: queues)
        memory = try wanted ?? GuestMemory(size: 16 << 20)
        ram = memory.ram
        try device.start()
        transport = try MMIOTransport(
            device: device, memory: memory, queues: features.contains(.packedRing) ? .packed : .split)
        try start(features)
    }

    deinit { write(0x070, 0) }

    func write(_ register: UInt64, _ value: UInt32) { transport.write(UInt64(value), at: register, size: 4) }
    func read(_ register: UInt64) -> UInt32 { UInt32(truncatingIfNeeded: transport.read(at: register, size: 4)) }
    func configuration(_ offset: UInt64, _ size: Int) -> UInt64 { transport.read(at: 0x100 + offset, size: size) }

    /// Resets the device and negotiates, up to FEATURES_OK.
    func negotiate(_ features: FeatureSet) throws {
        write(0x070, 0)
        for status: UInt32 in [1, 3] { write(0x070, status) }
        for word in 0..<FeatureSet.words {
            write(0x024, word)
            write(0x020, features[word: word])
        }
        write(0x070, 11)
        try #require(read(0x070) == 11)
    }

    /// Resets the device and sets it up.
    func start(_ features: FeatureSet) throws {
        try negotiate(features)
        isPacked = features.contains(.packedRing)
        states = Array(repeating: State(), count: states.count)
        for index in states.indices {
            queue = index
            try setUp()
        }
        queue = 0
        write(0x070, 15)
        try #require(read(0x070) == 15)
    }

    /// Makes the queue, with nothing in it, ready.
    func setUp() throws {
        states[queue] = State()
        for ring in [Self.table, Self.available, Self.used] { try ram.fill(at: place(ring), count: 0x1000) }
        write(0x030, UInt32(queue))
        write(0x038, UInt32(Self.queueSize))
        for (register, ring) in [(0x080 as UInt64, Self.table), (0x090, Self.available), (0x0a0, Self.used)] {
            write(register, UInt32(truncatingIfNeeded: place(ring).rawValue))
            write(register + 4, 0)
        }
        write(0x044, 1)
    }

    /// Makes a chain available; its head, which is also its ID in a packed queue.
    func offer(_ buffers: [Buffer]) throws -> UInt32 {
        if isPacked { return try offerPacked(buffers) }
        let head = states[queue].nextDescriptor
        for (index, buffer) in buffers.enumerated() {
            let entry = GuestAddress(
                place(Self.table).rawValue + UInt64(states[queue].nextDescriptor % Self.queueSize) * 16)
            let hasNext = index + 1 < buffers.count
            try ram.write(buffer.address, at: entry)
            try ram.write(UInt32(buffer.length), at: entry &+ 8)
            try ram.write(UInt16((hasNext ? 1 : 0) | (buffer.isWritable ? 2 : 0)), at: entry &+ 12)
            states[queue].nextDescriptor = (states[queue].nextDescriptor + 1) % Self.queueSize
            try ram.write(UInt16(hasNext ? states[queue].nextDescriptor : 0), at: entry &+ 14)
        }
        try ram.write(
            UInt16(head),
            at: place(Self.available) &+ (4 + 2 * UInt64(states[queue].nextAvailable % UInt16(Self.queueSize))))
        states[queue].nextAvailable &+= 1
        try ram.write(states[queue].nextAvailable, at: place(Self.available) &+ 2)
        return UInt32(head)
    }

    private func offerPacked(_ buffers: [Buffer]) throws -> UInt32 {
        let head = states[queue].nextDescriptor
        var firstFlags: UInt16 = 0
        for (index, buffer) in buffers.enumerated() {
            let entry = place(Self.table) &+ UInt64(states[queue].nextDescriptor) * 16
            let hasNext = index + 1 < buffers.count
            let flags =
                UInt16((hasNext ? 1 : 0) | (buffer.isWritable ? 2 : 0)) | (states[queue].availableWrap ? 0x80 : 0x8000)
            try ram.write(buffer.address, at: entry)
            try ram.write(UInt32(buffer.length), at: entry &+ 8)
            try ram.write(UInt16(head), at: entry &+ 12)
            // The first one's flags show the chain, and are written last.
            if index == 0 { firstFlags = flags } else { try ram.write(flags, at: entry &+ 14) }
            states[queue].nextDescriptor += 1
            if states[queue].nextDescriptor == Self.queueSize {
                states[queue].nextDescriptor = 0
                states[queue].availableWrap.toggle()
            }
        }
        states[queue].lengths[UInt16(head)] = buffers.count
        try ram.write(firstFlags, at: place(Self.table) &+ (UInt64(head) * 16 + 14))
        return UInt32(head)
    }

    /// Takes the next used chain of a packed queue; false if there is none.
    private func takeUsed() throws -> Bool {
        let entry = place(Self.table) &+ UInt64(states[queue].nextUsed) * 16
        let flags = try ram.readUInt16(at: entry &+ 14)
        guard flags & 0x8080 == (states[queue].usedWrap ? 0x8080 : 0) else { return false }
        let head = try ram.readUInt16(at: entry &+ 12)
        let known = states[queue].lengths.removeValue(forKey: head)
        let length = try #require(known, "not in flight: \(head)")
        states[queue].written[UInt32(head)] = flags & 2 == 0 ? 0 : try ram.readUInt32(at: entry &+ 8)
        states[queue].nextUsed += length
        if states[queue].nextUsed >= Self.queueSize {
            states[queue].nextUsed -= Self.queueSize
            states[queue].usedWrap.toggle()
        }
        return true
    }

    func kick() { write(0x050, UInt32(queue)) }

    /// Takes all that has come back, and names the next place as that from which on the driver wants an interrupt
    /// (virtio 1.2 §2.7.10.1, §2.8.14).
    func takeUsedAndNameTheNext() throws {
        if isPacked {
            while try takeUsed() {}
            let place = UInt32(states[queue].nextUsed) | (states[queue].usedWrap ? 0x8000 : 0)
            return try ram.write(place | 2 << 16, at: self.place(Self.available))
        }
        states[queue].seenUsed &+= UInt16(try usedCount())
        try ram.write(
            states[queue].seenUsed, at: place(Self.available) &+ UInt64(4 + 2 * Self.queueSize))
    }

    /// Indicates whether a chain has come back that was not taken.
    func hasUsed() throws -> Bool {
        guard isPacked else { return try usedCount() > 0 }
        let entry = place(Self.table) &+ UInt64(states[queue].nextUsed) * 16
        return try ram.readUInt16(at: entry &+ 14) & 0x8080 == (states[queue].usedWrap ? 0x8080 : 0)
    }

    /// How many chains of a split queue have come back that ``wait(for:)`` has not seen.
    func usedCount() throws -> Int { Int(try ram.readUInt16(at: place(Self.used) &+ 2) &- states[queue].seenUsed) }

    /// Waits until as many chains as given have come back, beyond those seen before.
    func wait(for count: Int) throws {
        if isPacked {
            for _ in 0..<count {
                while try !takeUsed() { transport.irqfd.event.wait() }
            }
            return
        }
        let wanted = states[queue].seenUsed &+ UInt16(count)
        while try ram.readUInt16(at: place(Self.used) &+ 2) != wanted { transport.irqfd.event.wait() }
        while states[queue].seenUsed != wanted {
            let entry = place(Self.used) &+ (4 + 8 * UInt64(states[queue].seenUsed % UInt16(Self.queueSize)))
            states[queue].written[try ram.readUInt32(at: entry)] = try ram.readUInt32(at: entry &+ 4)
            states[queue].seenUsed &+= 1
        }
    }
}
