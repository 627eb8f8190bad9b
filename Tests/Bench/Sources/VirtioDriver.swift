// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import GuestMemory
import Virtio

/// A guest's driver in this process: it works on a device's registers and on rings in guest RAM as a guest would,
/// without KVM.
///
/// A kick writes QueueNotify, which signals the queue's eventfd as an ioeventfd does; an interrupt is the eventfd that
/// would be the irqfd. The driver waits for it with poll(2), so each wait is a change of threads, as it is for a guest
/// that sleeps.
final class VirtioDriver {
    let memory: GuestMemory
    let transport: MMIOTransport
    var queues: [DriverQueue] = []
    /// Guest RAM beyond the rings.
    let buffers: UInt64

    /// - Parameter features: of the device's type, by their bits; VERSION_1 and EVENT_IDX are added.
    init(_ device: any VirtioDevice, memory: GuestMemory, features: UInt64) throws {
        self.memory = memory
        try device.start()
        transport = try MMIOTransport(device: device, memory: memory)
        let ringSpace: UInt64 = 0x1_0000
        buffers = ringSpace * UInt64(device.maximumQueueSizes.count + 1)
        let host = memory.regions[0].host
        let wanted = features | 1 << 32 | 1 << 29
        write(0, 0x070)
        for status in [1, 3] as [UInt32] { write(status, 0x070) }
        for half in 0..<2 as Range<UInt32> {
            write(half, 0x024)
            write(UInt32(truncatingIfNeeded: wanted >> (32 * UInt64(half))), 0x020)
        }
        write(11, 0x070)
        guard read(0x070) & 8 != 0 else {
            throw BenchError("\(device.name) refuses the features 0x\(String(wanted, radix: 16))")
        }
        for (index, size) in device.maximumQueueSizes.enumerated() {
            let queue = DriverQueue(host: host, base: ringSpace * UInt64(index + 1), size: size)
            write(UInt32(index), 0x030)
            write(UInt32(size), 0x038)
            for (offset, address) in [(0x080, queue.table), (0x090, queue.available), (0x0a0, queue.used)]
                as [(UInt64, UInt64)]
            {
                write(UInt32(truncatingIfNeeded: address), offset)
                write(UInt32(truncatingIfNeeded: address >> 32), offset + 4)
            }
            write(1, 0x044)
            queues.append(queue)
        }
        write(15, 0x070)
    }

    deinit { write(0, 0x070) }

    private func read(_ offset: UInt64) -> UInt32 { UInt32(truncatingIfNeeded: transport.read(at: offset, size: 4)) }
    private func write(_ value: UInt32, _ offset: UInt64) { transport.write(UInt64(value), at: offset, size: 4) }

    /// The host address of a guest-physical address, which is below `memory.size`.
    func host(_ address: UInt64) -> UnsafeMutableRawPointer { memory.regions[0].host + Int(address) }

    /// Publishes the offered chains, and kicks the device if it has notifications enabled.
    func publish(_ queue: Int) {
        if queues[queue].publish() { write(UInt32(queue), 0x050) }
    }

    /// Waits for interrupts until the device has used `count` more chains.
    func wait(_ queue: Int, count: UInt16 = 1) throws {
        while !queues[queue].hasUsed(count) {
            var line = pollfd(fd: transport.irqfd.event.rawValue, events: Int16(POLLIN), revents: 0)
            guard poll(&line, 1, 30_000) == 1 else {
                throw BenchError("\(transport.function.device.name): no interrupt for queue \(queue)")
            }
            transport.irqfd.event.drain()
            write(read(0x060), 0x064)
        }
    }
}

/// The driver's side of a split virtqueue (virtio 1.2 §2.7).
struct DriverQueue {
    let size: UInt16
    let table: UInt64
    var available: UInt64 { table + 16 * UInt64(size) }
    var used: UInt64 { (available + 6 + 2 * UInt64(size) + 3) & ~3 }
    private let host: UnsafeMutableRawPointer
    private var offered: UInt16 = 0
    private var published: UInt16 = 0
    private(set) var taken: UInt16 = 0

    /// The number of chains that the device has.
    var inFlight: UInt16 { offered &- taken }

    init(host: UnsafeMutableRawPointer, base: UInt64, size: UInt16) {
        self.host = host
        self.size = size
        table = base
    }

    /// Writes a descriptor.
    func describe(_ index: UInt16, _ address: UInt64, _ length: UInt32, isWritable: Bool, next: UInt16? = nil) {
        let entry = host + Int(table) + 16 * Int(index)
        clinux_store64(entry, address)
        clinux_store32(entry + 8, length)
        clinux_store16(entry + 12, (isWritable ? 2 : 0) | (next == nil ? 0 : 1))
        clinux_store16(entry + 14, next ?? 0)
    }

    /// Adds a chain to the available ring; ``publish()`` publishes it.
    mutating func offer(_ head: UInt16) {
        clinux_store16(host + Int(available) + 4 + 2 * Int(offered & (size - 1)), head)
        offered &+= 1
    }

    /// Whether the device has notifications enabled.
    mutating func publish() -> Bool {
        let before = published
        clinux_store_release16(host + Int(available) + 2, offered)
        published = offered
        clinux_full_fence()
        let event = clinux_load16(host + Int(used) + 4 + 8 * Int(size))
        return offered &- event &- 1 < offered &- before
    }

    /// The next used chain.
    mutating func take() -> (head: UInt16, written: UInt32)? {
        guard clinux_load_acquire16(host + Int(used) + 2) != taken else { return nil }
        let entry = host + Int(used) + 4 + 8 * Int(taken & (size - 1))
        taken &+= 1
        return (UInt16(truncatingIfNeeded: clinux_load32(entry)), clinux_load32(entry + 4))
    }

    /// Whether the device has used `count` chains; if not, an interrupt is enabled for that.
    func hasUsed(_ count: UInt16) -> Bool {
        clinux_store16(host + Int(available) + 4 + 2 * Int(size), taken &+ count &- 1)
        clinux_full_fence()
        return clinux_load_acquire16(host + Int(used) + 2) &- taken >= count
    }
}
