// SPDX-License-Identifier: Apache-2.0

internal import Devices
public import GuestMemory
internal import HostNetwork
internal import Sandbox
internal import Virtio

/// Figures of a running machine.
public struct MachineStatus: Sendable, CustomStringConvertible {
    public struct Device: Sendable {
        public let name: String
        public let requests: UInt64
        /// Bytes that the guest has read or received, and written or sent; nil of a device that does not count them.
        public let bytes: (in: UInt64, out: UInt64)?
        /// Kicks in all, and those of them that needed an exit to user space.
        public let kicks: UInt64
        public let exitKicks: UInt64
        public let interrupts: UInt64
        public let errors: UInt64
        /// Frames dropped in both directions, by the host's interface too; nil of a device without any.
        public let drops: UInt64?
        /// Indicates whether it is a disk that has stopped after an error on the host.
        public var isStopped = false
        /// Its queues, or pairs of queues, if it has several.
        public var queues: [Queue] = []
    }

    /// A queue of a disk, or a pair of queues of a network interface.
    public struct Queue: Sendable {
        /// Requests, or frames in both directions.
        public let requests: UInt64
        public let bytes: (in: UInt64, out: UInt64)

        public init(requests: UInt64, bytes: (in: UInt64, out: UInt64)) {
            self.requests = requests
            self.bytes = bytes
        }
    }

    public let name: String
    public let cpus: Int
    /// Bytes.
    public let memorySize: UInt64
    /// nil if the kernel does not report it.
    public let memory: MemoryUsage?
    public let devices: [Device]
    /// Indicates whether the machine is paused, by a request or for a disk that has stopped.
    public var isPaused = false
    /// The process's confinement; nil without.
    public var sandbox: String?

    /// A line for the machine, and a table of its devices of at most 80 columns.
    public var description: String {
        var first = "machine \(name): \(cpus) vCPU\(cpus == 1 ? "" : "s"), \(memorySize >> 20) MiB of RAM"
        if let memory {
            first += " (\(memory.resident >> 20) MiB resident, \(memory.dirty >> 20) MiB dirty"
            if memory.transparentHuge > 0 {
                first += ", \(memory.transparentHuge >> 20) MiB in transparent huge pages"
            }
            first += ")"
        }
        if isPaused {
            let stopped = devices.filter(\.isStopped).map(\.name)
            first += ", paused" + (stopped.isEmpty ? "" : " after an error of \(stopped.joined(separator: " and "))")
        }
        if let sandbox { first += ", sandbox \(sandbox)" }
        guard !devices.isEmpty else { return first }
        let head = ["device", "requests", "in", "out", "kicks", "exits", "interrupts", "errors", "drops"]
        return first + "\n" + Self.aligned([head] + devices.flatMap(Self.rows))
    }

    /// That of the device, then those of its queues: `blk0`, `blk0.0`, `blk0.1`.
    private static func rows(_ device: Device) -> [[String]] {
        let sum = [
            device.name, short(device.requests), device.bytes.map { size($0.in) } ?? "-",
            device.bytes.map { size($0.out) } ?? "-", short(device.kicks), short(device.exitKicks),
            short(device.interrupts), short(device.errors), device.drops.map(short) ?? "-",
        ]
        let queues = device.queues.enumerated().map { index, queue in
            ["\(device.name).\(index)", short(queue.requests), size(queue.bytes.in), size(queue.bytes.out)]
                + [String](repeating: "-", count: 5)
        }
        return [sum] + queues
    }

    private static func aligned(_ rows: [[String]]) -> String {
        let widths = rows[0].indices.map { column in rows.map { $0[column].count }.max() ?? 0 }
        return rows.map { row in
            row.enumerated().map { column, cell in
                let padding = String(repeating: " ", count: widths[column] - cell.count)
                return column == 0 ? cell + padding : padding + cell
            }.joined(separator: "  ")
        }.joined(separator: "\n")
    }

    /// At most six characters: 999999, 1234k, 12M.
    static func short(_ count: UInt64) -> String {
        var number = count
        var units = ["", "k", "M", "G", "T", "P", "E"][...]
        while number > (units.startIndex == 0 ? 999_999 : 99_999), units.count > 1 {
            number /= 1000
            units.removeFirst()
        }
        return "\(number)\(units.first ?? "")"
    }

    /// At most seven characters: 1023B, 12345K, 12M.
    static func size(_ bytes: UInt64) -> String {
        var number = bytes
        var units = ["B", "K", "M", "G", "T", "P", "E"][...]
        while number > 99_999, units.count > 1 {
            number >>= 10
            units.removeFirst()
        }
        return "\(number)\(units.first ?? "")"
    }
}

extension MachineStatus {
    init(
        _ configuration: Configuration, _ memory: GuestMemory, _ devices: [VirtioSlot], isPaused: Bool,
        _ sandbox: Sandbox
    ) {
        self.init(
            name: configuration.name, cpus: configuration.cpus, memorySize: memory.size, memory: try? memory.usage(),
            devices: devices.map { Device($0.device, $0.function.counters) }, isPaused: isPaused,
            sandbox: sandbox.summary)
    }
}

extension MachineStatus.Device {
    fileprivate init(_ device: any VirtioDevice, _ counters: DeviceCounters) {
        let block = device as? BlockDevice, disk = block?.statistics
        let card = device as? NetworkDevice, network = card?.counters, hostDrops = card?.hostDrops ?? HostDrops.none
        let sockets = (device as? VsockDevice)?.counters
        let balloon = (device as? BalloonDevice)?.statistics
        self.init(
            name: device.name, requests: counters.requests.value,
            bytes: disk.map { ($0.readBytes, $0.writtenBytes) }
                ?? network.map { ($0.receivedBytes, $0.sentBytes) } ?? balloon.map { (0, $0.returned) }
                ?? (device as? ConsoleDevice).map { ($0.counters.received.value, $0.counters.sent.value) }
                ?? sockets.map { ($0.receivedBytes.value, $0.sentBytes.value) },
            kicks: counters.kicks.value, exitKicks: counters.exitKicks.value, interrupts: counters.interrupts.value,
            errors: counters.errors.value,
            drops: network.map {
                $0.receiveDrops &+ $0.sendDrops &+ hostDrops.receive &+ hostDrops.send
            },
            isStopped: block?.isStopped == true, queues: Self.queues(block?.statistics, network))
    }

    private static func queues(_ disk: BlockStatistics?, _ network: NetworkCounters?) -> [MachineStatus.Queue] {
        if let disk, disk.queues.count > 1 {
            return disk.queues.map {
                MachineStatus.Queue(requests: $0.requests, bytes: ($0.readBytes.value, $0.writtenBytes.value))
            }
        }
        guard let network, network.pairs.count > 1 else { return [] }
        return network.pairs.map {
            MachineStatus.Queue(
                requests: $0.receivedFrames.value &+ $0.sentFrames.value,
                bytes: ($0.receivedBytes.value, $0.sentBytes.value))
        }
    }
}
