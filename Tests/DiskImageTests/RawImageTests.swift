@testable internal import DiskImage
internal import Glibc
internal import Linux
internal import Testing

@Suite struct RawImageTests {
    let directory = TemporaryDirectory()

    @Test(arguments: [true, false]) func readsAndWritesWhatItIsTold(usesRing: Bool) throws {
        var contents = randomBytes(1 << 20, seed: 1)
        let path = try directory.write("disk.raw", contents)
        do {
            var engine = try DiskEngine(DiskImage(path: path), usesRing: usesRing)
            #expect(engine.usesRing == usesRing)
            #expect(engine.image.size == 1 << 20)
            #expect(try engine.readAll(chunk: 100_000) == contents)
            let piece = randomBytes(12_345, seed: 2)
            try engine.write(54_321, piece)
            contents.replaceSubrange(54_321..<54_321 + 12_345, with: piece)
            try unsafe engine.perform(.flush, at: 0, length: 0)
            #expect(try engine.readAll() == contents)
        }
        #expect(try directory.read("disk.raw") == contents)
    }
}
