// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import Linux
import Virtio

extension FuzzTarget {
    /// Any sequence of accesses to the registers of a virtio-mmio device.
    ///
    /// An operation has 8 bytes: what it is, a size, an offset (2, little-endian) and a value (4).
    static let mmio = FuzzTarget(name: "mmio", seeds: [bringUp(), bringUp() + again()]) { bytes in
        guard let memory = try? GuestMemory(size: 1 << 20) else { fatalError("no memory for a guest") }
        let device = CountingDevice()
        guard let transport = try? MMIOTransport(device: device, memory: memory) else { fatalError("no eventfds") }
        for start in stride(from: 0, to: min(bytes.count, 4096) - 7, by: 8) {
            let operation = bytes[start..<start + 8]
            let offset = UInt64(bytes[start + 2]) | UInt64(bytes[start + 3]) << 8
            let value = operation.suffix(4).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
            let size = [4, 1, 2, 8, 3, 0, 16, 4][Int(bytes[start + 1] & 7)]
            switch bytes[start] & 3 {
            case 0, 1: transport.write(value, at: offset, size: size)
            case 2:
                let read = transport.read(at: offset, size: size)
                precondition(size >= 8 || size == 0 || read >> UInt64(8 * size) == 0, "bits beyond the access")
            default: transport.function.interrupts.queues[Int(value & 1)].signal()
            }
            let status = DeviceStatus(rawValue: UInt32(truncatingIfNeeded: transport.read(at: 0x70, size: 4)))
            precondition(!status.contains(.driverOK) || status.contains(.featuresOK), "DRIVER_OK without FEATURES_OK")
            precondition(device.isActive == status.contains(.driverOK), "the device does not know its driver's state")
        }
        let wasActive = device.activations > 0
        transport.write(0, at: 0x70, size: 4)
        precondition(!device.isActive && transport.read(at: 0x70, size: 4) == 0, "the reset did nothing")
        return wasActive
    }

    private static func operation(_ offset: UInt16, _ value: UInt32, kind: UInt8 = 0, size: UInt8 = 0) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 8)
        (bytes[0], bytes[1]) = (kind, size)
        put(&bytes, 2, UInt64(offset), 2)
        put(&bytes, 4, UInt64(value), 4)
        return bytes
    }

    /// What a driver does.
    private static func bringUp() -> [UInt8] {
        var bytes: [UInt8] = []
        for status in [0, 1, 3] as [UInt32] { bytes += operation(0x70, status) }
        bytes += operation(0x14, 1) + operation(0x10, 0, kind: 2) + operation(0x24, 1) + operation(0x20, 1)
        bytes += operation(0x70, 11) + operation(0x70, 0, kind: 2)
        for queue in [0, 1] as [UInt32] {
            bytes += operation(0x30, queue) + operation(0x34, 0, kind: 2) + operation(0x38, 8)
            for register in [0x80, 0x90, 0xa0] as [UInt16] {
                bytes += operation(register, 0x1000 * (queue + 1) + UInt32(register) * 4) + operation(register + 4, 0)
            }
            bytes += operation(0x44, 1)
        }
        return bytes + operation(0x70, 15) + operation(0x50, 0) + operation(0x60, 0, kind: 2) + operation(0x64, 3)
    }

    /// The configuration, interrupts, a queue's reset, and the device's.
    private static func again() -> [UInt8] {
        operation(0x100, 0, kind: 2, size: 1) + operation(0xfc, 0, kind: 2) + operation(0, 1, kind: 3)
            + operation(0x30, 1) + operation(0xc0, 1) + operation(0x44, 1) + operation(0x70, 0)
    }
}

/// A device that knows whether it has a driver.
private final class CountingDevice: VirtioDevice, @unchecked Sendable {
    // One thread uses it: hence `Sendable`.
    let name = "fuzz0"
    let deviceID: UInt32 = 42
    let features: FeatureSet = []
    let maximumQueueSizes: [UInt16] = [8, 8]
    let configuration = ConfigurationSpace([1, 2, 3, 4])
    private(set) var isActive = false
    private(set) var activations = 0

    func start(first: @escaping @Sendable () -> Void) {}
    func activate(_ activation: Activation) {
        precondition(!isActive, "activated twice")
        isActive = true
        activations += 1
    }
    func reset() { isActive = false }
    func stopQueue(_ index: Int) { precondition(isActive && index < 2, "queue \(index) was stopped") }
    func startQueue(_ configuration: QueueConfiguration) {
        precondition(isActive && configuration.index < 2, "queue \(configuration.index) was started")
    }
    func pause(onQuiet: @escaping @Sendable () -> Void) { onQuiet() }
    func resume() {}
}
