// SPDX-License-Identifier: Apache-2.0

@testable import Boot
import FuzzTargets
import GuestMemory
import Linux
import TestSupport
import Testing

@Suite(.timed) struct CompressedKernelTests {
    /// What a loader says to a file, with room for `limit` bytes.
    private func error(_ bytes: [UInt8], limit: UInt64 = 64 << 20) -> BootError? {
        withFile(bytes, name: "vmlinux.gz") { file in
            bootError { _ = try KernelLoader(kernel: file, memorySize: limit) }
        }
    }

    @Test func bootsAsTheSameKernelUncompressed() throws {
        // More than one buffer of input: not compressible.
        var random = SeededGenerator(seed: 7)
        let contents = (0..<700_000).map { _ in UInt8.random(in: 0...255, using: &random) }
        let kernel = ELFBuilder.kernel(contents).bytes
        let memory = try GuestMemory(size: 16 << 20)
        let state = try withFile(gzip(kernel)) {
            try KernelLoader(kernel: $0, memorySize: 16 << 20).load(into: memory, isFresh: true)
        }
        #expect(state == (try withFile(kernel) { try KernelLoader(kernel: $0).load(into: memory, isFresh: true) }))
        try memory.ram.fill(at: GuestAddress(0x10_0000), count: UInt64(contents.count), with: 0)
        try withFile(gzip(kernel)) { file in
            let loader = try KernelLoader(kernel: file)
            _ = try loader.load(into: memory, isFresh: true)
        }
        #expect(try memory.ram.readBytes(at: GuestAddress(0x10_0000), count: contents.count) == contents)
    }

    @Test func readsAFile() throws {
        try TemporaryFile.with(gzip(ELFBuilder.kernel().bytes), suffix: ".gz") { path in
            let memory = try GuestMemory(size: 16 << 20)
            #expect(
                try KernelLoader(kernel: try BootFile(path: path)).load(into: memory, isFresh: true).rip == 0x10_0000)
        }
    }

    @Test func takesNoMoreThanTheGuestHas() {
        let kernel = ELFBuilder.kernel(Array(repeating: 0, count: 1 << 20)).bytes
        #expect(error(gzip(kernel), limit: UInt64(kernel.count)) == nil)
        #expect(
            error(gzip(kernel), limit: UInt64(kernel.count) - 1)
                == .decompressedTooLarge(
                    file: "vmlinux.gz", size: UInt64(kernel.count), limit: UInt64(kernel.count) - 1))
        // The file's own word for its size, the last four bytes, is not believed in either direction.
        var more = gzip(kernel), less = gzip(kernel), none = gzip(kernel)
        more.store(UInt32(kernel.count + 4096), at: more.count - 4)
        less.store(UInt32(4096), at: less.count - 4)
        none.store(UInt32(0), at: none.count - 4)
        #expect(
            error(more)?.description.contains("ends before its declared size") == true
                || error(more)?.description.contains("damaged") == true)
        #expect(
            error(less)
                == .malformed(
                    file: "vmlinux.gz", reason: "it decompresses to more than the 4096 bytes that it declares"))
        #expect(error(none) == .malformed(file: "vmlinux.gz", reason: "it decompresses to nothing"))
    }

    @Test func refusesDamagedFiles() {
        let kernel = ELFBuilder.kernel().bytes
        let whole = gzip(kernel)
        for length in 3..<whole.count { #expect(error(Array(whole[..<length])) != nil, "cut to \(length) bytes") }
        for index in whole.indices {
            var damaged = whole
            damaged[index] ^= 0x10
            // Some bits mean nothing to what is in the file: of the header's time stamp, or where equal bytes are
            // repeated from.
            let result = withFile(damaged) { file in
                try? file.decompressed(limit: 1 << 20).read(at: 0, count: kernel.count)
            }
            #expect(result == nil || result == kernel, "byte \(index) was changed")
        }
        #expect(error(whole + [0]) != nil)
        #expect(error(whole + whole) != nil)
    }

    @Test func saysWhatItDoesNotUnderstand() {
        func refusal(_ magic: [UInt8]) -> String? { error(magic + Array(repeating: 0, count: 100))?.description }
        #expect(
            refusal([0x28, 0xb5, 0x2f, 0xfd])
                == "vmlinux.gz is compressed with zstd; only uncompressed and gzip-compressed kernels are supported: decompress it first"
        )
        #expect(refusal([0xfd, 0x37, 0x7a, 0x58, 0x5a, 0])?.contains("with xz") == true)
        #expect(error(gzip(gzip(ELFBuilder.kernel().bytes))) == .notAKernel(file: "vmlinux.gz"))
        #expect(error(gzip(Array("no kernel".utf8))) == .notAKernel(file: "vmlinux.gz"))
    }
}
