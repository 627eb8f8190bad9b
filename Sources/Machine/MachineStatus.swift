// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
internal import Virtio

/// Figures of a running machine.
public struct MachineStatus: Sendable, CustomStringConvertible {
    public struct Device: Sendable {
        public let name: String
        public let requests: UInt64
        /// Kicks in all, and those of them that needed an exit to user space.
        public let kicks: UInt64
        public let exitKicks: UInt64
        public let interrupts: UInt64
        public let errors: UInt64
    }

    public let name: String
    public let cpus: Int
    /// Bytes.
    public let memorySize: UInt64
    /// nil when the kernel would not tell.
    public let memory: MemoryUsage?
    public let devices: [Device]

    /// One line.
    public var description: String {
        var parts = ["\(name): \(cpus) vCPU\(cpus == 1 ? "" : "s")"]
        if let memory {
            var text = "\(memory.resident >> 20) of \(memorySize >> 20) MiB resident, \(memory.dirty >> 20) dirty"
            if memory.transparentHuge > 0 { text += " (\(memory.transparentHuge >> 20) MiB in transparent huge pages)" }
            parts.append(text)
        }
        for device in devices {
            parts.append(
                "\(device.name) \(device.requests) requests, \(device.kicks) kicks (\(device.exitKicks) by exits), \(device.interrupts) interrupts, \(device.errors) errors")
        }
        return parts.joined(separator: "; ")
    }
}

extension MachineStatus {
    init(_ configuration: Configuration, _ memory: GuestMemory, _ devices: [VirtioSlot]) {
        self.init(
            name: configuration.name, cpus: configuration.cpus, memorySize: memory.size, memory: try? memory.usage(),
            devices: devices.map { slot in
                let counters = slot.transport.function.counters
                return Device(
                    name: slot.transport.function.device.name, requests: counters.requests.value, kicks: counters.kicks.value,
                    exitKicks: counters.exitKicks.value, interrupts: counters.interrupts.value, errors: counters.errors.value)
            })
    }
}
