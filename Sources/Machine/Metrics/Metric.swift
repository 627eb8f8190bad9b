// SPDX-License-Identifier: Apache-2.0

/// A figure that `--metrics` writes. docs/metrics.md documents each; a test holds the two to each other.
struct Metric: Sendable {
    /// What a figure is about: an object of the JSON, and a part of the Prometheus name.
    enum Scope: String, CaseIterable, Sendable {
        case machine, memory, process
        /// One object for each vCPU.
        case vcpu
        /// One object for each device, with the others in it.
        case device
        case block
        /// One object for each file of a disk that has metadata.
        case image
        case nbd, network, balloon, console, vsock

        /// The path of its object in the JSON.
        var path: String {
            switch self {
            case .machine, .memory, .process: rawValue
            case .vcpu: "vcpus[]"
            case .device: "devices[]"
            case .image: "devices[].images[]"
            case .block, .nbd, .network, .balloon, .console, .vsock: "devices[].\(rawValue)"
            }
        }
    }

    /// Names end as Prometheus' conventions have it: what only grows is a counter.
    enum Kind: String, Sendable { case counter, gauge }

    let scope: Scope
    /// The member of the JSON object.
    let field: String
    let kind: Kind
    /// For the reader; Prometheus' names have it, too.
    let help: String
    /// The label by whose values the figure is divided; the JSON has an object.
    var label: String?

    /// `swkvm_block_read_bytes_total`.
    var name: String { "swkvm_\(scope.rawValue)_\(field)" + (kind == .counter ? "_total" : "") }
    /// `devices[].block.read_bytes`.
    var path: String { "\(scope.path).\(field)" }

    static let all: [Metric] =
        machine + memory + process + vcpu + device + block + image + nbd + network + balloon
        + vsock + console

    private static let machine = [
        Metric(scope: .machine, field: "uptime_seconds", kind: .gauge, help: "Time since the machine was started."),
        Metric(scope: .machine, field: "vcpus", kind: .gauge, help: "Virtual CPUs."),
        Metric(scope: .machine, field: "paused", kind: .gauge, help: "1 while the machine is paused, otherwise 0."),
        Metric(scope: .machine, field: "reboots", kind: .counter, help: "Times that the guest has rebooted."),
        Metric(
            scope: .machine, field: "console_lost_bytes", kind: .counter,
            help: "Bytes of console output that were lost, by cause.", label: "cause"),
    ]
    private static let console = [
        Metric(
            scope: .console, field: "received_bytes", kind: .counter, help: "Bytes of input that the guest has read."),
        Metric(scope: .console, field: "sent_bytes", kind: .counter, help: "Bytes that the guest has printed."),
    ]
    private static let memory = [
        Metric(scope: .memory, field: "size_bytes", kind: .gauge, help: "Size of the guest's RAM."),
        Metric(
            scope: .memory, field: "resident_bytes", kind: .gauge,
            help: "Guest RAM that is resident in the host's memory."),
        Metric(scope: .memory, field: "dirty_bytes", kind: .gauge, help: "Resident guest RAM that was written."),
        Metric(
            scope: .memory, field: "transparent_huge_bytes", kind: .gauge,
            help: "Resident guest RAM in transparent huge pages."),
    ]
    private static let process = [
        Metric(
            scope: .process, field: "user_cpu_seconds", kind: .counter,
            help: "CPU time of the swkvm process in user mode, including the guest."),
        Metric(
            scope: .process, field: "system_cpu_seconds", kind: .counter,
            help: "CPU time of the swkvm process in kernel mode."),
    ]
    private static let vcpu = [
        Metric(
            scope: .vcpu, field: "exits", kind: .counter,
            help: "Exits of the vCPU from guest mode since the last reset, as KVM counts them."),
        Metric(
            scope: .vcpu, field: "port_exits", kind: .counter,
            help: "Exits to user space for port I/O since the last reset, as KVM counts them."),
        Metric(
            scope: .vcpu, field: "mmio_exits", kind: .counter,
            help: "Exits to user space for MMIO since the last reset, as KVM counts them."),
        Metric(
            scope: .vcpu, field: "halts", kind: .counter,
            help: "HLT instructions since the last reset, as KVM counts them."),
        Metric(
            scope: .vcpu, field: "interrupts", kind: .counter,
            help: "Interrupts injected since the last reset, as KVM counts them."),
    ]
    private static let device = [
        Metric(scope: .device, field: "requests", kind: .counter, help: "Requests, or frames, that were completed."),
        Metric(scope: .device, field: "kicks", kind: .counter, help: "Notifications from the driver."),
        Metric(
            scope: .device, field: "exit_kicks", kind: .counter,
            help: "Notifications that came by an exit to user space instead of an ioeventfd."),
        Metric(scope: .device, field: "interrupts", kind: .counter, help: "Interrupts to the driver."),
        Metric(
            scope: .device, field: "errors", kind: .counter,
            help: "Requests that failed, frames that were dropped, and virtio rules that the driver broke."),
        Metric(
            scope: .device, field: "events", kind: .counter, help: "Events reported to the log, by kind.", label: "kind"
        ),
    ]
    private static let block = [
        Metric(scope: .block, field: "size_bytes", kind: .gauge, help: "Size of the disk."),
        Metric(scope: .block, field: "reads", kind: .counter, help: "Read requests that succeeded."),
        Metric(scope: .block, field: "read_bytes", kind: .counter, help: "Bytes read."),
        Metric(scope: .block, field: "writes", kind: .counter, help: "Write requests that succeeded."),
        Metric(scope: .block, field: "written_bytes", kind: .counter, help: "Bytes written."),
        Metric(scope: .block, field: "flushes", kind: .counter, help: "Flush requests that succeeded."),
        Metric(scope: .block, field: "discards", kind: .counter, help: "Ranges discarded or zeroed."),
        Metric(
            scope: .block, field: "throttled", kind: .counter,
            help: "Times that a queue had to wait for the disk's rate limits."),
        Metric(
            scope: .block, field: "stopped", kind: .gauge,
            help: "1 while requests that the host has failed wait for the machine to be resumed, otherwise 0."),
        Metric(
            scope: .block, field: "stops", kind: .counter, help: "Times that an error on the host has stopped the disk."
        ),
        Metric(
            scope: .block, field: "ignored_errors", kind: .counter,
            help: "Errors that were not reported to the guest (--on-disk-error ignore)."),
        Metric(scope: .block, field: "failures", kind: .counter, help: "Requests that failed or are not supported."),
        Metric(
            scope: .block, field: "queue_reads", kind: .counter, help: "Read requests that succeeded, by queue.",
            label: "queue"),
        Metric(scope: .block, field: "queue_read_bytes", kind: .counter, help: "Bytes read, by queue.", label: "queue"),
        Metric(
            scope: .block, field: "queue_writes", kind: .counter, help: "Write requests that succeeded, by queue.",
            label: "queue"),
        Metric(
            scope: .block, field: "queue_written_bytes", kind: .counter, help: "Bytes written, by queue.",
            label: "queue"),
        Metric(
            scope: .block, field: "queue_flushes", kind: .counter, help: "Flush requests that succeeded, by queue.",
            label: "queue"),
        Metric(
            scope: .block, field: "queue_discards", kind: .counter, help: "Ranges discarded or zeroed, by queue.",
            label: "queue"),
        Metric(
            scope: .block, field: "queue_failures", kind: .counter,
            help: "Requests that failed or are not supported, by queue.", label: "queue"),
    ]
    private static let image = [
        Metric(
            scope: .image, field: "cache_size_bytes", kind: .gauge, help: "Bytes that a cache can hold, by cache.",
            label: "cache"),
        Metric(
            scope: .image, field: "cache_hits", kind: .counter,
            help: "Lookups in a cache that needed no read of the file, by cache.", label: "cache"),
        Metric(
            scope: .image, field: "cache_misses", kind: .counter,
            help: "Blocks that were read from the file into a cache, by cache.", label: "cache"),
        Metric(
            scope: .image, field: "cache_evictions", kind: .counter,
            help: "Blocks that were removed from a cache to make room for others, by cache.", label: "cache"),
    ]
    private static let nbd = [
        Metric(scope: .nbd, field: "connected", kind: .gauge, help: "1 while the server is connected, otherwise 0."),
        Metric(
            scope: .nbd, field: "connections_lost", kind: .counter, help: "Connections to the server that were lost."),
        Metric(
            scope: .nbd, field: "reconnects", kind: .counter, help: "Connections to the server after the first one."),
    ]
    private static let network = [
        Metric(scope: .network, field: "link_up", kind: .gauge, help: "1 while the guest's link is up, otherwise 0."),
        Metric(scope: .network, field: "received_frames", kind: .counter, help: "Frames delivered to the guest."),
        Metric(
            scope: .network, field: "received_bytes", kind: .counter,
            help: "Bytes of the frames delivered to the guest."),
        Metric(
            scope: .network, field: "sent_frames", kind: .counter, help: "Frames of the guest delivered to the host."),
        Metric(
            scope: .network, field: "sent_bytes", kind: .counter,
            help: "Bytes of the frames of the guest delivered to the host."),
        Metric(
            scope: .network, field: "receive_drops", kind: .counter,
            help: "Frames for the guest that were dropped, by cause.",
            label: "cause"),
        Metric(
            scope: .network, field: "send_drops", kind: .counter,
            help: "Frames of the guest that were dropped, by cause.", label: "cause"),
        Metric(
            scope: .network, field: "bad_receive_buffers", kind: .counter,
            help: "Receive buffers of the driver that are read-only, or too short for a header."),
        Metric(
            scope: .network, field: "send_waits", kind: .counter,
            help: "Times the device waited because the TAP's queue was full; no frame is lost by it."),
        Metric(
            scope: .network, field: "receive_throttled", kind: .counter,
            help: "Times that a receive queue had to wait for the interface's rate limits."),
        Metric(
            scope: .network, field: "send_throttled", kind: .counter,
            help: "Times that a transmit queue had to wait for the interface's rate limits."),
        Metric(
            scope: .network, field: "queue_pairs", kind: .gauge, help: "Pairs of queues in which the driver receives."),
        Metric(
            scope: .network, field: "pair_received_frames", kind: .counter,
            help: "Frames delivered to the guest, by pair of queues.",
            label: "pair"),
        Metric(
            scope: .network, field: "pair_received_bytes", kind: .counter,
            help: "Bytes of the frames delivered to the guest, by pair of queues.", label: "pair"),
        Metric(
            scope: .network, field: "pair_sent_frames", kind: .counter,
            help: "Frames of the guest delivered to the host, by pair of queues.",
            label: "pair"),
        Metric(
            scope: .network, field: "pair_sent_bytes", kind: .counter,
            help: "Bytes of the frames of the guest delivered to the host, by pair of queues.", label: "pair"),
    ]
    private static let balloon = [
        Metric(
            scope: .balloon, field: "target_bytes", kind: .gauge, help: "Memory that the guest is to give up."),
        Metric(
            scope: .balloon, field: "actual_bytes", kind: .gauge,
            help: "Memory that the guest says it has given up."),
        Metric(
            scope: .balloon, field: "returned_bytes", kind: .counter,
            help: "Guest RAM that was returned to the host, by cause.", label: "cause"),
        Metric(
            scope: .balloon, field: "refused_pages", kind: .counter,
            help: "Pages from the driver that are not RAM."),
        Metric(
            scope: .balloon, field: "guest_bytes", kind: .gauge,
            help: "Memory as the guest's statistics have it, by figure.", label: "figure"),
        Metric(
            scope: .balloon, field: "guest_events", kind: .counter,
            help: "Events of memory as the guest's statistics have them, by kind.", label: "kind"),
    ]
    private static let vsock = [
        Metric(scope: .vsock, field: "connections", kind: .gauge, help: "Connections of now."),
        Metric(
            scope: .vsock, field: "opened", kind: .counter,
            help: "Connections that were opened, by the side that has asked for them.", label: "side"),
        Metric(
            scope: .vsock, field: "refused", kind: .counter,
            help: "Requests for a connection that were refused, by the side that has asked.", label: "side"),
        Metric(scope: .vsock, field: "received_bytes", kind: .counter, help: "Bytes of data delivered to the guest."),
        Metric(scope: .vsock, field: "sent_bytes", kind: .counter, help: "Bytes of data that the guest has sent."),
        Metric(
            scope: .vsock, field: "bad_packets", kind: .counter,
            help: "Packets of the guest that are malformed, or break a rule of their connection."),
        Metric(
            scope: .vsock, field: "credit_violations", kind: .counter,
            help: "Connections that were reset because the guest did not respect its credit."),
        Metric(
            scope: .vsock, field: "bad_receive_buffers", kind: .counter,
            help: "Receive buffers of the driver that are read-only, or too short for a packet."),
    ]
}
