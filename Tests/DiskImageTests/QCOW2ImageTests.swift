@testable internal import DiskImage
internal import Glibc
internal import Linux
internal import Testing

/// Images made by qemu-img, read back byte for byte.
@Suite struct QCOW2ImageTests {
    let directory = TemporaryDirectory()

    /// Data with runs of zeroes in it, so that there are allocated and unallocated clusters of all sizes.
    static func sparse(_ size: Int, seed: UInt64) -> [UInt8] {
        var generator = SeededGenerator(seed: seed)
        var bytes: [UInt8] = []
        bytes.reserveCapacity(size)
        while bytes.count < size {
            let run = Int.random(in: 1...200_000, using: &generator)
            switch Int.random(in: 0..<3, using: &generator) {
            case 0: bytes += repeatElement(0, count: run)
            case 1: bytes += randomBytes(run, seed: generator.next())
            // What compresses.
            default: bytes += repeatElement(UInt8.random(in: 1...255, using: &generator), count: run)
            }
        }
        return Array(bytes.prefix(size))
    }

    @Test(arguments: [512, 4096, 65536, 1 << 21], ["0.10", "1.1"])
    func readsWhatQEMUConverted(clusterSize: Int, compatibility: String) throws {
        for compressed in [false, true] { try readsWhatQEMUConverted(clusterSize, compatibility, compressed) }
    }

    func readsWhatQEMUConverted(_ clusterSize: Int, _ compatibility: String, _ compressed: Bool) throws {
        let contents = Self.sparse(3 << 20 | 512, seed: UInt64(clusterSize))
        let raw = try directory.write("in.raw", contents)
        let path = directory.file("disk.qcow2")
        let command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=\(clusterSize),compat=\(compatibility)"]
            + (compressed ? ["-c"] : []) + [raw, path]
        let made = run(command)
        #expect(made.status == 0, "\(made.output)")
        for usesRing in [true, false] {
            var engine = try DiskEngine(DiskImage(path: path, options: readOnly), usesRing: usesRing)
            #expect(engine.image.size == UInt64(contents.count))
            #expect(try engine.readAll(chunk: 777 * 512) == contents)
            #expect(try engine.readAll(chunk: 4096) == contents)
            #expect(engine.image.damage == nil)
        }
    }
}
