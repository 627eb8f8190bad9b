// SPDX-License-Identifier: Apache-2.0

import DiskImage
import Glibc

/// `swkvm image` compared with qemu-img: conversions, a rebase and a commit with the page cache dropped before each,
/// requests, and the opening of a large image.
enum ToolBench {
    private static let size = 512 << 20

    static func run(_ setup: Setup) throws -> [Row] {
        let source = "\(setup.work)/source"
        try makeImage("\(source).raw")
        _ = try Child.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "\(source).raw", "\(source).qcow2"])
        defer { for format in ["raw", "qcow2"] { unlink("\(source).\(format)") } }
        return try conversions(setup, source) + overlays(setup, source) + RequestBench.run(setup) + [opening(setup)]
    }

    // MARK: - Conversions

    private static func conversions(_ setup: Setup, _ source: String) throws -> [Row] {
        var rows: [Row] = []
        let target = "\(setup.work)/target"
        let kinds: [(name: String, from: String, to: String, ours: [String], qemu: [String])] = [
            ("raw to qcow2", "raw", "qcow2", [], []),
            ("qcow2 to raw", "qcow2", "raw", [], []),
            ("raw to qcow2, O_DIRECT", "raw", "qcow2", ["--cache", "none"], ["-T", "none", "-t", "none"]),
            ("qcow2 to raw, O_DIRECT", "qcow2", "raw", ["--cache", "none"], ["-T", "none", "-t", "none"]),
            ("raw to qcow2, zlib", "raw", "qcow2", ["--compress"], ["-c"]),
            (
                "raw to qcow2, zstd", "raw", "qcow2", ["--compress", "--compression-type", "zstd"],
                ["-c", "-o", "compression_type=zstd"]
            ),
        ]
        for kind in kinds {
            let from = "\(source).\(kind.from)", to = "\(target).\(kind.to)"
            rows += try compare(
                // The same number of threads for both.
                "convert \(kind.name)", setup, [setup.swkvm, "image", "convert", "-m", "2"] + kind.ours + [from, to],
                ["qemu-img", "convert", "-m", "2", "-f", kind.from, "-O", kind.to] + kind.qemu + [from, to]
            ) { unlink(to) }
            unlink(to)
        }
        return rows
    }

    /// Wall time and CPU of a program and of qemu-img. Before each run it is prepared, and the page cache dropped.
    private static func compare(
        _ name: String, _ setup: Setup, _ ours: [String], _ qemu: [String], prepare: @escaping () throws -> Void
    ) throws -> [Row] {
        // CPU seconds, for both.
        var cpu: [[Double]] = [[], []]
        func run(_ words: [String], _ cpu: inout [Double]) throws -> Double {
            try prepare()
            // Earlier writes must not count for this program.
            sync()
            try writeFile("/proc/sys/vm/drop_caches", Array("3".utf8))
            let end = try Child.run(words).end
            cpu.append(end.cpu)
            return end.total
        }
        let seconds = try interleave(setup.runs, [{ try run(ours, &cpu[0]) }, { try run(qemu, &cpu[1]) }])
        return [
            Row(
                name: "\(name), wall", unit: "s", ours: Sample(seconds[0]), peer: ("qemu-img", Sample(seconds[1])),
                goal: .atMost(0.8)),
            // Without the warm-up round.
            Row(
                name: "\(name), CPU", unit: "s", ours: Sample(Array(cpu[0].dropFirst())),
                peer: ("qemu-img", Sample(Array(cpu[1].dropFirst()))), goal: .atMost(1)),
        ]
    }

    // MARK: - Overlays

    /// A rebase of an empty overlay to a backing file that differs in every other MiB, and a commit of an overlay with
    /// those differences.
    private static func overlays(_ setup: Setup, _ source: String) throws -> [Row] {
        let base = "\(source).raw", other = "\(setup.work)/other.raw", differences = "\(setup.work)/differences.qcow2"
        let overlay = "\(setup.work)/overlay.qcow2", target = "\(setup.work)/base.raw"
        defer { for path in [other, differences, overlay, target] { unlink(path) } }
        try makeImage(other, isOther: true)
        _ = try Child.run(["cp", base, target])
        _ = try Child.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", other, "-F", "raw", differences])
        _ = try Child.run(["qemu-img", "rebase", "-q", "-f", "qcow2", "-b", target, "-F", "raw", differences])
        return try compare(
            "rebase", setup, [setup.swkvm, "image", "rebase", "-q", "-b", other, overlay],
            ["qemu-img", "rebase", "-q", "-f", "qcow2", "-b", other, "-F", "raw", overlay]
        ) {
            _ = try Child.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay])
        }
            + compare(
                "commit", setup, [setup.swkvm, "image", "commit", "-q", overlay],
                ["qemu-img", "commit", "-q", "-f", "qcow2", overlay]
            ) {
                _ = try Child.run(["cp", base, target])
                _ = try Child.run(["cp", differences, overlay])
            }
    }

    /// By MiB: holes, zeroes, incompressible and compressible data.
    /// - Parameter isOther: another disk, with as much data, of which half is the same.
    private static func makeImage(_ path: String, isOther: Bool = false) throws {
        let file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
        guard file >= 0, ftruncate(file, size) == 0 else { throw BenchError("cannot create \(path)") }
        defer { close(file) }
        var random = Random()
        var words = [UInt64](repeating: 0, count: 1 << 17)
        for number in 0..<(size >> 20) {
            let kind = random.next() % 8
            // Holes in runs, as in file systems.
            if number / 32 % 4 == 3 { continue }
            for index in words.indices {
                switch kind {
                case 0: words[index] = 0
                case 1, 2, 3: words[index] = random.next()
                default:
                    words[index] =
                        index % 3 == 0 ? random.next() & 0x0f0f_0f0f_0f0f_0f0f : UInt64(index / 6) &* 0x0101_0101
                }
            }
            if isOther, number % 2 == 1 { for index in words.indices { words[index] ^= 0x5555 } }
            guard words.withUnsafeBytes({ pwrite(file, $0.baseAddress, $0.count, off_t(number << 20)) }) == 1 << 20
            else {
                throw BenchError("cannot fill \(path)")
            }
        }
    }

    // MARK: - Opening

    /// An image of 1 TiB with all its tables.
    private static func opening(_ setup: Setup) throws -> Row {
        let path = "\(setup.work)/large.qcow2"
        _ = try Child.run([setup.swkvm, "image", "create", "-q", "--preallocation", "metadata", path, "1T"])
        defer { unlink(path) }
        let milliseconds = try interleave(setup.runs, [{ try time { _ = try DiskImage(path: path).size } * 1e3 }])[0]
        return Row(
            name: "opening a qcow2 image of 1 TiB for writing", unit: "ms", ours: Sample(milliseconds), goal: .atMost(5)
        )
    }
}
