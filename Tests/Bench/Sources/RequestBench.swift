// SPDX-License-Identifier: Apache-2.0

import Glibc

/// Requests on images: `swkvm image bench` compared with `qemu-img bench` on the same image, and with fio on a raw file
/// of the same size.
///
/// Reads from the page cache show a program's own cost; with direct I/O the disk takes most of the time. Writes to the
/// page cache are not measured: on file systems without asynchronous ones the kernel's worker threads do them, for
/// every program.
enum RequestBench {
    private struct Load {
        let name: String
        let size: Int
        let depth: Int
        let step: Int
        /// Requests through the page cache, direct I/O, and reads of holes, which take only the program's own time.
        let counts: (cached: Int, direct: Int, holes: Int)
        let rw: String
    }

    private static let megabytes = 512
    // Long steps through the image, repeatedly: other offsets each time, and the same for both programs.
    private static let loads = [
        Load(
            name: "random 4 KiB, depth 1", size: 4096, depth: 1, step: 4096 * 65_537, counts: (40_000, 3000, 300_000),
            rw: "rand"),
        Load(
            name: "random 4 KiB, depth 64", size: 4096, depth: 64, step: 4096 * 65_537,
            counts: (100_000, 15_000, 300_000), rw: "rand"),
        Load(
            name: "sequential 1 MiB, depth 4", size: 1 << 20, depth: 4, step: 1 << 20, counts: (1024, 256, 8192), rw: ""
        ),
    ]

    private struct Image {
        let name: String
        let path: String
        let format: String
        /// The raw file for fio, with as much data.
        let raw: String
        /// Creates it again, if writes change what is measured.
        var make: [String]?
    }

    static func run(_ setup: Setup) throws -> [Row] {
        let raw = "\(setup.work)/full.raw", full = "\(setup.work)/full.qcow2"
        let sparse = "\(setup.work)/sparse.qcow2", over = "\(setup.work)/over.qcow2", fine = "\(setup.work)/fine.qcow2"
        let hole = "\(setup.work)/sparse.raw"
        defer { for path in [raw, full, sparse, over, fine, hole] { unlink(path) } }
        let size = "\(megabytes)M"
        _ = try Child.run(["qemu-img", "create", "-q", "-f", "raw", "-o", "preallocation=full", raw, size])
        _ = try Child.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=full", full, size])
        let images = [
            Image(name: "raw", path: raw, format: "raw", raw: raw),
            Image(name: "qcow2, full", path: full, format: "qcow2", raw: raw),
            Image(
                name: "qcow2, sparse", path: sparse, format: "qcow2", raw: hole,
                make: ["qemu-img", "create", "-q", "-f", "qcow2", sparse, size]),
            Image(
                name: "qcow2 over qcow2", path: over, format: "qcow2", raw: raw,
                make: ["qemu-img", "create", "-q", "-f", "qcow2", "-b", full, "-F", "qcow2", over]),
            // With subclusters of 4 KiB nothing has to be copied.
            Image(
                name: "qcow2, subclusters, over qcow2", path: fine, format: "qcow2", raw: raw,
                make: [
                    "qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=128k", "-b", full,
                    "-F", "qcow2", fine,
                ]),
        ]
        var rows: [Row] = []
        for cache in ["writeback", "none"] {
            for image in images {
                for load in loads {
                    for writes in cache == "none" ? [false, true] : [false] {
                        rows += try measure(setup, image, load, cache, writes: writes)
                    }
                }
            }
        }
        return rows
    }

    private static func measure(
        _ setup: Setup, _ image: Image, _ load: Load, _ cache: String, writes: Bool
    ) throws -> [Row] {
        let isSparse = image.raw.hasSuffix("sparse.raw")
        let count = isSparse && !writes ? load.counts.holes : cache == "none" ? load.counts.direct : load.counts.cached
        if let make = image.make { _ = try Child.run(make) }
        let words =
            [
                "-f", image.format, "-c", "\(count)", "-d", "\(load.depth)", "-s", "\(load.size)", "-S", "\(load.step)",
                "-t", cache,
            ] + (writes ? ["-w"] : [])
        func seconds(_ command: [String]) throws -> Double {
            // New, and nothing of the last run is still being written back.
            if writes, let make = image.make { _ = try Child.run(make) }
            if writes { try waitForWriteback(image.path) }
            return try number(after: "Run completed in", in: try Child.run(command + words + [image.path]).output)
        }
        let results = try interleave(
            setup.runs,
            [
                { try seconds([setup.swkvm, "image", "bench"]) },
                { try seconds(["qemu-img", "bench", "-i", "io_uring"]) },
                { try fio(load, count, cache, writes: writes, image) },
            ])
        let samples = results.map { Sample($0.map { Double(count) / $0 / 1e3 }) }
        let name =
            "\(image.name), \(load.name), \(writes ? "write" : "read"), \(cache == "none" ? "O_DIRECT" : "page cache")"
        return [
            Row(
                name: name, unit: "1000/s", ours: samples[0], peer: ("qemu-img bench, io_uring", samples[1]),
                goal: .atLeast(1.2)),
            Row(
                name: name, unit: "1000/s", ours: samples[0],
                peer: ("fio, \(isSparse ? "sparse" : "full") raw", samples[2]), goal: .atLeast(0.9)),
        ]
    }

    /// Waits until a file's data is on the disk.
    private static func waitForWriteback(_ path: String) throws {
        let file = open(path, O_RDONLY | O_CLOEXEC)
        guard file >= 0, fsync(file) == 0 else { throw BenchError("cannot sync \(path)") }
        close(file)
    }

    /// fio's own figure, which excludes its start.
    private static func fio(_ load: Load, _ count: Int, _ cache: String, writes: Bool, _ image: Image) throws -> Double
    {
        if image.raw.hasSuffix("sparse.raw") {
            _ = try Child.run(["qemu-img", "create", "-q", "-f", "raw", image.raw, "\(megabytes)M"])
        }
        if writes { try waitForWriteback(image.raw) }
        let output = try Child.run([
            "fio", "--name=bench", "--filename=\(image.raw)", "--ioengine=io_uring",
            "--rw=\(load.rw)\(writes ? "write" : "read")", "--bs=\(load.size)",
            "--iodepth=\(load.depth)", "--size=\(megabytes)M", "--io_size=\(load.size * count)", "--norandommap",
            "--invalidate=0", "--thread",
            "--direct=\(cache == "none" ? 1 : 0)", "--output-format=json",
        ]).output
        // Reads come first in its output, then writes.
        guard let part = output.rest(after: writes ? "\"write\" : {" : "\"read\" : {") else {
            throw BenchError("no value in: \(output)")
        }
        return Double(count) / (try number(after: "\"iops\" :", in: String(part)))
    }
}
