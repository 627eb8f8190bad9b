// SPDX-License-Identifier: Apache-2.0

/// A driver that need not follow the rules: it writes a device's registers and a queue's rings directly.
final class HostileDriver {
    /// The outcome.
    enum Outcome: Equatable {
        case needsReset
        /// The chain was used. The status byte is 0xff if the device did not write it.
        case completed(status: UInt8, length: UInt32)
        case nothing

        var text: Text {
            switch self {
            case .needsReset: "the device needs a reset"
            case .completed(let status, let length): "completed with status \(status), \(length) bytes"
            case .nothing: "nothing happened"
            }
        }
    }

    static let queueSize: UInt16 = 16

    let device: VirtioMMIO
    let queue: UInt32
    private let memory: Address
    private static let memoryPages: UInt64 = 16
    private static let canary: UInt64 = 0xa5a5_5a5a_a5a5_5a5a
    private(set) var features: Features = []
    private var nextAvailable: UInt16 = 0
    private var expected: UInt16 = 0
    private var placedSize = UInt32(queueSize)

    // A page each, with canaries in those that no device may write.
    var descriptors: Address { memory }
    var available: Address { memory + 0x1000 }
    var used: Address { memory + 0x2000 }
    var table: Address { memory + 0x3000 }
    /// A request's header: 16 bytes, a read of sector 0 unless a test changes it.
    var header: Address { memory + 0x5000 }
    /// Four pages of data.
    var data: Address { memory + 0x7000 }
    var status: Address { memory + 0xc000 }

    init(_ device: VirtioMMIO, queue: UInt32) throws(Failure) {
        self.device = device
        self.queue = queue
        guard let memory = unsafe pages.allocate(pages: Self.memoryPages) else { throw Failure("no memory") }
        self.memory = memory
    }

    deinit { unsafe pages.release(memory, pages: Self.memoryPages) }

    /// Resets the device and initializes it correctly, with `queue` on cleared rings; the test does the rest.
    func bringUp(_ wanted: Features = [.ring, .mergeableBuffers]) throws(Failure) {
        features = try device.negotiate(wanted.union(.version1))
        prepareMemory()
        place(descriptors.value, available.value, used.value)
        device.setDriverOK()
        // No interrupts: the used ring is polled.
        available.store(UInt16(1))
        (available + (4 + 2 * UInt64(Self.queueSize))).store(UInt16(0x8000))
    }

    func prepareMemory() {
        for offset in stride(from: UInt64(0), to: Self.memoryPages * PageAllocator.pageSize, by: 8) {
            memory.store(Self.canary, offset)
        }
        descriptors.fill(count: UInt64(Self.queueSize) * 16)
        available.fill(count: 6 + 2 * UInt64(Self.queueSize))
        used.fill(count: 6 + 8 * UInt64(Self.queueSize))
        header.fill(count: 16)
        status.store(Disk.Outcome.pending)
        nextAvailable = 0
        expected = 0
    }

    /// Sets the queue's size and rings, and makes it ready.
    func place(_ descriptors: UInt64, _ available: UInt64, _ used: UInt64, size: UInt32 = UInt32(queueSize)) {
        placedSize = size
        let registers = device.registers
        registers.store(queue, VirtioMMIO.Register.queueSelect)
        registers.store(size, VirtioMMIO.Register.queueSize)
        device.storeAddress(descriptors, VirtioMMIO.Register.queueDescriptors)
        device.storeAddress(available, VirtioMMIO.Register.queueDriver)
        device.storeAddress(used, VirtioMMIO.Register.queueDevice)
        registers.store(UInt32(1), VirtioMMIO.Register.queueReady)
    }

    func describe(_ index: UInt16, _ address: UInt64, _ length: UInt32, _ flags: UInt16 = 0, next: UInt16 = 0) {
        write(descriptors + UInt64(index) * 16, address, length, flags, next)
    }

    func describe(inTable index: UInt64, _ address: UInt64, _ length: UInt32, _ flags: UInt16 = 0, next: UInt16 = 0) {
        write(table + index * 16, address, length, flags, next)
    }

    func write(_ place: Address, _ address: UInt64, _ length: UInt32, _ flags: UInt16, _ next: UInt16) {
        place.store(address)
        place.store(length, 8)
        place.store(flags, 12)
        place.store(next, 14)
    }

    /// A correct read of one sector in the descriptors 0, 1 and 2.
    func describeRead() {
        describe(0, header.value, 16, DescriptorFlag.next, next: 1)
        describe(1, data.value, 512, DescriptorFlag.next | DescriptorFlag.write, next: 2)
        describe(2, status.value, 1, DescriptorFlag.write)
    }

    func setHeader(type: UInt32, sector: UInt64) {
        header.store(type)
        header.store(sector, 8)
    }

    /// Puts `head` into the available ring.
    func offer(_ head: UInt16) {
        available.store(head, 4 + UInt64(nextAvailable % Self.queueSize) * 2)
        nextAvailable &+= 1
    }

    /// Offers the chain that begins at descriptor 0.
    func submit() {
        offer(0)
        kick()
    }

    /// Publishes the offered chains (or an index that the test chooses) and notifies the device.
    func kick(index: UInt16? = nil) {
        fence()
        available.store(index ?? nextAvailable, 2)
        fence()
        device.notify(queue: queue)
    }

    /// The outcome: immediately if the device answers or needs a reset, otherwise after `patience`.
    func outcome(patience: Nanoseconds = 40 * milliseconds) -> Outcome {
        let end = clock.now + patience
        var polls = 0
        while true {
            if used.load(2) as UInt16 != expected {
                fence()
                let element = used + (4 + UInt64(expected % Self.queueSize) * 8)
                expected &+= 1
                return .completed(status: status.load(), length: element.load(4))
            }
            polls += 1
            if polls % 64 == 0 && device.needsReset { return .needsReset }  // each is an exit: not too often
            if clock.now >= end { return device.needsReset ? .needsReset : .nothing }
            spinPause()
        }
    }

    /// Whether every byte outside rings and buffers is unchanged: `data` may have changed up to `dataLength`. A device
    /// with a wrong queue size may take the used ring for longer than it is.
    func untouched(dataLength: UInt64) -> Bool {
        func intact(_ start: UInt64, _ end: UInt64) -> Bool {
            for offset in stride(from: start, to: end, by: 8) where memory.load(offset) as UInt64 != Self.canary {
                return false
            }
            return true
        }
        return (placedSize != Self.queueSize || intact(0x2200, 0x3000)) && intact(0x5010, 0x7000)
            && intact(0x7000 + (dataLength + 7) & ~7, 0xc000) && intact(0xc008, 0x10000)
    }
}
