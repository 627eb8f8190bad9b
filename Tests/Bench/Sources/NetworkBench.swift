// SPDX-License-Identifier: Apache-2.0

import CBench
import CLinux
import Devices
import Glibc
import GuestMemory
import HostNetwork

/// (d) Packets through a TAP: from a driver in this process through the network device model to the host, and back;
/// beside a loop of bare reads and writes of a TAP.
enum NetworkBench {
    /// The size of the queues, which is less than a TAP's queue, so that no packet is lost.
    static let burst = 256
    private static let sent = 100_000
    private static let bursts = 200

    static func run(_ setup: Setup) throws -> [Row] {
        let card = try Card(interface: "swbench0")
        let bare = "swbench1"
        let tap = try checked(bench_tap_open(bare), "a TAP")
        defer { close(tap) }
        let toCard = try checked(bench_packet_socket("swbench0"), "a packet socket")
        let toBare = try checked(bench_packet_socket(bare), "a packet socket")
        defer {
            close(toCard)
            close(toBare)
        }
        var rows: [Row] = []
        for size in [60, 1514] {
            let send = try interleave(
                setup.runs,
                [
                    { try time { try card.send(sent, size: size) } },
                    { try time { _ = try checked(bench_tap_write(tap, UInt32(sent), size), "writing to a TAP") } },
                ])
            // The host sends a burst to the TAP, from which it is then read; both together are timed, in both cases.
            let receive = try interleave(
                setup.runs,
                [
                    {
                        try time {
                            for _ in 0..<bursts {
                                _ = try checked(bench_inject(toCard, UInt32(burst), size), "sending to a TAP")
                                try card.receive(burst, size: size)
                            }
                        }
                    },
                    {
                        try time {
                            for _ in 0..<bursts {
                                _ = try checked(bench_inject(toBare, UInt32(burst), size), "sending to a TAP")
                                _ = try checked(bench_tap_read(tap, UInt32(burst), size), "reading from a TAP")
                            }
                        }
                    },
                ])
            rows += Self.rows("guest → TAP", send, sent, size, "bare write(2) to a TAP")
            rows += Self.rows("TAP → guest", receive, bursts * burst, size, "bare read(2) from a TAP")
        }
        return rows
    }

    private static func rows(_ way: String, _ seconds: [[Double]], _ count: Int, _ size: Int, _ peer: String) -> [Row] {
        func row(_ unit: String, _ each: Double) -> Row {
            let samples = seconds.map { Sample($0.map { Double(count) * each / $0 }) }
            return Row(name: "\(way), \(size) bytes", unit: unit, ours: samples[0], peer: (peer, samples[1]))
        }
        return [row("1000/s", 1e-3), row("MB/s", Double(size) / 1e6)]
    }

    private static func checked(_ result: Int32, _ what: String) throws -> Int32 {
        guard result >= 0 else { throw BenchError("\(what): \(String(cString: strerror(-result)))") }
        return result
    }
}

/// The driver of a network card (virtio 1.2 §5.1) with mergeable receive buffers.
private final class Card {
    private static let receive = 0, transmit = 1
    private static let header = 12
    private static let bufferSize: UInt64 = 2048

    private let driver: VirtioDriver
    private let device: NetworkDevice
    private let sendBuffers: UInt64
    private var freeToSend: [UInt16] = []

    init(interface: String) throws {
        let attachment = try NetworkAttachment(.tap(try InterfaceName(interface)))
        device = try NetworkDevice(
            name: "net0", address: try MACAddress(parsing: "02:00:00:00:00:02"), attachment: attachment)
        driver = try VirtioDriver(device, memory: try GuestMemory(size: 16 << 20), features: 1 << 15)
        let count = driver.queues[Self.receive].size
        sendBuffers = driver.buffers + Self.bufferSize * UInt64(count)
        for index in 0..<count {
            driver.queues[Self.receive].describe(
                index, driver.buffers + Self.bufferSize * UInt64(index), UInt32(Self.bufferSize), isWritable: true)
            driver.queues[Self.receive].offer(index)
        }
        driver.publish(Self.receive)
        freeToSend = Array(0..<driver.queues[Self.transmit].size)
    }

    /// Sends frames and waits until the device has used them all.
    func send(_ count: Int, size: Int) throws {
        for index in 0..<driver.queues[Self.transmit].size {
            let buffer = sendBuffers + Self.bufferSize * UInt64(index)
            bench_frame((driver.host(buffer) + Self.header).assumingMemoryBound(to: UInt8.self), size)
            driver.queues[Self.transmit].describe(index, buffer, UInt32(Self.header + size), isWritable: false)
        }
        let before = device.counters.sentFrames
        var left = count
        while left > 0 || driver.queues[Self.transmit].inFlight > 0 {
            while left > 0, let head = freeToSend.popLast() {
                driver.queues[Self.transmit].offer(head)
                left -= 1
            }
            driver.publish(Self.transmit)
            // Three quarters of the frames in flight, so that neither side always waits for the other.
            try driver.wait(Self.transmit, count: max(1, driver.queues[Self.transmit].inFlight / 4 * 3))
            while let (head, _) = driver.queues[Self.transmit].take() { freeToSend.append(head) }
        }
        let passed = device.counters.sentFrames - before
        guard passed == UInt64(count) else { throw BenchError("\(passed) of \(count) frames were sent") }
    }

    /// Receives frames until there were `count` of that size.
    func receive(_ count: Int, size: Int) throws {
        var left = count
        while left > 0 {
            try driver.wait(Self.receive)
            while let (head, written) = driver.queues[Self.receive].take() {
                if written == UInt32(Self.header + size) { left -= 1 }
                driver.queues[Self.receive].offer(head)
            }
            driver.publish(Self.receive)
        }
    }
}
