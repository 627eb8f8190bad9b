// SPDX-License-Identifier: Apache-2.0

import CAllocationCounter
import GuestMemory
import Linux
import Metadata
import TestSupport
import Testing

@testable import Devices
@testable import Virtio

/// The way of a frame allocates nothing, in any build. The two paths run on the test's own thread, which the counter
/// counts.
@Suite(.timed) struct NetworkAllocationTests {
    /// A queue of 64 in guest RAM, with a chain of one buffer for each descriptor, offered again and again.
    private struct Ring {
        let ram: GuestRAM
        let configuration: QueueConfiguration

        init(_ ram: GuestRAM, number: Int, buffers: [UInt8], isWritable: Bool) throws {
            self.ram = ram
            var queue = NetworkDriver.Queue(ram: ram, size: 64, base: 0x1_0000 * UInt64(number + 1))
            try queue.clear()
            for slot in 0..<64 as Range<UInt64> {
                let address = NetworkDriver.buffers + UInt64(number) * 0x10_0000 + slot * 0x1000
                try ram.write(buffers, at: GuestAddress(address))
                try queue.offer([.init(address: address, length: UInt32(buffers.count), isWritable: isWritable)])
            }
            var configuration = QueueConfiguration(index: number, maximumSize: 64)
            configuration.descriptorTable = GuestAddress(queue.descriptors)
            configuration.availableRing = GuestAddress(queue.available)
            configuration.usedRing = GuestAddress(queue.used)
            configuration.isReady = true
            self.configuration = configuration
        }

        /// All that the device has returned is offered again; heads come back in the order they were offered in.
        func offerAgain() throws {
            let used = try ram.readUInt16(at: configuration.usedRing &+ 2)
            try ram.write(used &+ 64, at: configuration.availableRing &+ 2)
        }
    }

    @Test(
        arguments: [[], .eventIndex, .mergeableBuffers, [.mergeableBuffers, .eventIndex]] as [FeatureSet],
        [false, true])
    func framesAllocateNothing(_ features: FeatureSet, isStream: Bool) throws {
        let memory = try GuestMemory(size: 4 << 20)
        let (wire, card) = try Wire.open(isStream: isStream)
        let socket = FileDescriptor(owning: card)
        let length = features.contains(.mergeableBuffers) ? 600 : 2048
        let buffers = try Ring(memory.ram, number: 0, buffers: frame(length), isWritable: true)
        let frames = try Ring(memory.ram, number: 1, buffers: plainHeader + frame(1500), isWritable: false)
        let device = DeviceCounters(), counters = NetworkCounters()
        let irqfd = try IRQFD()
        let interrupts = DeviceInterrupts(
            configuration: ConfigurationInterrupt(irqfd, counters: device),
            queues: (0..<2).map { _ in QueueInterrupt(irqfd, counters: device) })
        let activation = Activation(
            features: features, queues: [buffers.configuration, frames.configuration], memory: memory,
            interrupts: interrupts, doorbells: [], counters: device)
        // For whose address none of the frames is.
        let link = try MetadataLink(MetadataService(MetadataStore()))
        var receive = ReceivePath(
            tap: socket.rawValue, headerSize: isStream ? 0 : 12,
            reader: isStream ? try FrameReader(socket: socket.rawValue) : nil, spill: try ReceivePath.makeSpill(),
            coalescer: try InterruptCoalescer(QueueCoalescing()), counters: counters, pair: 0, events: .none,
            metadata: link)
        receive.mode.isMergeable = features.contains(.mergeableBuffers)
        receive.mode.longestFrame = 1530
        receive.start(try activation.makeQueue(0), interrupts.queues[0])
        var transmit = TransmitPath(
            tap: socket.rawValue, headerSize: isStream ? 0 : 12,
            writer: isStream ? try FrameWriter(socket: socket.rawValue) : nil, queueSize: 64,
            coalescer: try InterruptCoalescer(QueueCoalescing()), counters: counters, pair: 0, events: .none,
            metadata: link)
        transmit.start(try activation.makeQueue(1), interrupts.queues[1])
        // On a stream with its length, 1500, in place of the header.
        let frame = (isStream ? [0, 0, 5, 0xdc] : plainHeader) + frame(1500)
        var scratch = [UInt8](repeating: 0, count: 4096)

        let rounds = 100
        var attempts = 0
        // Unoptimized code makes the metadata of a generic type when the type is first used, also on a way that is
        // rarely gone: that is once for a type, not for a frame. So one of a few attempts has to be without any
        // allocation.
        while true {
            attempts += 1
            let before = allocation_count()
            for _ in 0..<rounds {
                for _ in 0..<20 { try wire.send(frame) }
                guard try receive.run(activation) == .drained else {
                    throw NothingCame(description: "not all frames were taken")
                }
                try buffers.offerAgain()
                guard try transmit.run(activation, isLinkUp: true) == .drained else {
                    throw NothingCame(description: "not all frames were sent")
                }
                var left = 64 * frame.count
                while left > 0 { left -= try wire.next(into: &scratch) }
                try frames.offerAgain()
            }
            let allocations = allocation_count() - before
            if allocations == 0 { break }
            if attempts == 5 {
                Issue.record("\(allocations) allocations for \(rounds * 84) frames, in the fifth attempt too")
                break
            }
        }
        #expect(
            counters.receivedFrames == UInt64(attempts * rounds * 20)
                && counters.sentFrames == UInt64(attempts * rounds * 64))
        #expect(counters.receiveDrops == 0 && counters.sendDrops == 0)
    }
}
