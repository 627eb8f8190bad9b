import DiskImage
import Glibc

/// `swkvm image` beside qemu-img: conversions with the page cache dropped before each, requests around the page cache, and the opening of a large image.
enum ToolBench {
    private static let size = 512 << 20

    static func run(_ setup: Setup) throws -> [Row] {
        let source = "\(setup.work)/source"
        try makeImage("\(source).raw")
        _ = try Child.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "\(source).raw", "\(source).qcow2"])
        defer { for format in ["raw", "qcow2"] { unlink("\(source).\(format)") } }
        return try conversions(setup, source) + requests(setup) + [opening(setup)]
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
            ("raw to qcow2, zstd", "raw", "qcow2", ["--compress", "--compression-type", "zstd"], ["-c", "-o", "compression_type=zstd"]),
        ]
        for kind in kinds {
            let from = "\(source).\(kind.from)", to = "\(target).\(kind.to)"
            // Seconds of wall time and of the processor, for both.
            var cpu: [[Double]] = [[], []]
            // As many at a time for both.
            let seconds = try interleave(setup.runs, [
                { try converting([setup.swkvm, "image", "convert", "-m", "2"] + kind.ours + [from, to], to, &cpu[0]) },
                { try converting(["qemu-img", "convert", "-m", "2", "-f", kind.from, "-O", kind.to] + kind.qemu + [from, to], to, &cpu[1]) },
            ])
            rows += [
                Row(name: "convert \(kind.name), wall", unit: "s", ours: Sample(seconds[0]), peer: ("qemu-img", Sample(seconds[1])), goal: .atMost(0.8)),
                Row(name: "convert \(kind.name), CPU", unit: "s", ours: Sample(cpu[0]), peer: ("qemu-img", Sample(cpu[1])), goal: .atMost(1)),
            ]
        }
        return rows
    }

    private static func converting(_ words: [String], _ target: String, _ cpu: inout [Double]) throws -> Double {
        unlink(target)
        // What the last run wrote is not to be this one's work.
        sync()
        try writeFile("/proc/sys/vm/drop_caches", Array("3".utf8))
        let end = try Child.run(words).end
        unlink(target)
        cpu.append(end.cpu)
        return end.total
    }

    /// By MiB: holes, zeroes, what does not compress, and what does.
    private static func makeImage(_ path: String) throws {
        let file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
        guard file >= 0, ftruncate(file, size) == 0 else { throw BenchError("cannot make \(path)") }
        defer { close(file) }
        var random = Random()
        var words = [UInt64](repeating: 0, count: 1 << 17)
        for number in 0..<(size >> 20) {
            let kind = random.next() % 8
            // Holes in runs, as file systems leave them.
            if number / 32 % 4 == 3 { continue }
            for index in words.indices {
                switch kind {
                case 0: words[index] = 0
                case 1, 2, 3: words[index] = random.next()
                default: words[index] = index % 3 == 0 ? random.next() & 0x0f0f_0f0f_0f0f_0f0f : UInt64(index / 6) &* 0x0101_0101
                }
            }
            guard words.withUnsafeBytes({ pwrite(file, $0.baseAddress, $0.count, off_t(number << 20)) }) == 1 << 20 else {
                throw BenchError("cannot fill \(path)")
            }
        }
    }

    // MARK: - Requests

    private static func requests(_ setup: Setup) throws -> [Row] {
        var rows: [Row] = []
        let directory = setup.work
        let full = "\(directory)/full.qcow2", raw = "\(directory)/full.raw", over = "\(directory)/over.qcow2"
        defer { for path in [full, raw, over] { unlink(path) } }
        // All of it written, and an overlay that has nothing of its own.
        _ = try Child.run(["qemu-img", "create", "-q", "-f", "raw", "-o", "preallocation=full", raw, "512M"])
        _ = try Child.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=full", full, "512M"])
        _ = try Child.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", full, "-F", "qcow2", over])
        for (image, path) in [("raw", raw), ("qcow2", full), ("qcow2 over qcow2", over)] {
            for (name, bytes, depth, step, count) in [
                ("random 4 KiB, depth 1", 4096, 1, 4096 * 65_537, 4000), ("random 4 KiB, depth 64", 4096, 64, 4096 * 65_537, 40_000),
                ("sequential 1 MiB, depth 4", 1 << 20, 4, 1 << 20, 512),
            ] {
                for writes in path == over ? [false] : [false, true] {
                    // The same places for both: long steps, round and round.
                    let words = ["-f", path == raw ? "raw" : "qcow2", "-c", "\(count)", "-d", "\(depth)", "-s", "\(bytes)", "-S", "\(step)", "-t", "none"] + (writes ? ["-w"] : [])
                    let seconds = try interleave(setup.runs, [
                        { try number(after: "Run completed in", in: try Child.run([setup.swkvm, "image", "bench"] + words + [path]).output) },
                        { try number(after: "Run completed in", in: try Child.run(["qemu-img", "bench", "-i", "io_uring"] + words + [path]).output) },
                    ])
                    let samples = seconds.map { Sample($0.map { Double(count) / $0 / 1e3 }) }
                    rows.append(Row(
                        name: "image bench, \(image), \(name), \(writes ? "write" : "read")", unit: "1000/s", ours: samples[0],
                        peer: ("qemu-img bench, io_uring", samples[1]), goal: .atLeast(1.2)))
                }
            }
        }
        return rows
    }

    // MARK: - Opening

    /// An image of 1 TiB with all its tables.
    private static func opening(_ setup: Setup) throws -> Row {
        let path = "\(setup.work)/large.qcow2"
        _ = try Child.run([setup.swkvm, "image", "create", "-q", "--preallocation", "metadata", path, "1T"])
        defer { unlink(path) }
        let milliseconds = try interleave(setup.runs, [{ try time { _ = try DiskImage(path: path).size } * 1e3 }])[0]
        return Row(name: "opening a qcow2 image of 1 TiB for writing", unit: "ms", ours: Sample(milliseconds), goal: .atMost(5))
    }
}
