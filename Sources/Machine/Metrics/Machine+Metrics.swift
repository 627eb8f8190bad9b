// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Devices
internal import DiskImage
internal import Glibc
internal import GuestMemory
internal import HostNetwork
internal import KVM
internal import Linux
internal import Virtio

/// The transports' counters of boots that are over: each board has new ones.
struct PastCounters: Sendable {
    struct Counts: Sendable {
        var requests: UInt64 = 0, kicks: UInt64 = 0, exitKicks: UInt64 = 0, interrupts: UInt64 = 0, errors: UInt64 = 0

        init() {}

        init(_ counters: DeviceCounters) {
            requests = counters.requests.value
            kicks = counters.kicks.value
            exitKicks = counters.exitKicks.value
            interrupts = counters.interrupts.value
            errors = counters.errors.value
        }

        static func + (left: Counts, right: Counts) -> Counts {
            var sum = left
            sum.requests &+= right.requests
            sum.kicks &+= right.kicks
            sum.exitKicks &+= right.exitKicks
            sum.interrupts &+= right.interrupts
            sum.errors &+= right.errors
            return sum
        }
    }

    /// By the device's name.
    private var counts: [String: Counts] = [:]
    private(set) var reboots: UInt64 = 0

    subscript(_ device: String) -> Counts { counts[device] ?? Counts() }

    /// A board's boot is over.
    mutating func add(_ devices: [VirtioSlot]) {
        for slot in devices {
            let function = slot.function
            counts[function.device.name, default: Counts()] = self[function.device.name] + Counts(function.counters)
        }
        reboots += 1
    }
}

extension Machine {
    /// Figures of the moment. It asks the kernel for some: not for a vCPU's thread.
    func metrics(_ reason: String) -> MetricsSnapshot {
        let board = self.board
        let past = parts.past.withLock { $0 }
        var groups: [MetricsSnapshot.Group] = [
            .init(
                scope: .machine,
                values: [
                    "uptime_seconds": .decimal(Double(TimerFD.now &- parts.created) / 1000),
                    "vcpus": .whole(UInt64(configuration.cpus)),
                    "paused": .whole(control.isPaused ? 1 : 0), "reboots": .whole(past.reboots),
                    "console_lost_bytes": .byLabel([
                        ("overrun", consolePort.droppedOutput), ("file", consolePort.lostOutput),
                    ]),
                ]),
            memoryMetrics, Self.processMetrics,
        ]
        for (index, file) in board.counterFiles.enumerated() {
            guard let counters = try? file?.counters() else { continue }
            var group = MetricsSnapshot.Group(scope: .vcpu, labels: [("vcpu", "\(index)")])
            for (field, name) in [
                ("exits", "exits"), ("port_exits", "io_exits"), ("mmio_exits", "mmio_exits"), ("halts", "halt_exits"),
                ("interrupts", "irq_injections"),
            ] {
                if let counter = counters.first(where: { $0.name == name }) {
                    group.values[field] = .whole(counter.value)
                }
            }
            groups.append(group)
        }
        for slot in board.registry.slots {
            let function = slot.function
            groups += Self.metrics(
                of: function.device, past[function.device.name] + PastCounters.Counts(function.counters))
        }
        return MetricsSnapshot(reason: reason, time: Timestamp.now, machine: configuration.name, groups: groups)
    }

    private var memoryMetrics: MetricsSnapshot.Group {
        var group = MetricsSnapshot.Group(scope: .memory, values: ["size_bytes": .whole(memory.size)])
        if let usage = try? memory.usage() {
            group.values["resident_bytes"] = .whole(usage.resident)
            group.values["dirty_bytes"] = .whole(usage.dirty)
            group.values["transparent_huge_bytes"] = .whole(usage.transparentHuge)
        }
        return group
    }

    private static var processMetrics: MetricsSnapshot.Group {
        var usage = rusage()
        // It fails only for a kind of usage that does not exist.
        _ = unsafe getrusage(RUSAGE_SELF.rawValue, &usage)
        func seconds(_ time: timeval) -> MetricsSnapshot.Value {
            .decimal(Double(time.tv_sec) + Double(time.tv_usec) / 1e6)
        }
        return .init(
            scope: .process,
            values: ["user_cpu_seconds": seconds(usage.ru_utime), "system_cpu_seconds": seconds(usage.ru_stime)])
    }

    static func metrics(of device: any VirtioDevice, _ counts: PastCounters.Counts) -> [MetricsSnapshot.Group] {
        let labels: [(name: String, value: String)] = [("device", device.name)]
        let totals = device.deviceEvents.totals
        var groups = [
            MetricsSnapshot.Group(
                scope: .device, labels: labels,
                values: [
                    "requests": .whole(counts.requests), "kicks": .whole(counts.kicks),
                    "exit_kicks": .whole(counts.exitKicks),
                    "interrupts": .whole(counts.interrupts), "errors": .whole(counts.errors),
                    "events": .byLabel(DeviceEvents.Kind.names.map { ($0, totals[$0] ?? 0) }),
                ])
        ]
        if let disk = device as? BlockDevice {
            groups.append(.init(scope: .block, labels: labels, values: metrics(of: disk)))
            groups += imageMetrics(of: disk)
            if let remote = disk.remote {
                groups.append(
                    .init(
                        scope: .nbd, labels: labels,
                        values: [
                            "connected": .whole(remote.isConnected ? 1 : 0), "connections_lost": .whole(remote.lost),
                            "reconnects": .whole(remote.reconnects),
                        ]))
            }
        }
        if let console = (device as? ConsoleDevice)?.counters {
            groups.append(
                .init(
                    scope: .console, labels: labels,
                    values: [
                        "received_bytes": .whole(console.received.value), "sent_bytes": .whole(console.sent.value),
                    ]))
        }
        if let network = device as? NetworkDevice {
            groups.append(.init(scope: .network, labels: labels, values: metrics(of: network)))
        }
        if let balloon = device as? BalloonDevice {
            groups.append(.init(scope: .balloon, labels: labels, values: metrics(of: balloon.statistics)))
        }
        if let vsock = device as? VsockDevice {
            groups.append(.init(scope: .vsock, labels: labels, values: metrics(of: vsock.counters)))
        }
        return groups
    }

    private static func metrics(of balloon: BalloonStatistics) -> [String: MetricsSnapshot.Value] {
        let guest = balloon.guest
        func known(_ figures: [(String, UInt64?)]) -> MetricsSnapshot.Value {
            .byLabel(figures.compactMap { name, value in value.map { (name, $0) } })
        }
        return [
            "target_bytes": .whole(balloon.target), "actual_bytes": .whole(balloon.actual),
            "returned_bytes": .byLabel([
                ("inflated", balloon.inflated), ("reported", balloon.reported), ("hinted", balloon.hinted),
            ]),
            "refused_pages": .whole(balloon.refusedPages),
            "guest_bytes": known([
                ("total", guest.total), ("free", guest.free), ("available", guest.available),
                ("caches", guest.caches),
            ]),
            "guest_events": known([
                ("swapped_in_bytes", guest.swapIn), ("swapped_out_bytes", guest.swapOut),
                ("major_faults", guest.majorFaults), ("minor_faults", guest.minorFaults),
                ("huge_page_allocations", guest.hugePageAllocations), ("huge_page_failures", guest.hugePageFailures),
                ("oom_kills", guest.oomKills), ("allocation_stalls", guest.allocationStalls),
            ]),
        ]
    }

    private static func metrics(of counters: VsockCounters) -> [String: MetricsSnapshot.Value] {
        [
            "connections": .whole(counters.connections),
            "opened": .byLabel([
                ("guest", counters.guestConnections.value), ("host", counters.hostConnections.value),
            ]),
            "refused": .byLabel([("guest", counters.guestRefusals.value), ("host", counters.hostRefusals.value)]),
            "received_bytes": .whole(counters.receivedBytes.value), "sent_bytes": .whole(counters.sentBytes.value),
            "bad_packets": .whole(counters.badPackets.value),
            "credit_violations": .whole(counters.creditViolations.value),
            "bad_receive_buffers": .whole(counters.badReceiveBuffers.value),
        ]
    }

    private static func metrics(of disk: BlockDevice) -> [String: MetricsSnapshot.Value] {
        let statistics = disk.statistics
        func byQueue(_ value: (BlockStatistics.Queue) -> UInt64) -> MetricsSnapshot.Value {
            .byLabel(statistics.queues.enumerated().map { ("\($0.offset)", value($0.element)) })
        }
        return [
            "size_bytes": .whole(disk.capacity), "reads": .whole(statistics.reads),
            "read_bytes": .whole(statistics.readBytes), "writes": .whole(statistics.writes),
            "written_bytes": .whole(statistics.writtenBytes), "flushes": .whole(statistics.flushes),
            "discards": .whole(statistics.discards), "stopped": .whole(disk.isStopped ? 1 : 0),
            "throttled": .whole(disk.throttled),
            "stops": .whole(statistics.stops.value), "ignored_errors": .whole(statistics.ignored.value),
            "failures": .whole(statistics.failures), "queue_reads": byQueue { $0.reads.value },
            "queue_read_bytes": byQueue { $0.readBytes.value }, "queue_writes": byQueue { $0.writes.value },
            "queue_written_bytes": byQueue { $0.writtenBytes.value }, "queue_flushes": byQueue { $0.flushes.value },
            "queue_discards": byQueue { $0.discards.value }, "queue_failures": byQueue { $0.failures.value },
        ]
    }

    private static func imageMetrics(of disk: BlockDevice) -> [MetricsSnapshot.Group] {
        disk.cacheStatistics.map { file, statistics in
            let caches = statistics.caches
            func byCache(_ value: (CacheStatistics) -> UInt64) -> MetricsSnapshot.Value {
                .byLabel(caches.map { ($0.name, value($0.statistics)) })
            }
            return MetricsSnapshot.Group(
                scope: .image, labels: [("device", disk.name), ("file", "\(file)")],
                values: [
                    "cache_size_bytes": byCache { $0.capacity }, "cache_hits": byCache { $0.hits },
                    "cache_misses": byCache { $0.misses }, "cache_evictions": byCache { $0.evictions },
                ])
        }
    }

    private static func metrics(of network: NetworkDevice) -> [String: MetricsSnapshot.Value] {
        let counters = network.counters, hostDrops = network.hostDrops
        let receiveDrops: [(String, UInt64?)] = [
            ("too_long", counters.receiveTooLong.value), ("above_mtu", counters.receiveAboveMTU.value),
            ("no_driver", counters.receiveWithoutDriver.value), ("link_down", counters.receiveLinkDown.value),
            ("host_queue", hostDrops?.receive),
        ]
        let sendDrops: [(String, UInt64?)] = [
            ("malformed", counters.sendMalformed.value), ("link_down", counters.sendLinkDown.value),
            ("mac_lock", counters.sendForeignSource.value),
            ("no_memory", counters.sendNoMemory.value), ("host_queue", hostDrops?.send),
        ]
        func byCause(_ drops: [(String, UInt64?)]) -> MetricsSnapshot.Value {
            .byLabel(drops.compactMap { name, value in value.map { (name, $0) } })
        }
        func byPair(_ value: (NetworkCounters.Pair) -> UInt64) -> MetricsSnapshot.Value {
            .byLabel(counters.pairs.enumerated().map { ("\($0.offset)", value($0.element)) })
        }
        return [
            "link_up": .whole(network.isLinkUp ? 1 : 0), "received_frames": .whole(counters.receivedFrames),
            "received_bytes": .whole(counters.receivedBytes), "sent_frames": .whole(counters.sentFrames),
            "sent_bytes": .whole(counters.sentBytes), "receive_drops": byCause(receiveDrops),
            "send_drops": byCause(sendDrops),
            "bad_receive_buffers": .whole(counters.badReceiveBuffers.value),
            "send_waits": .whole(counters.sendWaits.value),
            "receive_throttled": .whole(network.throttled.receive),
            "send_throttled": .whole(network.throttled.transmit),
            "queue_pairs": .whole(UInt64(network.queuePairs.inUse)),
            "pair_received_frames": byPair { $0.receivedFrames.value },
            "pair_received_bytes": byPair { $0.receivedBytes.value },
            "pair_sent_frames": byPair { $0.sentFrames.value }, "pair_sent_bytes": byPair { $0.sentBytes.value },
        ]
    }
}
