// SPDX-License-Identifier: Apache-2.0

@testable import Boot
import TestSupport
import Testing

@Suite(.timed) struct ELFImageTests {
    private func image(_ builder: ELFBuilder) throws -> ELFImage { try withFile(builder.bytes) { try ELFImage($0) } }
    private func error(_ bytes: [UInt8]) -> BootError? { bootError { _ = try withFile(bytes) { try ELFImage($0) } } }

    @Test func readsSegmentsInTheOrderOfTheirAddresses() throws {
        var builder = ELFBuilder.kernel()
        builder.segments.insert(.init(address: 0x20_0000, contents: [1, 2, 3]), at: 0)
        let image = try image(builder)
        #expect(image.segments.map(\.address) == [0x10_0000, 0x20_0000])
        #expect(image.segments.map(\.memorySize) == [320, 3])
        #expect(image.segments.map(\.fileSize) == [256, 3])
        #expect(image.entry == 0x10_0000 && image.is64Bit)
        #expect(image.pvhEntry == nil && image.longModeEntry == nil)
    }

    @Test(arguments: [ELFBuilder.word(UInt32(0x10_0010)), ELFBuilder.word(UInt64(0x10_0010))])
    func findsThePVHNote(value: [UInt8]) throws {
        var builder = ELFBuilder.kernel()
        builder.addNote("GNU", 3, [1, 2, 3, 4, 5])
        builder.addNote("Xen", 18, value)
        #expect(try image(builder).pvhEntry == 0x10_0010)
        builder.is64Bit = false
        builder.machine = 3
        #expect(try image(builder).pvhEntry == 0x10_0010)
    }

    @Test func findsSeveralNotesInOneSegment() throws {
        var builder = ELFBuilder.kernel()
        builder.segments.append(
            .init(
                type: 4, address: 0,
                contents: ELFBuilder.note("Linux", 6, [1])
                    + ELFBuilder.note("swkvm", 1, ELFBuilder.word(UInt64(0x10_0020)))
                    + ELFBuilder.note("Xen", 18, ELFBuilder.word(UInt32(0x10_0030)))))
        let image = try image(builder)
        #expect(image.longModeEntry == 0x10_0020)
        #expect(image.pvhEntry == 0x10_0030)
    }

    @Test func findsNotesPaddedToEight() throws {
        var builder = ELFBuilder.kernel()
        // Name of 6 bytes padded to 24 from the note's start, not 20.
        let note =
            ELFBuilder.word(UInt32(6)) + ELFBuilder.word(UInt32(8)) + ELFBuilder.word(UInt32(1)) + Array("swkvm\0".utf8)
            + [0, 0, 0, 0, 0, 0] + ELFBuilder.word(UInt64(0x10_0040))
        builder.segments.append(.init(type: 4, address: 0, contents: note, alignment: 8))
        #expect(try image(builder).longModeEntry == 0x10_0040)
    }

    @Test func translatesAVirtualEntry() throws {
        var builder = ELFBuilder.kernel()
        builder.segments[0].linkedAddress = 0xffff_ffff_8010_0000
        builder.entry = 0xffff_ffff_8010_0008
        #expect(try image(builder).entry == 0x10_0008)
        builder.entry = 0x5000
        #expect(try image(builder).entry == nil)
    }

    @Test func refusesOtherProcessorsByName() {
        var builder = ELFBuilder.kernel()
        builder.machine = 183
        #expect(
            error(builder.bytes)?.description
                == "kernel.elf is an ELF for AArch64 (machine 183); expected x86-64 (machine 62)")
        var bigEndian = ELFBuilder.kernel().bytes
        bigEndian[5] = 2
        bigEndian[18] = 0
        bigEndian[19] = 22
        #expect(error(bigEndian) == .wrongMachine(file: "kernel.elf", machine: 22))
    }

    @Test func refusesWhatIsNotELF() {
        #expect(error([]) == .notAKernel(file: "kernel.elf"))
        #expect(error(Array("#!/bin/sh\n".utf8)) == .notAKernel(file: "kernel.elf"))
    }

    @Test func refusesATruncatedFileAtEveryLength() throws {
        var builder = ELFBuilder.kernel()
        builder.addNote("Xen", 18, ELFBuilder.word(UInt32(0x10_0000)))
        let whole = builder.bytes
        for length in 0..<whole.count {
            let error = error(Array(whole[..<length]))
            if length < 4 {
                #expect(error == .notAKernel(file: "kernel.elf"))
            } else {
                guard case .truncated(_, let wanted, let found) = error else {
                    Issue.record("\(length) bytes: \(String(describing: error))")
                    continue
                }
                #expect(found == UInt64(length) && wanted > found)
            }
        }
    }

    @Test func refusesObjectFilesAndFilesWithNothingToLoad() {
        var builder = ELFBuilder.kernel()
        builder.type = 1
        #expect(error(builder.bytes) == .noLoadableSegment(file: "kernel.elf"))
        builder.type = 2
        builder.segments[0].type = 2
        #expect(error(builder.bytes) == .noLoadableSegment(file: "kernel.elf"))
        builder.segments = []
        #expect(error(builder.bytes) == .noLoadableSegment(file: "kernel.elf"))
    }

    @Test func refusesContradictions() {
        func malformed(_ change: (inout ELFBuilder) -> Void) -> Bool {
            var builder = ELFBuilder.kernel()
            change(&builder)
            if case .malformed = error(builder.bytes) { return true }
            return false
        }
        #expect(malformed { $0.segments[0].memorySize = 255 })
        #expect(malformed { $0.segments[0].address = .max - 100 })
        #expect(malformed { $0.segments.append(.init(address: 0x10_013f, contents: [1])) })
        #expect(!malformed { $0.segments.append(.init(address: 0x10_0140, contents: [1])) })
        #expect(malformed { $0.programHeaderCount = 0xffff })
        #expect(malformed { $0.programHeaderCount = 129 })
        #expect(malformed { $0.addNote("Xen", 18, [1, 2]) })
        #expect(malformed { $0.addNote("Xen", 18, ELFBuilder.word(UInt64(1) << 32)) })
        #expect(malformed { $0.addNote("Xen", 18, ELFBuilder.word(UInt32(0x10_0140))) })
        #expect(malformed { $0.addNote("swkvm", 1, ELFBuilder.word(UInt32(0x10_0000))) })
        #expect(malformed { $0.addNote("swkvm", 1, ELFBuilder.word(UInt64(0xf_ffff))) })
        // A note whose descriptor reaches past its segment.
        #expect(
            malformed {
                $0.segments.append(.init(type: 4, address: 0, contents: [4, 0, 0, 0, 255, 255, 255, 255, 18, 0, 0, 0]))
            })
        #expect(
            malformed {
                $0.segments.append(.init(type: 4, address: 0, contents: [255, 255, 255, 255, 0, 0, 0, 0, 18, 0, 0, 0]))
            })
        #expect(
            malformed { $0.segments.append(.init(type: 4, address: 0, contents: Array(repeating: 0, count: 65537))) })
    }

    @Test func refusesAnOffsetThatWraps() {
        var builder = ELFBuilder.kernel()
        builder.segments[0].fileSize = .max
        builder.segments[0].memorySize = .max
        builder.segments[0].address = 0
        guard case .truncated = error(builder.bytes) else {
            Issue.record("accepted")
            return
        }
    }

    /// Whatever a header says, the answer is an image or an error.
    @Test(arguments: 0..<8) func survivesChangedHeaders(seed: UInt64) {
        var random = SeededGenerator(seed: seed)
        var builder = ELFBuilder.kernel()
        builder.is64Bit = seed % 2 == 0
        builder.addNote("Xen", 18, ELFBuilder.word(UInt32(0x10_0000)))
        builder.addNote("swkvm", 1, ELFBuilder.word(UInt64(0x10_0000)))
        builder.segments.append(.init(address: 0x30_0000, contents: [1, 2, 3]))
        let good = builder.bytes
        let interesting: [UInt8] = [0, 1, 4, 0x7f, 0x80, 0xff]
        var accepted = 0
        for _ in 0..<2000 {
            var bytes = good
            for _ in 0..<Int.random(in: 1...6, using: &random) {
                let position = Int.random(in: 4..<400, using: &random)
                bytes[position] =
                    Bool.random(using: &random)
                    ? interesting.randomElement(using: &random)! : UInt8.random(in: 0...255, using: &random)
            }
            withFile(bytes) { file in
                guard let image = try? ELFImage(file) else { return }
                accepted += 1
                for segment in image.segments {
                    #expect(
                        segment.fileOffset + segment.fileSize <= file.size && segment.fileSize <= segment.memorySize)
                }
            }
        }
        #expect(accepted > 0 && accepted < 2000)
    }
}
