// SPDX-License-Identifier: Apache-2.0

import Glibc

/// (g) Disk, network and boot of a Linux guest, measured in the guest by Debian's fio and iperf3, beside QEMU's microvm
/// and Firecracker; and many machines that start at once.
///
/// All have their default options, besides those that name the devices. Each round boots each monitor once, in turn.
struct GuestBench {
    let setup: Setup
    let kernel: String
    /// The directory that Tests/Bench/guest/prepare has filled.
    let parts: String
    /// Processes that compete for the CPUs.
    let hogs: Int

    private static let host = "10.77.0.1"
    private static let guest = "10.77.0.2"
    private static let tap = "swguest0"
    private static let disk = 256 << 20

    /// A monitor with one kind of bus.
    private enum Monitor: CaseIterable {
        case pci, mmio, qemuPCI, qemuMMIO, firecracker

        var title: String {
            switch self {
            case .pci: "swkvm, virtio-pci"
            case .mmio: "swkvm, virtio-mmio"
            case .qemuPCI: "QEMU microvm, virtio-pci, iothread"
            case .qemuMMIO: "QEMU microvm, virtio-mmio, iothread"
            case .firecracker: "Firecracker"
            }
        }

        /// Those that a figure of swkvm's is compared with.
        var peers: [Monitor] {
            switch self {
            case .pci: [.qemuPCI, .mmio]
            case .mmio: [.qemuMMIO, .firecracker]
            default: []
            }
        }
    }

    /// What a machine has.
    private struct Shape {
        var memory = 512
        var cpus = 1
        var initrd: String
        var words = ""
        var devices = true
    }

    static func run(_ setup: Setup, kernel: String, parts: String, hogs: Int = 0) throws -> [Row] {
        let bench = GuestBench(setup: setup, kernel: kernel, parts: parts, hogs: hogs)
        try bench.makeHost()
        defer { bench.removeHost() }
        let competitors = try (0..<hogs).map { _ in try Child(["sh", "-c", "while :; do :; done"]) }
        return try withExtendedLifetime(competitors) { try bench.work() + bench.boots() + bench.crowds() }
    }

    private func suffix(_ name: String) -> String { hogs == 0 ? name : "\(name), beside \(hogs) CPU hogs" }

    // MARK: - The host

    private func makeHost() throws {
        _ = try Child.run(["ip", "tuntap", "add", "mode", "tap", "name", Self.tap, "vnet_hdr"])
        _ = try Child.run(["ip", "address", "add", "\(Self.host)/24", "dev", Self.tap])
        _ = try Child.run(["ip", "link", "set", Self.tap, "up"])
        try writeFile("\(setup.work)/guest.raw", [])
        guard truncate("\(setup.work)/guest.raw", off_t(Self.disk)) == 0 else {
            throw BenchError("cannot make the guest's disk")
        }
        // Allocated and in the page cache, for all alike.
        let file = open("\(setup.work)/guest.raw", O_WRONLY | O_CLOEXEC)
        defer { close(file) }
        let block = [UInt8](repeating: 0x5a, count: 1 << 20)
        for number in 0..<(Self.disk >> 20) {
            guard pwrite(file, block, block.count, off_t(number << 20)) == block.count else {
                throw BenchError("cannot fill the guest's disk")
            }
        }
    }

    private func removeHost() {
        unlink("\(setup.work)/guest.raw")
        _ = try? Child.run(["ip", "link", "delete", Self.tap])
    }

    // MARK: - Command lines

    private func line(_ shape: Shape) -> String {
        "console=ttyS0 quiet rdinit=/init panic=-1 reboot=k" + (shape.words.isEmpty ? "" : " \(shape.words)")
    }

    private func words(_ monitor: Monitor, _ shape: Shape) throws -> [String] {
        let disk = "\(setup.work)/guest.raw"
        switch monitor {
        case .pci, .mmio:
            return [
                setup.swkvm, "run", "--bus", monitor == .pci ? "pci" : "mmio", "--mem", "\(shape.memory)M", "--cpus",
                "\(shape.cpus)", "--kernel", kernel, "--initrd", shape.initrd, "--cmdline", line(shape),
            ] + (shape.devices ? ["--disk", disk, "--net", "tap=\(Self.tap)"] : [])
        case .qemuPCI, .qemuMMIO:
            let isPCI = monitor == .qemuPCI
            let block = isPCI ? "virtio-blk-pci" : "virtio-blk-device"
            let net = isPCI ? "virtio-net-pci,romfile=" : "virtio-net-device"
            return [
                "qemu-system-x86_64", "-M",
                "microvm,x-option-roms=off,rtc=on,isa-serial=on,usb=off,graphics=off,pcie=\(isPCI ? "on" : "off")",
                "-accel", "kvm", "-cpu", "host", "-m", "\(shape.memory)", "-smp", "\(shape.cpus)", "-no-user-config",
                "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot", "-global",
                "virtio-mmio.force-legacy=false", "-kernel", kernel, "-initrd", shape.initrd, "-append", line(shape),
            ]
                + (shape.devices
                    ? [
                        "-object", "iothread,id=io", "-drive", "if=none,id=disk,format=raw,file=\(disk)", "-device",
                        "\(block),drive=disk,iothread=io", "-netdev",
                        "tap,id=net,ifname=\(Self.tap),script=no,downscript=no", "-device", "\(net),netdev=net",
                    ] : [])
        case .firecracker:
            let path = "\(setup.work)/firecracker.json"
            try writeFile(path, Array(firecracker(shape, disk: disk).utf8))
            return firecracker(path)
        }
    }

    /// Its log would be mixed with the guest's output.
    private func firecracker(_ configuration: String) -> [String] {
        [
            "\(parts)/firecracker", "--log-path", "/dev/null", "--level", "Off", "--no-api", "--config-file",
            configuration,
        ]
    }

    /// Firecracker's configuration. Paths and words here need no escapes in JSON.
    private func firecracker(_ shape: Shape, disk: String) -> String {
        let drives =
            shape.devices
            ? #"{"drive_id":"disk","path_on_host":"\#(disk)","is_root_device":false,"is_read_only":false,"io_engine":"Sync"}"#
            : ""
        let nets = shape.devices ? #"{"iface_id":"eth0","host_dev_name":"\#(Self.tap)"}"# : ""
        return #"""
            {"boot-source":{"kernel_image_path":"\#(kernel)","initrd_path":"\#(shape.initrd)","boot_args":"\#(line(shape))"},
            "drives":[\#(drives)],"network-interfaces":[\#(nets)],
            "machine-config":{"vcpu_count":\#(shape.cpus),"mem_size_mib":\#(shape.memory)}}
            """#
    }

    // MARK: - Disk and network

    private struct Quantity {
        let key: String
        let name: String
        let unit: String
    }

    /// The figures that Tests/Bench/guest/init prints.
    private static let quantities: [Quantity] = {
        var all: [Quantity] = []
        for (key, name) in [
            ("randread-1", "random 4 KiB read, depth 1"), ("randwrite-1", "random 4 KiB write, depth 1"),
            ("randread-32", "random 4 KiB read, depth 32"), ("randwrite-32", "random 4 KiB write, depth 32"),
        ] {
            all.append(Quantity(key: "\(key):iops", name: name, unit: "1/s"))
            for share in ["50", "99", "99.9"] {
                all.append(Quantity(key: "\(key):p\(share)", name: "\(name), p\(share)", unit: "µs"))
            }
        }
        for protocol_ in ["tcp", "udp"] {
            let name = "\(protocol_.uppercased()), one byte there and back"
            all.append(Quantity(key: "\(protocol_)-rate", name: name, unit: "1/s"))
            for share in ["50", "99", "99.9"] {
                all.append(Quantity(key: "\(protocol_)-p\(share)", name: "\(name), p\(share)", unit: "µs"))
            }
        }
        return all + [
            Quantity(key: "tcp-out", name: "TCP stream out", unit: "MB/s"),
            Quantity(key: "tcp-in", name: "TCP stream in", unit: "MB/s"),
            Quantity(key: "tcp-out-4", name: "4 TCP streams out", unit: "MB/s"),
            Quantity(key: "tcp-in-4", name: "4 TCP streams in", unit: "MB/s"),
            Quantity(key: "udp-out", name: "UDP of 64 bytes, out", unit: "1000/s"),
            Quantity(key: "udp-in", name: "UDP of 64 bytes, in", unit: "1000/s"),
        ]
    }()

    private func work() throws -> [Row] {
        let servers = [try Child(["\(setup.programs)/echoes", "serve", "7"]), try Child(["iperf3", "-s"])]
        defer { withExtendedLifetime(servers) {} }
        let network = "ip=\(Self.guest)::\(Self.host):255.255.255.0::eth0:off"
        let shape = Shape(
            memory: 1024, initrd: "\(parts)/initrd", words: "\(network) host=\(Self.host) jobs=disk,net seconds=1")
        var figures: [Monitor: [String: [Double]]] = [:]
        // Without a warm-up round: a run is long, and its disk is in the page cache.
        for _ in 0..<setup.runs {
            for monitor in Monitor.allCases {
                let text = try output(try words(monitor, shape), until: "bench: end")
                for quantity in Self.quantities {
                    let value = try number(after: "bench: figure \(quantity.key) ", in: text)
                    figures[monitor, default: [:]][quantity.key, default: []].append(value)
                }
            }
        }
        return rows(Self.quantities, figures)
    }

    private func rows(_ quantities: [Quantity], _ figures: [Monitor: [String: [Double]]]) -> [Row] {
        quantities.flatMap { quantity in
            [Monitor.pci, .mmio].flatMap { ours in
                ours.peers.compactMap { peer in
                    guard let values = figures[ours]?[quantity.key], let others = figures[peer]?[quantity.key] else {
                        return nil
                    }
                    return Row(
                        name: suffix("\(ours == .pci ? "PCI" : "MMIO"): \(quantity.name)"), unit: quantity.unit,
                        ours: Sample(values), peer: (peer.title, Sample(others)))
                }
            }
        }
    }

    /// Runs a monitor until its guest prints a line, and ends it.
    private func output(_ words: [String], until mark: String) throws -> String {
        let child = try Child(words, patience: 300)
        try child.collect(untilLine: mark)
        return child.text
    }

    // MARK: - Boots

    private func boots() throws -> [Row] {
        let small = "\(setup.work)/small"
        try writeFile(small, LinuxBench.archive(try readFile("\(setup.programs)/up")))
        var figures: [Monitor: [String: [Double]]] = [:]
        var quantities: [Quantity] = []
        func measure(_ key: String, _ name: String, _ shape: Shape) throws {
            quantities.append(Quantity(key: key, name: name, unit: "ms"))
            for round in -1..<setup.runs {
                for monitor in Monitor.allCases {
                    let start = now()
                    _ = try output(try words(monitor, shape), until: "bench: up")
                    let taken = (now() - start) * 1e3
                    if round >= 0 { figures[monitor, default: [:]][key, default: []].append(taken) }
                }
            }
        }
        for memory in [128, 512] {
            try measure(
                "boot-\(memory)", "Linux, exec → /init, \(memory) MiB, one disk, one net",
                Shape(memory: memory, initrd: small))
        }
        for cpus in [2, 4] {
            try measure(
                "boot-cpus-\(cpus)", "Linux, exec → /init, 512 MiB, \(cpus) CPUs", Shape(cpus: cpus, initrd: small))
        }
        let size = try fileSize("\(parts)/initrd") / 1_000_000
        try measure(
            "boot-initrd", "Linux, exec → /init, 512 MiB, initrd of \(size) MB", Shape(initrd: "\(parts)/initrd"))
        return rows(quantities, figures)
    }

    // MARK: - Many machines

    /// The time until the bundled guest has printed its first line in each of many machines that were started together.
    private func crowds() throws -> [Row] {
        let ours = [setup.swkvm, "run", "--mem", "128M", "--cmdline", "test=none"]
        let path = "\(setup.work)/bundled.json"
        try writeFile(
            path,
            Array(
                #"{"boot-source":{"kernel_image_path":"\#(setup.guest)","boot_args":"test=none"},"drives":[],"machine-config":{"vcpu_count":1,"mem_size_mib":128}}"#
                    .utf8))
        let peer = firecracker(path)
        return try [30, 100].map { count in
            let times = try interleave(setup.runs, [{ try crowd(ours, count) }, { try crowd(peer, count) }])
            let samples = times.map { Sample($0.map { $0 * 1e3 }) }
            return Row(
                name: suffix("\(count) machines at once, exec → the last one's first line"), unit: "ms",
                ours: samples[0], peer: (Monitor.firecracker.title, samples[1]))
        }
    }

    private func crowd(_ words: [String], _ count: Int) throws -> Double {
        let start = now()
        let children = try (0..<count).map { _ in try Child(words, patience: 300) }
        for child in children { try child.collect(untilLine: "swkvm guest") }
        return now() - start
    }
}
