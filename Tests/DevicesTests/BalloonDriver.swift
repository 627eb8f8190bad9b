// SPDX-License-Identifier: Apache-2.0

@testable import Devices
import GuestMemory
import Linux
import TestSupport
import Testing
@testable import Virtio

/// A driver of a balloon, which counts its queues as Linux' does.
final class BalloonDriver: QueueDriver {
    let device: BalloonDevice
    /// Where the driver has page numbers, and statistics.
    static let numbers: UInt64 = 0x8_0000

    init(
        _ settings: BalloonSettings = BalloonSettings(), features extra: FeatureSet = [], memory: GuestMemory? = nil
    ) throws {
        device = try BalloonDevice(name: "balloon0", settings: settings)
        let features = device.features.union(.version1).union(extra)
        try super.init(
            driving: device, features: features,
            queues: BalloonQueue.order(features, ready: []).count, memory: memory)
    }

    /// The number of a page of the driver's data.
    func page(_ index: UInt32) -> UInt32 { UInt32(Self.data >> 12) + index }

    /// Fills pages of data, so that they are resident.
    func fill(_ pages: UInt64) throws {
        try ram.fill(at: GuestAddress(Self.data), count: pages << 12, with: 0xee)
    }

    /// The first byte of a page of data.
    func byte(_ index: UInt32) throws -> UInt8 { try ram.readUInt8(at: GuestAddress(UInt64(page(index)) << 12)) }

    /// Bytes of the memory that are resident.
    var resident: UInt64 { get throws { try memory.usage().resident } }

    func put(_ numbers: [UInt32], at address: UInt64 = numbers) throws {
        for (index, number) in numbers.enumerated() {
            try ram.write(number, at: GuestAddress(address + 4 * UInt64(index)))
        }
    }

    /// Sends page numbers in one request and waits for it.
    func send(_ numbers: [UInt32], queue: Int = 0) throws {
        self.queue = queue
        try put(numbers)
        _ = try offer([Buffer(address: Self.numbers, length: 4 * numbers.count, isWritable: false)])
        kick()
        try wait(for: 1)
    }

    /// Sends ranges of memory in one request, as hints or reports are, and waits for it.
    func send(ranges: [(address: UInt64, length: Int)], queue: Int) throws {
        self.queue = queue
        _ = try offer(ranges.map { Buffer(address: $0.address, length: $0.length, isWritable: true) })
        kick()
        try wait(for: 1)
    }

    /// Makes statistics available.
    func offerStatistics(_ figures: [(tag: UInt16, value: UInt64)], extra: Int = 0) throws {
        queue = 2
        for (index, figure) in figures.enumerated() {
            let entry = GuestAddress(Self.numbers + 10 * UInt64(index))
            try ram.write(figure.tag, at: entry)
            try ram.write(figure.value, at: entry &+ 2)
        }
        _ = try offer([Buffer(address: Self.numbers, length: 10 * figures.count + extra, isWritable: false)])
        kick()
    }
}
