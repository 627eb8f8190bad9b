// SPDX-License-Identifier: Apache-2.0

/// A virtio entropy device (virtio 1.2 §5.4): it fills the buffers of its one queue.
final class EntropySource {
    private static let patience = 10 * seconds

    let device: VirtioMMIO
    private let queue: Virtqueue
    private let buffer: Address
    /// The result of the current request.
    private var answer: (slot: UInt16, length: UInt32)?

    /// Bytes of the buffer.
    static let bufferSize: UInt64 = 64 << 10

    init(_ device: VirtioMMIO) throws(Failure) {
        self.device = device
        guard let buffer = unsafe pages.allocate(pages: Self.bufferSize / PageAllocator.pageSize) else {
            throw Failure("no memory for an entropy device")
        }
        self.buffer = buffer
        queue = try Virtqueue(device, index: 0, wanted: 8, features: try device.negotiate(.ring))
        device.setDriverOK()
        _ = queue.enableInterrupt()
        device.handleInterrupts { [self] in serve() }  // a driver lives as long as the kernel
    }

    private func serve() {
        _ = device.acknowledgeInterrupt()
        repeat {
            while let next = queue.next() { answer = next }
        } while !queue.enableInterrupt()
    }

    /// Requests `count` bytes, in two pieces of memory if `isSplit`; returns those received, valid until the next call.
    func bytes(_ count: UInt64, isSplit: Bool = false) throws(Failure) -> [UInt8] {
        buffer.fill(count: Self.bufferSize)
        answer = nil
        let half = isSplit ? count / 2 : count
        let first = Segment(address: buffer, length: UInt32(half))
        let second = isSplit ? Segment(address: buffer + half, length: UInt32(count - half)) : nil
        guard queue.add(first, second, readable: 0) != nil else { throw Failure("the queue is full") }
        queue.notify()
        guard interrupts.wait(until: clock.now + Self.patience, { answer != nil }), let answer else {
            throw Failure("no completion within \(Self.patience / seconds) s")
        }
        queue.release(answer.slot)
        guard answer.length <= count else {
            throw Failure("\(UInt64(answer.length)) bytes returned, \(count) requested")
        }
        return Array(buffer.bytes(Int(answer.length)))
    }
}

/// The source of random numbers, if there is one.
extension SelfTest {
    func entropy(isNamed: Bool) {
        guard let source = devices.entropy else {
            if isNamed { skip("rng", "no entropy device") }
            return
        }
        check("rng: requests of every size succeed, and no two results are equal") { () throws(Failure) in
            for count in [1, 16, 4096, EntropySource.bufferSize] as [UInt64] {
                try expect(source.bytes(count).count > 0, "no bytes of \(count)")
            }
            let one = try source.bytes(64), two = try source.bytes(64)
            try expect(one.count > 0 && two.count > 0, "no bytes")
            try expect(one.count < 16 || one != two, "twice the same bytes")
        }
        check("rng: a request with two buffers") { () throws(Failure) in
            let bytes = try source.bytes(128, isSplit: true)
            try expect(bytes.count <= 64 || bytes[64...].contains { $0 != 0 }, "the second was not filled")
        }
        check("rng: in 16384 bytes each value occurs, and none too often") { () throws(Failure) in
            var counts = [Int](repeating: 0, count: 256)
            var total = 0
            while total < 16384 {
                for byte in try source.bytes(4096).prefix(16384 - total) {
                    counts[Int(byte)] += 1
                    total += 1
                }
            }
            // 64 of each on average, with a deviation of 8: outside these bounds by chance at most once in 10^9 runs.
            for value in 0..<256 {
                try expect(
                    counts[value] > 0 && counts[value] < 160, "\(UInt64(value)) occurs \(UInt64(counts[value])) times")
            }
        }
    }
}
