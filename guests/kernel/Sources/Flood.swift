// SPDX-License-Identifier: Apache-2.0

/// The most work that a driver with few pages can give a disk: every request is the same indirect table, which refers
/// to the same piece of RAM as often as the device's limits (size_max, seg_max) allow.
struct Flood {
    /// The maximum of requests in flight, and of entries of an indirect table.
    private static let queueSize: UInt32 = 256
    /// The maximum size of a segment; all segments of a request are the same memory.
    private static let largestPiece: UInt64 = 4 << 20
    /// Where bytes of the disk will be.
    private static let untouched: UInt64 = 0xa5a5_5a5a_a5a5_5a5a

    private let disk: Disk
    private let size: UInt32
    private let memory: Address
    private let memoryPages: UInt64
    private let piece: UInt64
    private let segments: UInt64

    // A page for each thing: 256 descriptors fill one.
    private var descriptors: Address { memory }
    private var available: Address { memory + 0x1000 }
    private var used: Address { memory + 0x2000 }
    private var table: Address { memory + 0x3000 }
    private var header: Address { memory + 0x4000 }
    private var status: Address { memory + 0x4010 }
    private var data: Address { memory + 0x5000 }

    private var device: VirtioMMIO { disk.device }

    /// Resets the disk's device and makes its first queue ready for requests of that kind.
    init(_ disk: Disk) throws(Failure) {
        self.disk = disk
        let device = disk.device
        let features = try device.negotiate([.sizeMaximum, .segmentMaximum, .indirectDescriptors, .version1])
        guard features.contains(.indirectDescriptors) else {
            throw Failure("\(disk.name) does not offer INDIRECT_DESC")
        }
        let registers = device.registers
        registers.store(UInt32(0), VirtioMMIO.Register.queueSelect)
        size = min(Self.queueSize, registers.load(VirtioMMIO.Register.queueSizeMax))
        let largest = features.contains(.sizeMaximum) ? UInt64(device.config32(8)) : Self.largestPiece
        piece = min(largest, Self.largestPiece) & ~(Disk.sectorSize - 1)
        let most = features.contains(.segmentMaximum) ? UInt64(device.config32(12)) : 1
        // Header and status are entries of the table too.
        guard size > 2, piece > 0 else {
            throw Failure("\(disk.name) has a queue or a size_max too small for a request")
        }
        segments = min(min(most, UInt64(size) - 2), disk.capacity &* Disk.sectorSize / piece)
        guard segments > 0 else { throw Failure("\(disk.name) has fewer than \(piece) bytes") }
        memoryPages = 5 + (piece + PageAllocator.pageSize - 1) / PageAllocator.pageSize
        guard let memory = unsafe pages.allocate(pages: memoryPages) else { throw Failure("no memory") }
        self.memory = memory
        memory.fill(count: 0x5000)
        fillTable()
        registers.store(size, VirtioMMIO.Register.queueSize)
        device.storeAddress(descriptors.value, VirtioMMIO.Register.queueDescriptors)
        device.storeAddress(available.value, VirtioMMIO.Register.queueDriver)
        device.storeAddress(used.value, VirtioMMIO.Register.queueDevice)
        registers.store(UInt32(1), VirtioMMIO.Register.queueReady)
        // No interrupts: the used ring is polled.
        available.store(UInt16(1))
        device.setDriverOK()
    }

    /// A read from sector 0 on.
    private func fillTable() {
        func write(_ index: UInt64, _ address: Address, _ length: UInt64, _ flags: UInt16) {
            let place = table + index * 16
            place.store(address.value)
            place.store(UInt32(length), 8)
            place.store(flags, 12)
            place.store(UInt16(index + 1), 14)
        }
        write(0, header, 16, DescriptorFlag.next)
        for segment in 1...segments { write(segment, data, piece, DescriptorFlag.next | DescriptorFlag.write) }
        write(segments + 1, status, 1, DescriptorFlag.write)
    }

    /// What is done with the requests.
    enum Purpose {
        /// Waits until all have completed.
        case wait
        /// Resets the device once the first bytes are there.
        case reset
        /// Offers each completed request again, forever. Nothing else is handled meanwhile, not even the power
        /// button.
        case endless
    }

    /// Keeps `count` reads in flight, or as many as fit in the queue.
    func run(_ count: UInt16, _ purpose: Purpose) throws(Failure) {
        let count = min(count, UInt16(size))
        for index in 0..<count {
            let descriptor = descriptors + UInt64(index) * 16
            descriptor.store(table.value)
            descriptor.store(UInt32((segments + 2) * 16), 8)
            descriptor.store(DescriptorFlag.indirect, 12)
            available.store(index, 4 + UInt64(index) * 2)
        }
        Console.print("flood \(disk.name): \(UInt64(count)) reads of \(segments * piece) bytes")
        data.store(Self.untouched)
        let begin = clock.now
        publish(count)
        while (data.load() as UInt64) == Self.untouched { spinPause() }
        switch purpose {
        case .wait:
            while (used.load(2) as UInt16) < count { spinPause() }
            Console.print("flood \(disk.name): completed within \((clock.now - begin) / 1000) us")
        case .reset: break
        case .endless:
            Console.print("flood \(disk.name): in flight")
            refill(count)
        }
        let start = clock.now
        device.status = 0
        while device.status != 0 { spinPause() }
        Console.print("flood \(disk.name): reset within \((clock.now - start) / 1000) us")
        unsafe pages.release(memory, pages: memoryPages)  // the device was reset before
        try disk.restart()
    }

    private func publish(_ index: UInt16) {
        fence()
        available.store(index, 2)
        fence()
        device.notify(queue: 0)
    }

    /// Offers each completed request again.
    private func refill(_ count: UInt16) -> Never {
        var seen: UInt16 = 0
        var offered = count
        while true {
            guard seen != used.load(2) as UInt16 else {
                spinPause()
                continue
            }
            fence()
            let head: UInt32 = used.load(4 + UInt64(UInt32(seen) % size) * 8)
            seen &+= 1
            available.store(UInt16(truncatingIfNeeded: head), 4 + UInt64(UInt32(offered) % size) * 2)
            offered &+= 1
            publish(offered)
        }
    }
}
