// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import Synchronization
import TestSupport
import Testing

/// Images of every layout, made by us and read by qemu-img, and made by qemu-img and read by us.
@Suite(.timed) struct ConversionMatrixTests {
    /// One layout of a qcow2 image.
    struct Layout: Sendable, CustomStringConvertible {
        var options = QCOW2Options()
        var preallocation = Preallocation.off
        var compresses = false

        var description: String {
            "\(qemuOptions)\(compresses ? " compressed" : "")"
        }

        /// The same layout in qemu-img's words.
        var qemuOptions: String {
            var words = ["cluster_size=\(options.clusterSize)", "compat=\(options.compatibility.rawValue)"]
            if options.compatibility == .version3 {
                words += [
                    "refcount_bits=\(options.refcountBits)", "lazy_refcounts=\(options.lazyRefcounts ? "on" : "off")",
                ]
                words += [
                    "extended_l2=\(options.extendedL2 ? "on" : "off")", "compression_type=\(options.compression)",
                ]
            }
            if preallocation != .off { words.append("preallocation=\(preallocation)") }
            return words.joined(separator: ",")
        }
    }

    /// Every combination that the format allows of what is named here.
    static let layouts: [Layout] = {
        var layouts: [Layout] = []
        for clusterBits: UInt64 in [9, 12, 14, 16, 21] {
            for refcountBits in [1, 2, 4, 8, 16, 32, 64] {
                for extendedL2 in clusterBits >= 14 ? [false, true] : [false] {
                    for (preallocation, compression) in [
                        (.off, nil), (.metadata, nil), (.falloc, nil), (.full, nil), (.off, .zlib), (.off, .zstd),
                    ] as [(Preallocation, CompressionType?)] {
                        var layout = Layout(preallocation: preallocation, compresses: compression != nil)
                        layout.options.clusterSize = 1 << clusterBits
                        layout.options.refcountBits = refcountBits
                        layout.options.extendedL2 = extendedL2
                        layout.options.lazyRefcounts = refcountBits == 16
                        layout.options.compression = compression ?? .zlib
                        layouts.append(layout)
                    }
                }
            }
            for compresses in [false, true] {
                var layout = Layout(compresses: compresses)
                layout.options.clusterSize = 1 << clusterBits
                layout.options.compatibility = .version2
                layouts.append(layout)
            }
        }
        return layouts
    }()

    /// A disk with random, repeating and zero stretches that begin and end anywhere, and a truncated last cluster.
    static let disk: [UInt8] = {
        var disk = [UInt8](repeating: 0, count: 600 << 10 | 5 << 9)
        var generator = SeededGenerator(seed: 4)
        let random = randomBytes(disk.count, seed: 5)
        var position = 0
        while position < disk.count {
            let count = min(Int.random(in: 1...50_000, using: &generator), disk.count - position)
            switch Int.random(in: 0..<4, using: &generator) {
            case 0: break
            case 1: disk.replaceSubrange(position..<position + count, with: random[position..<position + count])
            default:
                disk.replaceSubrange(
                    position..<position + count, with: (0..<count).map { UInt8(truncatingIfNeeded: $0 >> 6 & 0x5f) })
            }
            position += count
        }
        return disk
    }()

    private let directory = TemporaryDirectory(inMemory: true)

    /// Runs `body` for every layout, as many at a time as there are processors.
    private func forEachLayout(_ body: @escaping @Sendable (Int, Layout) throws -> Void) throws {
        #expect(Self.layouts.count >= 300)
        let next = Atomic<Int>(0)
        try withThreads(sysconf(Int32(_SC_NPROCESSORS_ONLN))) {
            while true {
                let index = next.wrappingAdd(1, ordering: .relaxed).oldValue
                guard index < Self.layouts.count else { return }
                do { try body(index, Self.layouts[index]) } catch { Issue.record("\(Self.layouts[index]): \(error)") }
            }
        }
    }

    @Test func qemuReadsWhatWeMake() throws {
        let raw = try directory.write("disk.raw", Self.disk)
        try forEachLayout { [directory] index, layout in
            let path = directory.file("\(index).qcow2")
            var conversion = ImageConversion(source: raw, target: path, format: .qcow2)
            conversion.options = layout.options
            conversion.preallocation = layout.preallocation
            conversion.compresses = layout.compresses
            conversion.threads = 1 + index % 3
            try conversion.run()
            let check = run(["qemu-img", "check", "-f", "qcow2", path])
            #expect(check.status == 0, "\(layout): \(check.output)")
            let comparison = run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, raw])
            #expect(comparison.status == 0, "\(layout): \(comparison.output)")
            if layout.compresses { #expect(!check.output.contains(" 0.00% compressed"), "\(layout): \(check.output)") }
            unlink(path)
        }
    }

    @Test func weReadWhatQEMUMakes() throws {
        let raw = try directory.write("disk.raw", Self.disk)
        try forEachLayout { [directory] index, layout in
            let path = directory.file("\(index).qcow2"), back = "\(index).raw"
            let made = run(
                ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", layout.qemuOptions]
                    + (layout.compresses ? ["-c"] : []) + [raw, path])
            try #require(made.status == 0, "\(layout): \(made.output)")
            var conversion = ImageConversion(source: path, target: directory.file(back), format: .raw)
            conversion.threads = 1 + index % 3
            try conversion.run()
            #expect(try directory.read(back) == Self.disk, "\(layout)")
            unlink(path)
            unlink(directory.file(back))
        }
    }

    /// An overlay of each layout over a base of another, each with something of its own: what is flattened is what
    /// qemu-img flattens.
    @Test func chains() throws {
        let raw = try directory.write("disk.raw", Self.disk)
        try forEachLayout { [directory] index, layout in
            guard layout.preallocation == .off else { return }
            let path = directory.file("\(index).qcow2"), back = directory.file("\(index).back.qcow2")
            var creation = ImageCreation(
                path: path, format: .qcow2, size: UInt64(Self.disk.count) + (index % 2 == 0 ? 0 : 1 << 20))
            creation.options = layout.options
            creation.backing = BackingReference(name: "disk.raw", format: .raw)
            if creation.options.clusterSize == 512, creation.options.compatibility == .version3 {
                // Header, names of features and backing file do fit, without the first.
                creation.options.clusterSize = 1024
            }
            try creation.create()
            qemuIO(path, ["write -P 7 100k 70k", "write -P 9 300k 4k", "write -z 400k 130k"])
            var conversion = ImageConversion(source: path, target: back, format: .qcow2)
            conversion.compresses = layout.compresses
            try conversion.run()
            let comparison = run(["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", path, back])
            #expect(comparison.status == 0, "\(layout): \(comparison.output)")
            let check = run(["qemu-img", "check", "-f", "qcow2", path])
            #expect(check.status == 0, "\(layout): \(check.output)")
            unlink(path)
            unlink(back)
        }
        #expect(try directory.read("disk.raw") == Self.disk)
        _ = raw
    }
}

/// Runs `body` in some threads of their own and waits for them: the pool of Swift's concurrency is not for what blocks.
func withThreads(_ count: Int, _ body: @escaping @Sendable () -> Void) throws {
    final class Slot {
        let thread: Thread
        init(_ thread: consuming Thread) { self.thread = thread }
    }
    var threads: [Slot] = []
    for _ in 0..<max(1, count) { threads.append(Slot(try Thread.start(name: "matrix", stackSize: 8 << 20, body))) }
}
