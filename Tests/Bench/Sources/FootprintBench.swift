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
            Row(name: "resident besides guest RAM, one disk, one net", unit: "MiB", ours: figures[0], goal: .atMost(8)),
            Row(
                name: "resident besides guest RAM, one disk, one net", unit: "MiB", ours: figures[0],
                peer: ("QEMU microvm", figures[1])),
            Row(name: "the same, right after the program's file was written", unit: "MiB", ours: written),
            Row(name: "resident besides guest RAM, no device", unit: "MiB", ours: figures[2]),
            Row(name: "binary, stripped and static", unit: "MB", ours: size, goal: .atMost(20)),
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

    /// MiB of all mappings except guest RAM, while the guest waits at its prompt.
    private static func resident(_ words: [String]) throws -> Double {
        let child = try Child(words)
        // The prompt comes at the start of a line.
        try child.collect { $0.suffix(3) == Array("\n> ".utf8)[...] }
        guard child.output.suffix(3) == Array("\n> ".utf8)[...] else {
            throw BenchError("\(words.joined(separator: " ")): no prompt\n\(child.text)")
        }
        let text = String(decoding: try readFile("/proc/\(child.pid)/smaps"), as: UTF8.self)
        var total = 0
        var hasRAM = false
        var isRAM = false
        for line in text.split(separator: "\n") {
            let words = line.split(separator: " ")
            guard words.count >= 2, let value = Int(words[1]) else { continue }
            if words[0] == "Size:" {
                isRAM = value == Setup.memory << 10
                hasRAM = hasRAM || isRAM
            } else if words[0] == "Rss:", !isRAM {
                total += value
            }
        }
        guard hasRAM, total > 0 else { throw BenchError("\(words[0]): its guest's RAM is not one mapping") }
        return Double(total) / 1024
    }
}
