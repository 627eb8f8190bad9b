// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Internal snapshots: ours seen by qemu-img, and qemu-img's seen by us.
@Suite(.timed) struct SnapshotTests {
    let directory = TemporaryDirectory(inMemory: true)

    private func make(_ options: String, _ size: Int) -> String {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", options, path, "\(size)")
        return path
    }

    /// What qemu-img makes of a snapshot, or of the current state.
    private func contents(_ path: String, _ snapshot: String? = nil) throws -> [UInt8] {
        let choice = snapshot.map { ["-l", "snapshot.name=\($0)"] } ?? []
        let (status, output) = run(
            ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw"] + choice + [path, directory.file("out.raw")])
        #expect(status == 0, "\(output)")
        return try directory.read("out.raw")
    }

    static let options = [
        "cluster_size=512", "cluster_size=512,compat=0.10", "cluster_size=4k,refcount_bits=8",
        "cluster_size=4k,refcount_bits=64", "cluster_size=64k",
        "cluster_size=128k,refcount_bits=2",
    ]

    @Test(arguments: options) func oursAreThoseOfQEMU(options: String) throws {
        let size = 1 << 20
        let path = make(options, size)
        var states: [[UInt8]] = []
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            for index in 0..<2 {
                try engine.write(UInt64(index) * 100 << 10, randomBytes(300 << 10, seed: UInt64(index)))
                try engine.perform(.writeZeroesUnmapping, at: UInt64(index) * 200 << 10, length: 64 << 10)
                states.append(try engine.readAll())
                let made = try engine.createSnapshot(named: "state \(index)")
                #expect(made.id == "\(index + 1)" && made.name == "state \(index)" && made.size == UInt64(size))
                expectSound(path, options)
            }
            try engine.write(50 << 10, randomBytes(700 << 10, seed: 9))
            states.append(try engine.readAll())
            #expect(try engine.snapshots().map(\.name) == ["state 0", "state 1"])
        }
        expectSound(path, options)
        let list = run(["qemu-img", "snapshot", "-l", path]).output
        #expect(list.contains("state 0") && list.contains("state 1"))
        #expect(try contents(path) == states[2])
        for index in 0..<2 {
            #expect(try contents(path, "state \(index)") == states[index])
            // By name and by id.
            for word in ["state \(index)", "\(index + 1)"] {
                var engine = try DiskEngine(
                    DiskImage(path: path, options: DiskImageOptions(readOnly: true, locking: false, snapshot: word)))
                #expect(try engine.readAll() == states[index])
            }
        }
        // QEMU goes back to one of ours, and we to the other.
        qemuImage("snapshot", "-a", "state 1", path)
        #expect(try contents(path) == states[1])
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            try engine.applySnapshot("state 0")
            #expect(try engine.readAll() == states[0])
            expectSound(path, options)
            // What is written now changes none of them.
            try engine.write(0, [UInt8](repeating: 0x77, count: 512 << 10))
            states[2] = try engine.readAll()
            try engine.deleteSnapshot("state 0")
            #expect(try engine.readAll() == states[2])
            expectSound(path, options)
        }
        #expect(try contents(path, "state 1") == states[1])
        qemuImage("snapshot", "-d", "state 1", path)
        expectSound(path, options)
        #expect(try contents(path) == states[2])
    }

    @Test(arguments: options.filter { !$0.contains("refcount_bits=2") }) func thoseOfQEMUAreOurs(options: String) throws
    {
        let path = make(options, 1 << 20)
        var states: [[UInt8]] = []
        for index in 0..<3 {
            qemuIO(path, ["write -P \(index + 1) \(index * 50)k 400k", "discard \(index * 100)k 64k"])
            states.append(try contents(path))
            qemuImage("snapshot", "-c", "s\(index)", path)
        }
        // Snapshots of version 2 do not know their disk's size.
        if !options.contains("0.10") { qemuImage("resize", "-q", "-f", "qcow2", path, "+1M") }
        qemuIO(path, ["write -P 9 600k 100k"])
        let now = try contents(path)
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            #expect(try engine.snapshots().map(\.name) == ["s0", "s1", "s2"])
            #expect(try engine.snapshots().map(\.size) == [1 << 20, 1 << 20, 1 << 20])
            try engine.deleteSnapshot("s1")
            expectSound(path, options)
            #expect(try engine.readAll() == now)
            try engine.createSnapshot(named: "grown")
            // The disk has the size that it had.
            try engine.applySnapshot("s0")
            let size = engine.image.size
            #expect(size == 1 << 20)
            #expect(try engine.readAll() == states[0])
            try engine.applySnapshot("grown")
            #expect(try engine.readAll() == now)
            try engine.deleteSnapshot("s0")
            try engine.deleteSnapshot("grown")
        }
        expectSound(path, options)
        #expect(try contents(path) == now)
        var engine = try DiskEngine(DiskImage(path: path, options: DiskImageOptions(readOnly: true, snapshot: "s2")))
        #expect(try engine.readAll() == states[2])
    }

    @Test func whatCannotBeIsRefused() throws {
        let path = make("cluster_size=4k,refcount_bits=1", 1 << 20)
        let raw = try directory.write("disk.raw", [UInt8](repeating: 0, count: 512))
        #expect(
            openError(path, DiskImageOptions(readOnly: true, snapshot: "none")) == .noSnapshot(path: path, name: "none")
        )
        #expect("\(openError(raw, DiskImageOptions(readOnly: true, snapshot: "none"))!)".contains("no snapshots"))
        #expect("\(openError(path, DiskImageOptions(snapshot: "none"))!)".contains("add ,ro"))
        var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
        try engine.write(0, [UInt8](repeating: 1, count: 65536))
        #expect(throws: DiskImageError.noSnapshot(path: path, name: "none")) { try engine.applySnapshot("none") }
        #expect(throws: DiskImageError.noSnapshot(path: path, name: "none")) { try engine.deleteSnapshot("none") }
        // Counts of one bit count no second reference; nothing is left of the attempt.
        #expect(throws: DiskImageError.countsTooNarrow(path: path, bits: 1, needed: 2)) {
            try engine.createSnapshot(named: "one")
        }
        #expect(try engine.snapshots().isEmpty)
        try engine.write(4096, [UInt8](repeating: 2, count: 4096))
        #expect(try engine.read(0, 8192) == [UInt8](repeating: 1, count: 4096) + [UInt8](repeating: 2, count: 4096))
        _ = consume engine
        expectSound(path)
    }
}
