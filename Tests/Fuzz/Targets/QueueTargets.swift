// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import TestSupport
import Virtio

extension FuzzTarget {
    /// A split virtqueue and a packed one, whose rings, tables and buffers are the input's.
    ///
    /// The first byte has features and the queue's size; the rest is guest RAM from the descriptors on.
    static let queues = [
        FuzzTarget(name: "virtqueue", seeds: [splitChain(indirect: false), splitChain(indirect: true)]) { bytes in
            serves(bytes, isPacked: false)
        },
        FuzzTarget(name: "virtqueue-packed", seeds: [packedChain(indirect: false), packedChain(indirect: true)]) {
            bytes in serves(bytes, isPacked: true)
        },
    ]

    private static let ramSize: UInt64 = 64 << 10
    private static let table: UInt64 = 0x1000
    private static let size: UInt16 = 8
    /// Behind the descriptors, as they are for a queue of eight.
    private static let driverArea: UInt64 = table + 128
    private static let deviceArea: UInt64 = driverArea + 32
    private static let buffers: UInt64 = table + 0x200

    private static func serves(_ bytes: [UInt8], isPacked: Bool) -> Bool {
        guard let kind = bytes.first, let memory = try? GuestMemory(size: ramSize) else { return false }
        let ram = memory.ram
        var features: FeatureSet = isPacked ? [.version1, .packedRing] : .version1
        if kind & 1 == 0 { features.insert(.indirectDescriptors) }
        if kind & 2 != 0 { features.insert(.eventIndex) }
        guard (try? ram.write(Array(bytes.dropFirst().prefix(0x8000)), at: GuestAddress(table))) != nil else {
            fatalError("the input does not fit")
        }
        var configuration = QueueConfiguration(index: 0, maximumSize: size)
        // A packed queue may have any size.
        if isPacked { configuration.size = UInt32(size - UInt16(kind >> 2 & 3)) }
        configuration.descriptorTable = GuestAddress(table)
        configuration.availableRing = GuestAddress(driverArea)
        configuration.usedRing = GuestAddress(deviceArea)
        configuration.isReady = true
        let ranges = memory.regions.map { UInt(bitPattern: $0.host)..<UInt(bitPattern: $0.host) + UInt($0.size) }
        let pool = IOVectorPool(slots: 1, capacity: Int(size))
        var chains = 0
        do throws(VirtqueueError) {
            var queue = try Virtqueue(configuration, features: features, ram: ram)
            for round in 0..<20 {
                queue.disableNotifications()
                while chains < 64, let chain = try queue.pop(into: pool[0]) {
                    chains += 1
                    check(chain, size: queue.size, within: ranges)
                    if round % 3 == 2, chains % 5 == 0 {
                        queue.rewind()
                        break
                    }
                    chain.writable.fill(count: 100, with: 0x5a)
                    queue.push(chain.head, written: UInt32(truncatingIfNeeded: chain.writable.byteCount))
                }
                _ = queue.publish()
                precondition(queue.inFlight == 0, "\(queue.inFlight) chains are in flight")
                if !queue.enableNotifications() { break }
            }
        } catch {
            precondition(!error.description.isEmpty)
            return false
        }
        return chains > 0
    }

    private static func check(_ chain: DescriptorChain, size: UInt16, within ranges: [Range<UInt>]) {
        precondition(chain.entries <= size && chain.readable.count + chain.writable.count == chain.entries)
        for run in [chain.readable, chain.writable] {
            var count: UInt64 = 0
            for index in 0..<run.count {
                let buffer = run.base[index]
                let start = UInt(bitPattern: buffer.iov_base), length = UInt(buffer.iov_len)
                precondition(ranges.contains { $0.contains(start) && length <= $0.upperBound - start }, "out of RAM")
                count += UInt64(length)
            }
            precondition(count == run.byteCount)
        }
    }

    // MARK: - Seeds

    private static func descriptor(
        _ bytes: inout [UInt8], _ index: Int, _ address: UInt64, _ length: UInt64, _ third: UInt64, _ fourth: UInt64
    ) {
        let start = 1 + 16 * index
        put(&bytes, start, address, 8)
        put(&bytes, start + 8, length, 4)
        put(&bytes, start + 12, third, 2)
        put(&bytes, start + 14, fourth, 2)
    }

    /// A header to the device, and a buffer from it; the second chain is in a table of its own.
    private static func splitChain(indirect: Bool) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 1 + 0x240)
        bytes[0] = 2
        descriptor(&bytes, 0, buffers + 0x1000, 16, 1, 1)
        descriptor(&bytes, 1, buffers + 0x2000, 512, 2, 0)
        let available = 1 + Int(driverArea - table)
        put(&bytes, available + 2, indirect ? 2 : 1, 2)
        if indirect {
            descriptor(&bytes, 2, buffers, 32, 4, 0)
            let inner = Int(buffers - table) / 16
            descriptor(&bytes, inner, buffers + 0x1000, 16, 1, 1)
            descriptor(&bytes, inner + 1, buffers + 0x2000, 512, 2, 0)
            put(&bytes, available + 6, 2, 2)
        }
        return bytes
    }

    private static func packedChain(indirect: Bool) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 1 + 0x240)
        descriptor(&bytes, 0, buffers + 0x1000, 16, 0, 0x81)
        descriptor(&bytes, 1, buffers + 0x2000, 512, 5, 0x82)
        if indirect {
            descriptor(&bytes, 2, buffers, 32, 6, 0x84)
            let inner = Int(buffers - table) / 16
            descriptor(&bytes, inner, buffers + 0x1000, 16, 0, 0)
            descriptor(&bytes, inner + 1, buffers + 0x2000, 512, 0, 2)
        }
        return bytes
    }
}
