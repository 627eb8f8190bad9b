// SPDX-License-Identifier: Apache-2.0

/// A buffer for the device.
struct Segment {
    var address: Address
    var length: UInt32
}

/// A descriptor (virtio 1.2 §2.7.5).
enum DescriptorFlag {
    static let next: UInt16 = 1
    static let write: UInt16 = 2
    static let indirect: UInt16 = 4
}

/// The driver's side of a split virtqueue (virtio 1.2 §2.7). A chain is identified by its slot, 0 ..< size: the index
/// of its first descriptor, and of its indirect table if there is one.
final class Virtqueue {
    let size: UInt16
    let index: UInt32
    private let device: VirtioMMIO
    private let features: Features

    private let descriptors: Address
    private let available: Address
    private let used: Address
    private let indirectTables: Address
    private let memory: Address
    private let memoryPages: UInt64

    private var freeSlots: [UInt16] = []
    private var chainLength: [UInt16]
    private var nextAvailable: UInt16 = 0
    private var lastNotified: UInt16 = 0
    private var lastUsed: UInt16 = 0

    /// The maximum number of descriptors of a chain.
    static let longestChain = 4

    /// How often the device was notified, and how often that was not needed.
    private(set) var notifications = 0
    private(set) var savedNotifications = 0

    /// Sets up queue `index` of a device whose features are negotiated, with at most `wanted` descriptors.
    init(_ device: VirtioMMIO, index: UInt32, wanted: UInt32, features: Features) throws(Failure) {
        self.device = device
        self.index = index
        self.features = features
        let registers = device.registers
        registers.store(index, VirtioMMIO.Register.queueSelect)
        let largest: UInt32 = registers.load(VirtioMMIO.Register.queueSizeMax)
        guard largest > 0, registers.load(VirtioMMIO.Register.queueReady) as UInt32 == 0 else {
            throw Failure("queue \(index) of the device at 0x\(hex: registers.value) is missing or in use")
        }
        var fits: UInt32 = 1
        while fits * 2 <= min(largest, wanted, 1024) { fits *= 2 }
        size = UInt16(fits)

        let count = UInt64(size)
        let descriptorBytes = count * 16
        let availableBytes = (6 + count * 2 + 3) & ~3
        let usedBytes = (6 + count * 8 + 15) & ~15
        let tables = (descriptorBytes + availableBytes + usedBytes + 15) & ~15
        let bytes = tables + count * UInt64(Self.longestChain) * 16
        memoryPages = (bytes + PageAllocator.pageSize - 1) / PageAllocator.pageSize
        guard let memory = unsafe pages.allocate(pages: memoryPages) else { throw Failure("no memory for a queue") }
        memory.fill(count: memoryPages * PageAllocator.pageSize)
        self.memory = memory
        descriptors = memory
        available = memory + descriptorBytes
        used = available + availableBytes
        indirectTables = memory + tables
        chainLength = [UInt16](repeating: 0, count: Int(size))
        for slot in stride(from: Int(size) - 1, through: 0, by: -1) { freeSlots.append(UInt16(slot)) }

        registers.store(fits, VirtioMMIO.Register.queueSize)
        device.storeAddress(descriptors.value, VirtioMMIO.Register.queueDescriptors)
        device.storeAddress(available.value, VirtioMMIO.Register.queueDriver)
        device.storeAddress(used.value, VirtioMMIO.Register.queueDevice)
        registers.store(UInt32(1), VirtioMMIO.Register.queueReady)
    }

    deinit { unsafe pages.release(memory, pages: memoryPages) }  // the device was reset before

    private var usesIndirect: Bool { features.contains(.indirectDescriptors) }

    /// The number of slots in use.
    var inFlight: Int { Int(size) - freeSlots.count }

    /// How many more chains of `length` descriptors fit.
    func room(length: Int) -> Int { usesIndirect || length == 1 ? freeSlots.count : freeSlots.count / length }

    /// The slot of the next chain; nil if there is no room for three descriptors.
    var upcoming: UInt16? { room(length: 3) > 0 ? freeSlots.last : nil }

    /// The slot of the next chain of one descriptor.
    var upcomingSingle: UInt16? { freeSlots.last }

    /// Adds a chain: first the buffers that the device reads, then those that it writes. Nil if there is no room.
    /// `notify` publishes it.
    func add(_ first: Segment, _ second: Segment? = nil, _ third: Segment? = nil, readable: Int) -> UInt16? {
        let length = third != nil ? 3 : second != nil ? 2 : 1
        guard room(length: length) > 0, let head = freeSlots.popLast() else { return nil }
        if usesIndirect && length > 1 {
            let table = indirectTables + UInt64(head) * UInt64(Self.longestChain) * 16
            for place in 0..<length {
                let segment = place == 0 ? first : place == 1 ? second ?? first : third ?? first
                write(table + place * 16, segment, flags: flags(place, length, readable), next: UInt16(place + 1))
            }
            let whole = Segment(address: table, length: UInt32(length * 16))
            write(descriptors + Int(head) * 16, whole, flags: DescriptorFlag.indirect, next: 0)
            chainLength[Int(head)] = 1
        } else {
            var slot = head
            for place in 0..<length {
                let segment = place == 0 ? first : place == 1 ? second ?? first : third ?? first
                let next = place + 1 < length ? freeSlots.popLast() ?? 0 : 0
                write(descriptors + Int(slot) * 16, segment, flags: flags(place, length, readable), next: next)
                slot = next
            }
            chainLength[Int(head)] = UInt16(length)
        }
        available.store(head, 4 + UInt64(nextAvailable % size) * 2)
        nextAvailable &+= 1
        return head
    }

    private func flags(_ place: Int, _ length: Int, _ readable: Int) -> UInt16 {
        (place + 1 < length ? DescriptorFlag.next : 0) | (place >= readable ? DescriptorFlag.write : 0)
    }

    private func write(_ descriptor: Address, _ segment: Segment, flags: UInt16, next: UInt16) {
        descriptor.store(segment.address.value)
        descriptor.store(segment.length, 8)
        descriptor.store(flags, 12)
        descriptor.store(next, 14)
    }

    /// Publishes the added chains, and notifies the device if it has notifications enabled (§2.7.13).
    func notify() {
        guard nextAvailable != lastNotified else { return }
        fence()
        available.store(nextAvailable, 2)
        fence()
        let wanted: Bool
        if features.contains(.eventIndex) {
            let event: UInt16 = used.load(4 + UInt64(size) * 8)
            wanted = nextAvailable &- event &- 1 < nextAvailable &- lastNotified
        } else {
            wanted = (used.load() as UInt16) & 1 == 0
        }
        lastNotified = nextAvailable
        if wanted {
            notifications += 1
            device.notify(queue: index)
        } else {
            savedNotifications += 1
        }
    }

    /// The next used chain, and the number of bytes that the device reports as written. `release` frees its slot.
    func next() -> (slot: UInt16, length: UInt32)? {
        guard lastUsed != used.load(2) as UInt16 else { return nil }
        let element = used + (4 + UInt64(lastUsed % size) * 8)
        let slot: UInt32 = element.load()
        let length: UInt32 = element.load(4)
        lastUsed &+= 1
        // A chain that the device does not have.
        guard slot < UInt32(size), chainLength[Int(slot)] > 0 else { return next() }
        return (UInt16(slot), length)
    }

    /// Frees the slot of a chain of `next`.
    func release(_ head: UInt16) {
        var slot = head
        for left in stride(from: chainLength[Int(head)], to: 0, by: -1) {
            freeSlots.append(slot)
            if left > 1 { slot = descriptors.load(UInt64(slot) * 16 + 14) }
        }
        chainLength[Int(head)] = 0
    }

    /// Enables an interrupt for the next used chain. False if there is a used chain already.
    func enableInterrupt() -> Bool {
        available.store(UInt16(0))
        if features.contains(.eventIndex) { available.store(lastUsed, 4 + UInt64(size) * 2) }
        fence()
        return lastUsed == used.load(2) as UInt16
    }

    /// Disables interrupts, which is a hint to the device.
    func disableInterrupt() {
        if features.contains(.eventIndex) {
            available.store(lastUsed &- 1, 4 + UInt64(size) * 2)  // an index that has passed already
        } else {
            available.store(UInt16(1))
        }
    }
}
