// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// VDI and VMDK images that we wrote, judged by qemu-img.
@Suite(.timed) struct FormatWritingTests {
    let directory = TemporaryDirectory(inMemory: true)

    @Test(arguments: FormatKind.writable, [false, true]) func randomOperationsDoWhatAnArrayDoes(
        kind: FormatKind, isEmpty: Bool
    ) throws {
        let seed =
            kind.testDescription.utf8.reduce(UInt64(environment("SWKVM_SEED") ?? 1)) { $0 &* 31 &+ UInt64($1) }
            &+ (isEmpty ? 1 : 0)
        let contents = isEmpty ? [UInt8](repeating: 0, count: kind.size) : QCOW2ImageTests.sparse(kind.size, seed: seed)
        let path = try directory.make(kind, contents)
        try directory.randomOperations(path, kind.format, contents, seed: seed)
    }

    /// An image of three files: two with grain tables, one of them with a cut grain at its end, and a flat one.
    @Test func anImageOfSeveralFilesIsWritten() throws {
        let sizes = [640 << 10, 512 << 10, 300 << 10]
        for (index, size) in sizes.enumerated() where index != 1 {
            qemuImage("create", "-q", "-f", "vmdk", directory.file("\(index).vmdk"), "\(size)")
        }
        try directory.write("1.flat", [UInt8](repeating: 0, count: sizes[1] + 512))
        let lines = [
            "RW \(sizes[0] / 512) SPARSE \"0.vmdk\"", "RW \(sizes[1] / 512) FLAT \"1.flat\" 1",
            "RW \(sizes[2] / 512) SPARSE \"2.vmdk\"",
        ]
        let path = try directory.write(
            "disk.vmdk", VMDKDescriptor.text(type: "twoGbMaxExtentSparse", extents: lines, sectors: 1))
        try directory.randomOperations(path, .vmdk, [UInt8](repeating: 0, count: sizes.reduce(0, +)), seed: 11)
        #expect(try directory.bytes("1.flat").prefix(512).allSatisfy { $0 == 0 })
    }

    /// Others see by the content ID that an image has changed, and by a mark that nobody closed it.
    @Test func aVMDKSaysThatItChanged() throws {
        let path = directory.file("disk.vmdk")
        qemuImage("create", "-q", "-f", "vmdk", path, "4M")
        let before = try directory.bytes("disk.vmdk")
        func contentID(_ bytes: [UInt8]) throws -> String {
            let place = try #require(VMDKDescriptor(Array(bytes[512..<1536]), path: path).contentIDPlace)
            return String(decoding: bytes[512 + place..<512 + place + 8], as: UTF8.self)
        }
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            _ = try engine.read(0, 4096)
            try engine.perform(.flush)
        }
        #expect(try directory.bytes("disk.vmdk") == before)
        var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
        try engine.write(0, [UInt8](repeating: 5, count: 512))
        try engine.perform(.flush)
        let during = try directory.bytes("disk.vmdk")
        #expect(during[72] == 1)
        #expect(try contentID(during) != contentID(before))
        _ = consume engine
        #expect(try directory.bytes("disk.vmdk")[72] == 0)
    }

    /// A grain directory without tables, as an image of holes has it: tables are made as they are needed.
    @Test func missingGrainTablesAreMade() throws {
        let path = directory.file("disk.vmdk")
        qemuImage("create", "-q", "-f", "vmdk", path, "100M")
        var bytes = try directory.bytes("disk.vmdk")
        // Both directories, of four entries each.
        for place in [21, 26] {
            bytes.replaceSubrange(place * 512..<place * 512 + 16, with: repeatElement(0, count: 16))
        }
        try directory.write("disk.vmdk", bytes)
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            #expect(try engine.read(0, 4096).allSatisfy { $0 == 0 })
            try engine.write(10 << 20, randomBytes(200 << 10, seed: 1))
            try engine.write(90 << 20, randomBytes(1 << 20, seed: 2))
            try engine.perform(.discard, at: 40 << 20, length: 1 << 20)
            try engine.perform(.flush)
        }
        expectSound(path, .vmdk)
        let contents = try directory.contents("disk.vmdk", .vmdk)
        #expect(Array(contents[10 << 20..<10 << 20 + (200 << 10)]) == randomBytes(200 << 10, seed: 1))
        #expect(Array(contents[90 << 20..<91 << 20]) == randomBytes(1 << 20, seed: 2))
    }

    /// What is discarded gives its space back and stays where it is.
    @Test func discardsMakeHoles() throws {
        for kind in [FormatKind(format: .vdi, size: 16 << 20), FormatKind(format: .vmdk, size: 16 << 20)] {
            let path = try directory.make(kind, randomBytes(16 << 20, seed: 1))
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            let before = try FileDescriptor.open(path, O_RDONLY).status()
            try engine.perform(.discard, at: 1 << 20, length: 12 << 20)
            let after = try FileDescriptor.open(path, O_RDONLY).status()
            #expect(after.st_size == before.st_size && before.st_blocks - after.st_blocks > 11 << 11)
            #expect(try engine.read(1 << 20, 12 << 20).allSatisfy { $0 == 0 })
            _ = consume engine
            expectSound(path, kind.format)
        }
    }

    /// A VDI whose table names a block twice, or none that is there, is not written; nor is a VMDK whose tables lie on
    /// each other.
    @Test func damagedTablesKeepFromWriting() throws {
        let path = try directory.make(FormatKind(format: .vdi), randomBytes(5 << 20, seed: 1))
        let bytes = try directory.bytes("disk.vdi")
        for (entry, says) in [(UInt8(1), "is mapped twice"), (77, "which does not exist")] {
            var broken = bytes
            broken[512] = entry
            try directory.write("disk.vdi", broken)
            #expect("\(openError(path, unlocked)!)".contains(says))
        }
        let vmdk = try directory.make(
            FormatKind(format: .vmdk, options: "subformat=monolithicSparse", size: 33 << 20),
            [UInt8](repeating: 1, count: 33 << 20))
        var broken = try directory.bytes("disk.vmdk")
        // The second table is where the first one is.
        broken.replaceSubrange(21 * 512 + 4..<21 * 512 + 8, with: broken[21 * 512..<21 * 512 + 4])
        try directory.write("disk.vmdk", broken)
        #expect("\(openError(vmdk, unlocked)!)".contains("overlap"))
    }
}

extension TemporaryDirectory {
    /// Random operations in three sessions do to an image what they do to an array; qemu-img finds it sound and reads
    /// the same.
    func randomOperations(_ path: String, _ format: ImageFormat, _ start: [UInt8], seed: UInt64) throws {
        var workload = Workload(start, seed: seed, maximum: 200 << 10)
        let rounds = environment("SWKVM_ROUNDS") ?? 40
        for session in 0..<3 {
            let options = DiskImageOptions(locking: false, metadataCacheSize: session == 0 ? 0 : 32 << 20)
            var engine = try DiskEngine(DiskImage(path: path, options: options), depth: 8, usesRing: session != 1)
            for round in 0..<rounds {
                try workload.round(&engine)
                if round % 9 == 8 { try engine.perform(.flush) }
            }
            #expect(try isSame(engine.readAll(), workload.model), "seed \(seed)")
            let damage = engine.image.damage
            #expect(damage == nil)
            _ = consume engine
            expectSound(path, format, "seed \(seed), session \(session)")
            #expect(
                try isSame(contents(String(path.split(separator: "/").last!), format), workload.model), "seed \(seed)")
        }
        let operations = workload.operations
        #expect(operations > 3 * rounds)
    }
}
