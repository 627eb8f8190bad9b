// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import Linux
import PCI
import TestSupport
import Virtio

extension FuzzTarget {
    /// Any sequence of accesses to configuration space, by both mechanisms, and to BARs, wherever the driver has put
    /// them.
    ///
    /// An operation has 8 bytes: what it is, the function, an offset (2, little-endian) and a value (4).
    static let pci = FuzzTarget(name: "pci", seeds: sequences) { bytes in
        guard let bus = try? FuzzedBus() else { fatalError("no eventfds") }
        for start in stride(from: 0, to: min(bytes.count, 4096) - 7, by: 8) { bus.run(Array(bytes[start..<start + 8])) }
        return bus.check()
    }

    private static let sequences = [
        bringUp(function: 0, address: 0xc000_0000),
        bringUp(function: 1, address: 0xc123_8000) + bringUp(function: 2, address: 0xcfff_8000),
        // Over each other, moved, disabled and back.
        bringUp(function: 0, address: 0xc000_0000) + bringUp(function: 1, address: 0xc000_0000)
            + operation(0, 0, 0x10, 0xc800_0000) + operation(1, 1, 4, 0) + operation(1, 1, 4, 6) + kicks(0) + kicks(1),
    ]

    private static func operation(_ kind: UInt8, _ function: UInt8, _ offset: UInt16, _ value: UInt32) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 8)
        (bytes[0], bytes[1]) = (kind, function)
        put(&bytes, 2, UInt64(offset), 2)
        put(&bytes, 4, UInt64(value), 4)
        return bytes
    }

    /// What a driver does: sizes and places the BAR, turns MSI-X on, negotiates, and assigns vectors.
    private static func bringUp(function: UInt8, address: UInt32) -> [UInt8] {
        var bytes = operation(0, function, 0x10, .max) + operation(4, function, 0x10, 0)
        bytes += operation(0, function, 0x10, address) + operation(1, function, 4, 6)
        bytes += operation(1, function, FuzzedBus.messages + 2, 0x8000)
        for vector in 0..<3 as Range<UInt16> {
            bytes += operation(8, function, 0x4000 + vector * 16, 0xfee0_0000)
            bytes += operation(8, function, 0x4008 + vector * 16, 0x40 + UInt32(vector))
            bytes += operation(8, function, 0x400c + vector * 16, 0)
        }
        for status in [0, 1, 3] as [UInt32] { bytes += operation(10, function, 20, status) }
        bytes += operation(8, function, 8, 1) + operation(8, function, 12, 1) + operation(10, function, 20, 11)
        bytes += operation(9, function, 16, 0) + operation(9, function, 26, 1) + operation(8, function, 32, 0x1000)
        bytes += operation(8, function, 40, 0x2000) + operation(8, function, 48, 0x3000) + operation(9, function, 28, 1)
        return bytes + operation(10, function, 20, 15) + kicks(function)
    }

    private static func kicks(_ function: UInt8) -> [UInt8] {
        operation(9, function, 0x3000, 0) + operation(28, function, 0, 1) + operation(12, function, 0x5000, 0)
    }
}

/// Three functions behind a bridge.
private final class FuzzedBus {
    /// Where MSI-X is in the functions' list of capabilities.
    static let messages: UInt16 = 0x98
    private static let windows: [Range<UInt64>] = [0xc000_0000..<0xd000_0000, 0x10_0000_0000..<0x20_0000_0000]

    private let bridge = PCIHostBridge(windows: windows)
    private var functions: [(address: PCIAddress, transport: PCITransport, platform: RecordingPlatform)] = []

    init() throws {
        let memory = try GuestMemory(size: 1 << 20)
        for number in 0..<3 as Range<UInt8> {
            // The last two are functions of one device.
            let address = PCIAddress(device: number == 0 ? 1 : 2, function: number == 2 ? 1 : 0),
                platform = RecordingPlatform()
            let transport = try PCITransport(
                device: SilentDevice(), memory: memory, platform: platform, address: 0xc000_0000 + UInt64(number) << 15)
            bridge.insert(transport, at: address)
            functions.append((address, transport, platform))
        }
    }

    private func ones(_ size: Int) -> UInt64 { size == 8 ? .max : 1 << UInt64(8 * size) - 1 }

    func run(_ operation: [UInt8]) {
        let function = functions[Int(operation[1]) % 3]
        let offset = UInt64(operation[2]) | UInt64(operation[3]) << 8
        let value = (4..<8).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64(operation[$1]) }
        let isWide = operation[0] & 0x80 != 0
        let size = isWide ? 8 : [4, 2, 1, 8][Int(operation[0] & 3)]
        let number = UInt64(function.address.device) << 15 | UInt64(function.address.function) << 12
        // Where the BAR is now, or what its registers say if it is not decoded.
        let base = function.transport.placements.first?.range.lowerBound ?? 0xc000_0000
        switch operation[0] >> 2 & 7 {
        case 0: bridge.writeECAM(value, at: number + offset & 0x1fff, size: size)
        case 1: expect(bridge.readECAM(at: number + offset & 0x1fff, size: size), size)
        case 2: bridge.write(value | (isWide ? value << 32 : 0), at: base &+ offset, size: size)
        case 3: expect(bridge.read(at: base &+ offset, size: size), size)
        case 4:
            bridge.writePort(UInt32(truncatingIfNeeded: 1 << 31 | number >> 4 | offset & 0xff), 0, size: 4)
            bridge.writePort(UInt32(truncatingIfNeeded: value), UInt16(4 + offset & 3), size: min(size, 4))
        case 5:
            bridge.writePort(
                UInt32(truncatingIfNeeded: value), UInt16(truncatingIfNeeded: offset & 7), size: min(size, 4))
            expect(
                UInt64(bridge.readPort(UInt16(truncatingIfNeeded: offset >> 8 & 7), size: min(size, 4))), min(size, 4))
        case 6:
            bridge.remove(at: function.address)
            if value & 1 == 0 { bridge.insert(function.transport, at: function.address) }
        default:
            for interrupt in function.transport.function.interrupts.queues { interrupt.signal() }
            if value & 1 != 0 { function.transport.function.interrupts.configuration.signal() }
        }
    }

    private func expect(_ value: UInt64, _ size: Int) {
        precondition(value & ~ones(size) == 0, "bits beyond the access")
    }

    /// Checks what is to be true after any sequence.
    /// - Returns: whether a function is decoded and has connected an interrupt.
    func check() -> Bool {
        var isInUse = false
        for (address, transport, platform) in functions {
            precondition(platform.mistakes.isEmpty, platform.mistakes.joined(separator: ", "))
            // As long as it is there, its doorbells are where its BAR is, in a window, and nowhere else.
            let isThere = bridge.readConfiguration(of: address, at: 0, size: 4) == 0x106a_1af4
            let places =
                isThere
                ? transport.placements.map(\.range).filter { range in
                    Self.windows.contains { $0.contains(range.lowerBound) && range.upperBound <= $0.upperBound }
                } : []
            let doorbells = places.flatMap { place in
                [UInt64(0), 1].map { place.lowerBound + PCITransport.Region.notifications + $0 * 4 }
            }
            precondition(
                platform.doorbells.keys.sorted() == doorbells,
                "doorbells at \(platform.doorbells.keys), the BAR at \(places)")
            let control = transport.readConfiguration(at: Int(Self.messages) + 2, size: 2),
                command = transport.readConfiguration(at: 4, size: 2)
            let mayInterrupt = control & 0xc000 == 0x8000 && command & 4 != 0
            precondition(mayInterrupt || platform.connectionCount == 0, "an interrupt that is off is connected")
            precondition(control & 0x8000 != 0 || platform.routes.isEmpty, "a route of a function without MSI-X")
            precondition(
                !platform.isPinAsserted || control & 0x8000 == 0 && command & 0x400 == 0, "the pin is asserted")
            isInUse = isInUse || !doorbells.isEmpty && platform.connectionCount > 0
            bridge.remove(at: address)
            transport.disconnect()
            precondition(
                platform.doorbells.isEmpty && platform.connectionCount == 0 && platform.routes.isEmpty
                    && !platform.isPinAsserted)
        }
        return isInUse
    }
}

/// A device that does nothing.
private final class SilentDevice: VirtioDevice {
    let name = "fuzz0"
    let deviceID: UInt32 = 42
    let features: FeatureSet = []
    let maximumQueueSizes: [UInt16] = [8, 8]
    let configuration = ConfigurationSpace([1, 2, 3, 4])

    func start(first: @escaping @Sendable () -> Void) {}
    func activate(_ activation: Activation) {}
    func reset() {}
    func stopQueue(_ index: Int) {}
    func startQueue(_ configuration: QueueConfiguration) {}
    func pause(onQuiet: @escaping @Sendable () -> Void) { onQuiet() }
    func resume() {}
}
