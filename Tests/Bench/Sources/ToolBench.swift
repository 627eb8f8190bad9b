import DiskImage
import Glibc

/// `swkvm image` beside qemu-img: conversions with the page cache dropped before each, requests, and the opening of a large image.
enum ToolBench {
    private static let size = 512 << 20

    static func run(_ setup: Setup) throws -> [Row] {
        let source = "\(setup.work)/source"
        try makeImage("\(source).raw")
        _ = try Child.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "\(source).raw", "\(source).qcow2"])
        defer { for format in ["raw", "qcow2"] { unlink("\(source).\(format)") } }
        return try conversions(setup, source) + RequestBench.run(setup) + [opening(setup)]
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
                // Without the round that does not count.
                Row(
                    name: "convert \(kind.name), CPU", unit: "s", ours: Sample(Array(cpu[0].dropFirst())), peer: ("qemu-img", Sample(Array(cpu[1].dropFirst()))),
                    goal: .atMost(1)),
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
