// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import DiskImage
import Glibc
@testable import swkvm
import TestSupport
import Testing

/// What users of qemu-img type: it is done where it can be, and otherwise named with what to use.
@Suite(.timed) struct QEMUWordsTests {
    private func translated(_ line: String) throws -> [String] {
        Array(try QEMUWords.translated(["image"] + line.split(separator: " ").map(String.init)).dropFirst())
    }

    private func parse<Verb>(_ verb: Verb.Type, _ line: String) throws -> Verb {
        try #require(try Command.parseAsRoot(["image"] + translated(line)) as? Verb)
    }

    private func refusal(_ line: String) -> String {
        do {
            let words = try translated(line)
            _ = try Command.parseAsRoot(["image"] + words)
            Issue.record("\(line) was taken: \(words)")
            return ""
        } catch {
            #expect(Command.exitCode(for: error) == .validationFailure, "\(line)")
            return Command.message(for: error)
        }
    }

    @Test func valuesStandRightBehindTheirOption() throws {
        let convert = try parse(ImageConvertCommand.self, "convert -pfqcow2 -Oraw -m4 -lone a b")
        #expect(
            convert.progress && convert.format == .qcow2 && convert.targetFormat?.format == .raw && convert.threads == 4
                && convert.snapshot == "one")
        #expect(convert.source == "a" && convert.target == "b")
        let create = try parse(ImageCreateCommand.self, "create -qfqcow2 -bbase.raw -Fraw -ocluster_size=1M a")
        #expect(
            create.quiet && create.backing == "base.raw" && create.backingFormat == .raw
                && create.layout.options.clusterSize == 1 << 20)
        #expect(try parse(ImageCheckCommand.self, "check -rall -fqcow2 a").repair == .all)
        #expect(try parse(ImageBenchCommand.self, "bench -c10 -s4k -tnone -wfraw a").size.bytes == 4096)
        // As our parser has it, and apart.
        #expect(try parse(ImageInfoCommand.self, "info -f=qcow2 a").image.format == .qcow2)
        #expect(try parse(ImageInfoCommand.self, "info -f qcow2 a").image.format == .qcow2)
        #expect(try parse(ImageInfoCommand.self, "info --format=qcow2 a").image.format == .qcow2)
        // A size that is taken away is no option, and what follows `--` is none either.
        #expect(try parse(ImageResizeCommand.self, "resize -fraw --shrink a -1G").size() == SizeChange(parsing: "-1G"))
        #expect(try translated("info -- -fraw") == ["info", "--", "-fraw"])
    }

    @Test func whatIsThereIsTaken() throws {
        #expect(try parse(ImageCheckCommand.self, "check -U a.qcow2").forceShare)
        #expect(try parse(ImageConvertCommand.self, "convert -U a b").forceShare)
        #expect(try parse(ImageBenchCommand.self, "bench -U a").forceShare)
        #expect(refusal("check -U -r all a").contains("--repair cannot be combined with -U"))
        #expect(refusal("bench -U -w a").contains("--write cannot be combined with -U"))
        let place = try parse(ImageConvertCommand.self, "convert -n -W -C --target-is-zero -S 4k a /dev/x")
        #expect(place.noCreate && !place.force)
        let map = try parse(ImageMapCommand.self, "map --start-offset 1M -l64k a")
        #expect(map.startOffset.bytes == 1 << 20 && map.maxLength?.bytes == 64 << 10)
        #expect(try translated("bench -n -i native --no-drain -q a") == ["bench", "a"])
        #expect(try parse(ImageRebaseCommand.self, "rebase -t none -T none -u -b b a.qcow2").unsafe)
        #expect(try translated("commit -t writeback a") == ["commit", "a"])
        #expect(try translated("compare -Tnone a b") == ["compare", "a", "b"])
    }

    @Test(arguments: [
        ("-t none -T none", ToolCache.none, false), ("-T none", .none, false), ("-t none -T writeback", .none, false),
        ("-t writeback", .writeback, false),
        ("-t unsafe", .automatic, false), ("-tdirectsync", .none, true), ("-t writethrough", .writeback, true),
        ("", .automatic, false),
    ])
    func modesOfThePageCache(words: String, cache: ToolCache, isSynchronous: Bool) throws {
        let convert = try parse(ImageConvertCommand.self, "convert \(words) -- a b")
        #expect(convert.cache == cache && convert.sync == isSynchronous)
        #expect(refusal("convert -t fast a b").contains("expected none, writeback, unsafe, writethrough, directsync"))
    }

    @Test func wordsOfTheLayout() throws {
        let create = try parse(
            ImageCreateCommand.self,
            "create -f qcow2 -o cluster_size=1M,lazy_refcounts,backing_file=a,,b.raw,backing_fmt=raw -o size=2G,data_file=d,data_file_raw=on x"
        )
        #expect(create.layout.options.clusterSize == 1 << 20 && create.layout.options.lazyRefcounts)
        #expect(
            create.backing == "a,b.raw" && create.backingFormat == .raw && create.sizeOption?.bytes == 2 << 30
                && create.dataFile == "d" && create.dataFileRaw)
        let convert = try parse(
            ImageConvertCommand.self,
            "convert -O qcow2 -o encryption=on,encrypt.format=luks,encrypt.iter-time=100,backing_file=b.raw,backing_fmt=raw a x"
        )
        #expect(convert.encryption.encrypt && convert.encryption.iterTime == 100 && convert.backing == "b.raw")
        #expect(
            try parse(ImageConvertCommand.self, "convert -O vdi -o static=on a x").layout.subformat
                == ImageSubformat(rawValue: "static"))
        #expect(try translated("create -o encryption=off,data_file_raw=off x 1G") == ["create", "x", "1G"])
        for (line, words) in [
            ("create -o foo=1 x 1G", "-o foo is not recognized; expected cluster_size"),
            ("create -o help x", "-o supports cluster_size"), ("create -o nocow=on x 1G", "chattr +C"),
            ("create -o encrypt.key-secret=s x 1G", "--key-file"),
            ("create -o encrypt.format=aes x 1G", "encrypt.format=luks"),
            ("create -o adapter_type=lsilogic x 1G", "IDE disk"),
            ("convert -o data_file=d a x", "an external data file is not supported for conversion"),
            ("convert -o size=1G a x", "swkvm image resize"), ("create -o static=maybe x 1G", "expected on or off"),
        ] { #expect(refusal(line).contains(words), "\(line): \(refusal(line))") }
    }

    @Test func snapshotsByNumberOrName() throws {
        for (word, name) in [("snap", "snap"), ("snapshot.name=snap", "snap"), ("snapshot.id=3", "3")] {
            #expect(try translated("convert -l \(word) a b") == ["convert", "-l", name, "a", "b"])
        }
    }

    @Test func whatIsNotThereIsNamedWithWhatToUse() throws {
        for (line, word, use) in [
            ("measure -O qcow2 a", "measure", "map --json"), ("amend -o compat=v3 a", "amend", "convert"),
            ("bitmap --add a b", "bitmap", "qemu-img bitmap"),
            ("convert -r 10M a b", "-r", "systemd-run"), ("convert -S 0 a b", "-S 0", "--preallocation full"),
            ("convert -s one a b", "-s", "-l NAME"),
            ("convert --bitmaps a b", "--bitmaps", "qemu-img"),
            ("convert --image-opts driver=raw b", "--image-opts", "--format"),
            ("convert --target-image-opts a b", "--target-image-opts", "--target-format"),
            ("info --object secret,id=s,file=f a", "--object", "--key-file"),
            ("commit -b base a", "-b", "one image of the chain after the other"),
            ("rebase -c -b b a", "-c", "convert --compress"), ("convert -e a b", "-e", "--encrypt"),
        ] {
            let message = refusal(line)
            #expect(message.contains("has no \(word)") || message.contains(word), "\(line): \(message)")
            #expect(message.contains(use), "\(line): \(message)")
        }
    }

    /// A copy of all is a conversion.
    @Test func copiesOfWholeImages() throws {
        let convert = try parse(ImageConvertCommand.self, "dd -f raw -Oqcow2 bs=1M if=a.raw of=b.qcow2")
        #expect(
            convert.source == "a.raw" && convert.target == "b.qcow2" && convert.format == .raw
                && convert.targetFormat?.format == .qcow2 && convert.force)
        #expect(refusal("dd if=a of=b count=1").contains("count="))
        #expect(refusal("dd if=a").contains("if=FILE and of=FILE"))
        #expect(refusal("dd if=a of=b conv=notrunc").contains("conv="))
    }

    /// docs/images.md has every word of the table.
    @Test func theTableIsInTheManual() throws {
        let here = #filePath.split(separator: "/").dropLast(3).joined(separator: "/")
        let bytes = try #require(Self.contents(ofFile: "/\(here)/docs/images.md"))
        let text = String(decoding: bytes, as: UTF8.self)
        for (verb, options) in QEMUWords.options {
            for option in options where option.treatment != .same {
                #expect(text.contains("\(option.name)`") || text.contains("\(option.name) "), "\(verb) \(option.name)")
            }
        }
        for word in QEMUWords.layoutWords.keys { #expect(text.contains(word), "\(word)") }
        for verb in QEMUWords.verbs.keys { #expect(text.contains("`\(verb)`"), "\(verb)") }
    }

    private static func contents(ofFile path: String) -> [UInt8]? {
        guard let file = fopen(path, "r") else { return nil }
        defer { fclose(file) }
        var bytes = [UInt8](repeating: 0, count: 1 << 20)
        let count = fread(&bytes, 1, bytes.count, file)
        return Array(bytes.prefix(count))
    }
}
