// SPDX-License-Identifier: Apache-2.0

import Devices
import GuestMemory
import Virtio

extension FuzzTarget {
    /// A balloon whose queues, requests and page numbers are the input's.
    ///
    /// The first byte has the features; the rest is guest RAM from the rings on.
    static let balloon = FuzzTarget(
        name: "balloon", seeds: [requests(features: 0x3f), requests(features: 0x26)]
    ) { bytes in
        guard let kind = bytes.first, let memory = try? GuestMemory(size: ramSize) else { return false }
        let settings = BalloonSettings(
            target: 64 << 10, deflatesOnOOM: kind & 4 != 0, statisticsInterval: kind & 2 != 0 ? 3600 : 0,
            reportsFreePages: kind & 32 != 0, hintsFreePages: kind & 8 != 0)
        guard let device = try? BalloonDevice(name: "fuzz0", settings: settings), (try? device.start()) != nil,
            let transport = try? MMIOTransport(
                device: device, memory: memory, queues: kind & 64 != 0 ? .packed : .split),
            (try? memory.ram.write(Array(bytes.dropFirst().prefix(0xe000)), at: GuestAddress(rings))) != nil
        else { fatalError("no device for the input") }
        func write(_ register: UInt64, _ value: UInt32) { transport.write(UInt64(value), at: register, size: 4) }
        for status: UInt32 in [0, 1, 3] { write(0x70, status) }
        for word: UInt32 in 0..<2 {
            write(0x24, word)
            write(0x20, transport.function.offered[word: word] & ~(1 << 29))
        }
        write(0x70, 11)
        if kind & 8 != 0 { _ = device.requestHints(acknowledgesEnd: kind & 1 != 0) }
        for queue: UInt32 in 0..<5 {
            let base = UInt32(rings) + queue * 0x100
            write(0x30, queue)
            write(0x38, 8)
            for (register, address) in [(0x80 as UInt64, base), (0x90, base + 128), (0xa0, base + 160)] {
                write(register, address)
                write(register + 4, 0)
            }
            write(0x44, 1)
        }
        // Returns when each queue was served once.
        write(0x70, 15)
        write(0x100 + 12, UInt32(kind))
        for queue: UInt32 in 0..<5 { write(0x50, queue) }
        device.setTarget(0)
        let needsReset = transport.read(at: 0x70, size: 4) & 64 != 0
        write(0x70, 0)
        let statistics = device.statistics
        precondition(statistics.actual == 0 && statistics.target == 0 && statistics.hintCommand == 0)
        return !needsReset && transport.function.counters.requests.value > 0
    }

    private static let ramSize: UInt64 = 64 << 10
    private static let rings: UInt64 = 0x1000

    /// A request in each queue of a split kind: page numbers, a command, a range, statistics.
    private static func requests(features: UInt8) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 1 + 0x700)
        bytes[0] = features
        let data = 0x500
        for queue in 0..<5 {
            let base = 1 + queue * 0x100
            put(&bytes, base, queue < 4 ? rings + UInt64(data) : 0x8000, 8)
            put(&bytes, base + 8, queue < 4 ? 40 : 0x2000, 4)
            put(&bytes, base + 12, queue < 4 ? 0 : 2, 2)
            put(&bytes, base + 128 + 2, 1, 2)
        }
        for (index, page) in [9, 8, 10, 12, 2, 0x10, 0xffff_ffff, 11, 11, 13].enumerated() {
            put(&bytes, 1 + data + 4 * index, UInt64(page), 4)
        }
        return bytes
    }
}
