// SPDX-License-Identifier: Apache-2.0

import Glibc

/// (e) The memory of a running machine besides its RAM, and the size of the program.
enum FootprintBench {
    static func run(_ setup: Setup) throws -> [Row] {
        let disk = "\(setup.work)/footprint.raw"
        try writeFile(disk, [UInt8](repeating: 0, count: 1 << 20))
        let swkvm = setup.run(["--kernel", "bundled", "--disk", disk, "--net", "tap=swfoot0"])
        let qemu = setup.qemu([
            "-kernel", setup.guest, "-drive", "if=none,id=disk,format=raw,file=\(disk)", "-device",
            "virtio-blk-device,drive=disk",
            "-netdev", "tap,id=net,ifname=swfoot1,script=no,downscript=no", "-device", "virtio-net-device,netdev=net",
        ])
        // The build has just written the program, so it is in the page cache in folios of up to 2 MiB, which the kernel
        // maps as a whole. When it is read from the disk, as after a boot of the host, folios are small.
        let written = Sample(try interleave(setup.runs, [{ try resident(swkvm) }])[0])
        try dropFromPageCache(setup.swkvm)
        let bare = setup.run([])
        let figures = try interleave(
            setup.runs,
            [
                { try resident(swkvm) }, { try resident(qemu) }, { try resident(bare) },
            ]
        ).map(Sample.init)
        let size = Sample([Double(try fileSize(setup.swkvm)) / 1e6])
        return [
            Row(
                name: "resident besides guest RAM, one disk, one net", unit: "MiB", ours: figures[0], goal: .atMost(3.5)
            ),
            Row(
                name: "resident besides guest RAM, one disk, one net", unit: "MiB", ours: figures[0],
                peer: ("QEMU microvm", figures[1])),
            Row(name: "the same, right after the program's file was written", unit: "MiB", ours: written),
            Row(name: "resident besides guest RAM, no device", unit: "MiB", ours: figures[2]),
            Row(name: "binary, stripped and static", unit: "MB", ours: size, goal: .atMost(15)),
        ]
    }

    /// Writes the file back and drops its pages.
    private static func dropFromPageCache(_ path: String) throws {
        let file = open(path, O_RDONLY | O_CLOEXEC)
        guard file >= 0, fdatasync(file) == 0, posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED) == 0 else {
            throw BenchError("cannot drop \(path) from the page cache")
        }
        close(file)
    }

    /// MiB of all mappings except guest RAM, when the guest has waited at its prompt for so long that swkvm has freed
    /// the memory of its start.
    private static func resident(_ words: [String]) throws -> Double {
        let child = try Child(words)
        // The prompt comes at the start of a line.
        try child.collect { $0.suffix(3) == Array("\n> ".utf8)[...] }
        guard child.output.suffix(3) == Array("\n> ".utf8)[...] else {
            throw BenchError("\(words.joined(separator: " ")): no prompt\n\(child.text)")
        }
        usleep(1_500_000)
        let text = String(decoding: try readFile("/proc/\(child.pid)/smaps"), as: UTF8.self)
        var mappings: [(start: Int, size: Int, resident: Int)] = []
        for line in text.split(separator: "\n") {
            let words = line.split(separator: " ")
            if words.count >= 2, let value = Int(words[1]) {
                if words[0] == "Size:" { mappings[mappings.count - 1].size = value }
                if words[0] == "Rss:" { mappings[mappings.count - 1].resident = value }
            } else if let start = line.split(separator: "-").first.flatMap({ Int($0, radix: 16) }) {
                mappings.append((start, 0, 0))
            }
        }
        // One mapping, or two where the kernel is asked for huge pages in a part of it.
        let ram = mappings.indices.lazy.compactMap { index -> Range<Int>? in
            if mappings[index].size == Setup.memory << 10 { return index..<index + 1 }
            guard index > 0, mappings[index - 1].start + mappings[index - 1].size << 10 == mappings[index].start,
                mappings[index - 1].size + mappings[index].size == Setup.memory << 10
            else { return nil }
            return index - 1..<index + 1
        }.first
        guard let ram else { throw BenchError("\(words[0]): its guest's RAM is not one mapping") }
        mappings.removeSubrange(ram)
        return Double(mappings.reduce(0) { $0 + $1.resident }) / 1024
    }
}
