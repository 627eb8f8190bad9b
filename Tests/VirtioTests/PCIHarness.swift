// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import Linux
import PCI
import TestSupport
import Testing

@testable import Virtio

/// A function as its driver uses it (virtio 1.2 §4.1): MSI-X is on, with a vector for each queue and one for the
/// configuration.
final class PCIHarness: TransportHarness {
    let platform = RecordingPlatform()
    let transport: PCITransport
    var function: VirtioFunction { transport.function }

    static let common: UInt64 = 0, status: UInt64 = 0x1000, device: UInt64 = 0x2000, notifications: UInt64 = 0x3000,
        table: UInt64 = 0x4000, pendingBits: UInt64 = 0x5000

    init(device: any VirtioDevice, memory: GuestMemory, queues: VirtqueueFormat = .split) throws {
        transport = try PCITransport(device: device, memory: memory, platform: platform, address: 0, queues: queues)
        transport.writeConfiguration(0x0006, at: 4, size: 2)
        enableMessages()
        for vector in 0..<UInt64(transport.sources.count) { setVector(vector, data: 0x40 + UInt32(vector)) }
    }

    /// The first capability of a kind; for virtio's, of a type (§4.1.4).
    func capability(_ identifier: UInt32, type: UInt32? = nil) -> Int? {
        var offset = Int(transport.readConfiguration(at: 0x34, size: 1))
        while offset != 0 {
            if transport.readConfiguration(at: offset, size: 1) == identifier,
                type == nil || transport.readConfiguration(at: offset + 3, size: 1) == type
            {
                return offset
            }
            offset = Int(transport.readConfiguration(at: offset + 1, size: 1))
        }
        return nil
    }

    func enableMessages(_ control: UInt32 = 0x8000) {
        guard let offset = capability(0x11) else { return }
        transport.writeConfiguration(control, at: offset + 2, size: 2)
    }

    func setVector(_ vector: UInt64, address: UInt64 = 0xfee0_0000, data: UInt32, control: UInt32 = 0) {
        let entry = Self.table + vector * 16
        transport.writeBAR(0, address, at: entry, size: 8)
        transport.writeBAR(0, UInt64(data), at: entry + 8, size: 4)
        transport.writeBAR(0, UInt64(control), at: entry + 12, size: 4)
    }

    func get(_ offset: UInt64, _ size: Int) -> UInt32 {
        UInt32(truncatingIfNeeded: transport.readBAR(0, at: offset, size: size))
    }
    func set(_ offset: UInt64, _ size: Int, _ value: UInt32) {
        transport.writeBAR(0, UInt64(value), at: offset, size: size)
    }

    private func select(_ queue: UInt32) { set(22, 2, UInt32(UInt16(clamping: queue))) }

    var deviceID: UInt32 { transport.readConfiguration(at: 2, size: 2) - 0x1040 }
    var status: UInt32 {
        get { self.get(20, 1) }
        set {
            if newValue & 4 != 0 { assignVectors() }
            set(20, 1, newValue)
        }
    }

    private func assignVectors() {
        set(16, 2, 0)
        for queue in 1..<UInt32(transport.sources.count) {
            select(queue - 1)
            set(26, 2, queue)
        }
    }

    func deviceFeatures(word: UInt32) -> UInt32 {
        set(0, 4, word)
        return get(4, 4)
    }
    func setDriverFeatures(word: UInt32, to bits: UInt32) {
        set(8, 4, word)
        set(12, 4, bits)
    }
    func maximumSize(ofQueue queue: UInt32) -> UInt32 {
        select(queue)
        return get(24, 2)
    }
    func configure(queue: UInt32, as configuration: QueueConfiguration) {
        select(queue)
        set(24, 2, configuration.size)
        for (offset, address) in [
            (32, configuration.descriptorTable), (40, configuration.availableRing), (48, configuration.usedRing),
        ] as [(UInt64, GuestAddress)] {
            set(offset, 4, UInt32(truncatingIfNeeded: address.rawValue))
            set(offset + 4, 4, UInt32(truncatingIfNeeded: address.rawValue >> 32))
        }
    }
    func isReady(queue: UInt32) -> Bool {
        select(queue)
        return get(28, 2) == 1
    }
    func enable(queue: UInt32) {
        select(queue)
        set(28, 2, 1)
    }
    func disable(queue: UInt32) -> Bool { false }
    func reset(queue: UInt32) {
        select(queue)
        set(58, 2, 1)
        #expect(get(58, 2) == 0, "a reset that is under way")
    }
    func kick(queue: UInt32) {
        guard queue < 0x400 else { return }
        set(Self.notifications + UInt64(queue) * 4, 2, queue)
    }
    var configurationGeneration: UInt32 { self.get(21, 1) }
    func readConfiguration(at offset: UInt64, size: Int) -> UInt64 {
        transport.readBAR(0, at: Self.device + offset, size: size)
    }
    func writeConfiguration(_ value: UInt64, at offset: UInt64, size: Int) {
        transport.writeBAR(
            0, value & (size == 8 ? .max : 1 << UInt64(8 * size) - 1), at: Self.device + offset, size: size)
    }
    func takeInterrupt(ofQueue queue: Int) -> Bool { take(queue) }
    func takeConfigurationInterrupt() -> Bool { take(transport.sources.count - 1) }

    /// What a source sends now; nil when nothing.
    func message(ofSource source: Int) -> MSIMessage? { platform.message(of: transport.sources[source].event) }

    private func take(_ source: Int) -> Bool {
        message(ofSource: source) != nil && transport.sources[source].event.drain() > 0
    }
}
