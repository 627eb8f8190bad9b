// SPDX-License-Identifier: Apache-2.0

/// A virtio block device (virtio 1.2 §5.2) with up to eight queues: requests go to each in turn.
///
/// A request is identified by its slot: the number of its queue times the size of a queue, plus its slot there.
final class Disk {
    enum Request: UInt32 {
        case read = 0
        case write = 1
        case flush = 4
        case identify = 8
        case discard = 11
        case writeZeroes = 13
    }

    /// The status byte of a request.
    enum Outcome {
        static let ok: UInt8 = 0
        static let ioError: UInt8 = 1
        static let unsupported: UInt8 = 2
        /// Not set by a device: the request has not completed.
        static let pending: UInt8 = 0xff
    }

    static let sectorSize: UInt64 = 512
    private static let slotSize: UInt64 = 32  // header 16 bytes, then the status byte
    private static let queueSize: UInt32 = 256
    private static let mostQueues: UInt16 = 8
    private static let patience = 10 * seconds

    let name: Text
    let device: VirtioMMIO
    private(set) var features: Features = []
    private(set) var queues: [Virtqueue]
    /// The queue that gets the next request, if it has room.
    private var turn = 0
    /// In sectors of 512 bytes.
    private(set) var capacity: UInt64 = 0
    private(set) var blockSize: UInt32 = 512
    private var slots: Address
    private var slotPages: UInt64
    private let buffer: Address
    /// Requests that the device has completed and `outcome` has not returned yet.
    private var done: [Bool] = []
    private(set) var completed: UInt64 = 0

    var isReadOnly: Bool { features.contains(.readOnly) }

    /// Bytes of the buffer for `read` and `write`.
    static let bufferSize: UInt64 = 64 << 10

    init(_ device: VirtioMMIO, index: Int) throws(Failure) {
        self.device = device
        name =
            index < 26 ? Text([UInt8(ascii: "v"), UInt8(ascii: "d"), UInt8(ascii: "a") + UInt8(index)]) : "vd\(index)"
        guard let buffer = unsafe pages.allocate(pages: Self.bufferSize / PageAllocator.pageSize) else {
            throw Failure("no memory for a disk")
        }
        self.buffer = buffer
        (features, queues) = try Self.bringUp(device)
        (slots, slotPages) = try Self.allocateSlots(queues.count)
        begin()
        device.handleInterrupts { [self] in serve() }  // a driver lives as long as the kernel
    }

    private static func bringUp(_ device: VirtioMMIO) throws(Failure) -> (Features, [Virtqueue]) {
        let wanted: Features = [
            .segmentMaximum, .readOnly, .blockSize, .flush, .topology, .multiqueue, .discard, .writeZeroes, .ring,
        ]
        let features = try device.negotiate(wanted)
        let count = features.contains(.multiqueue) ? min(max(device.config16(34), 1), mostQueues) : 1
        var queues: [Virtqueue] = []
        for index in 0..<UInt32(count) {
            queues.append(try Virtqueue(device, index: index, wanted: queueSize, features: features))
        }
        device.setDriverOK()
        for queue in queues { _ = queue.enableInterrupt() }
        return (features, queues)
    }

    private static func allocateSlots(_ queues: Int) throws(Failure) -> (Address, UInt64) {
        let count =
            (UInt64(queues) * UInt64(queueSize) * slotSize + PageAllocator.pageSize - 1) / PageAllocator.pageSize
        guard let slots = unsafe pages.allocate(pages: count) else {
            throw Failure("no memory for the disk's requests")
        }
        return (slots, count)
    }

    private func begin() {
        done = [Bool](repeating: false, count: queues.count * Int(Self.queueSize))
        turn = 0
        readConfiguration()
    }

    private func readConfiguration() {
        capacity = device.config64(0)
        blockSize = features.contains(.blockSize) ? device.config32(20) : 512
    }

    /// Initializes a device again that something else has used, or that needs a reset.
    func restart() throws(Failure) {
        (features, queues) = try Self.bringUp(device)
        unsafe pages.release(slots, pages: slotPages)  // the device was reset before
        (slots, slotPages) = try Self.allocateSlots(queues.count)
        begin()
    }

    private func serve() {
        // The disk may have grown.
        if device.acknowledgeInterrupt() & 2 != 0 { readConfiguration() }
        collect()
    }

    private func collect() {
        for (index, queue) in queues.enumerated() {
            repeat {
                while let (slot, _) = queue.next() {
                    done[index * Int(Self.queueSize) + Int(slot)] = true
                    completed += 1
                }
            } while !queue.enableInterrupt()
        }
    }

    /// Adds a request to a queue; nil if the queues are full. `notify` submits it.
    func submit(_ request: Request, sector: UInt64, _ data: Segment?) -> UInt16? {
        submit(type: request.rawValue, sector: sector, data, deviceWrites: request == .read || request == .identify)
    }

    private func submit(type: UInt32, sector: UInt64, _ data: Segment?, deviceWrites: Bool) -> UInt16? {
        for _ in queues {
            let index = turn
            turn = (turn + 1) % queues.count
            if let slot = submit(to: index, type: type, sector: sector, data, deviceWrites: deviceWrites) {
                return slot
            }
        }
        return nil
    }

    /// The same for one queue.
    func submit(to index: Int, type: UInt32, sector: UInt64, _ data: Segment?, deviceWrites: Bool) -> UInt16? {
        let queue = queues[index]
        // The slot is needed before the chain is added: it will be the next free one.
        guard let local = queue.upcoming else { return nil }
        let slot = UInt16(index) * UInt16(Self.queueSize) + local
        let header = slots + UInt64(slot) * Self.slotSize
        header.store(type)
        header.store(UInt32(0), 4)
        header.store(sector, 8)
        header.store(Outcome.pending, 16)
        let head = Segment(address: header, length: 16)
        let status = Segment(address: header + 16, length: 1)
        done[Int(slot)] = false
        let added =
            data.map { queue.add(head, $0, status, readable: deviceWrites ? 1 : 2) }
            ?? queue.add(head, status, readable: 1)
        return added.map { UInt16(index) * UInt16(Self.queueSize) + $0 }
    }

    func notify() {
        for queue in queues { queue.notify() }
    }

    /// The outcome of a completed request, once.
    func take(_ slot: UInt16) -> UInt8? {
        guard done[Int(slot)] else { return nil }
        done[Int(slot)] = false
        queues[Int(slot) / Int(Self.queueSize)].release(slot % UInt16(Self.queueSize))
        return (slots + UInt64(slot) * Self.slotSize).load(16)
    }

    /// Performs one request and waits for it.
    func perform(_ request: Request, sector: UInt64, _ data: Segment?) throws(Failure) -> UInt8 {
        try perform(
            type: request.rawValue, sector: sector, data, deviceWrites: request == .read || request == .identify)
    }

    /// One request of any type.
    func perform(type: UInt32, sector: UInt64, _ data: Segment?, deviceWrites: Bool) throws(Failure) -> UInt8 {
        guard let slot = submit(type: type, sector: sector, data, deviceWrites: deviceWrites) else {
            throw Failure("\(name): the queue is full")
        }
        notify()
        var outcome: UInt8?
        let answered = interrupts.wait(until: clock.now + Self.patience) {
            outcome = take(slot)
            return outcome != nil
        }
        guard answered, let outcome else { throw Failure("\(name): no completion within \(Self.patience / seconds) s") }
        return outcome
    }

    /// Reads `count` sectors. The bytes are valid until the next call.
    func read(sector: UInt64, count: UInt64 = 1) throws(Failure) -> Address {
        guard count > 0, count * Self.sectorSize <= Self.bufferSize else {
            throw Failure("at most \(Self.bufferSize / Self.sectorSize) sectors at once")
        }
        let outcome = try perform(
            .read, sector: sector, Segment(address: buffer, length: UInt32(count * Self.sectorSize)))
        guard outcome == Outcome.ok else {
            throw Failure("\(name): reading sector \(sector): \(Self.describe(outcome))")
        }
        return buffer
    }

    /// Writes `count` sectors from `source`.
    func write(sector: UInt64, count: UInt64, from source: Address) throws(Failure) {
        let outcome = try perform(
            .write, sector: sector, Segment(address: source, length: UInt32(count * Self.sectorSize)))
        guard outcome == Outcome.ok else {
            throw Failure("\(name): writing sector \(sector): \(Self.describe(outcome))")
        }
    }

    func flush() throws(Failure) {
        guard features.contains(.flush) else { return }
        let outcome = try perform(.flush, sector: 0, nil)
        guard outcome == Outcome.ok else { throw Failure("\(name): flush: \(Self.describe(outcome))") }
    }

    /// The device's identifier (GET_ID), up to 20 bytes.
    func identifier() throws(Failure) -> Text {
        buffer.fill(count: 20)
        let outcome = try perform(.identify, sector: 0, Segment(address: buffer, length: 20))
        guard outcome == Outcome.ok else { throw Failure("\(name): GET_ID: \(Self.describe(outcome))") }
        return Text(buffer.bytes(20).prefix { $0 >= 0x20 && $0 < 0x7f })
    }

    /// DISCARD or WRITE_ZEROES of `count` sectors (§5.2.6: one segment of sector, count and flags).
    func clear(_ request: Request, sector: UInt64, count: UInt32) throws(Failure) -> UInt8 {
        buffer.store(sector)
        buffer.store(count, 8)
        buffer.store(UInt32(0), 12)
        return try perform(request, sector: 0, Segment(address: buffer, length: 16))
    }

    static func describe(_ outcome: UInt8) -> Text {
        switch outcome {
        case Outcome.ok: "ok"
        case Outcome.ioError: "I/O error"
        case Outcome.unsupported: "not supported"
        default: "status \(UInt64(outcome))"
        }
    }
}
