// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import TestSupport
import Testing

/// Encryption with everything else that a layout can have: what the format allows is read by QEMU as it was written,
/// and what it does not is refused.
@Suite(.timed) struct EncryptionMatrixTests {
    let directory = TemporaryDirectory(inMemory: true)

    enum Base: CaseIterable { case none, raw, encrypted }

    struct Layout: CustomTestStringConvertible, Sendable {
        var clusterSize: UInt64 = 65536
        var hasSubclusters = false
        var base = Base.none
        var hasDataFile = false
        var preallocation = Preallocation.off

        /// Of what is set aside and not written nobody knows what it decrypts to; and clusters in their place hide what
        /// is below, but for subclusters.
        var isLegal: Bool {
            (!hasSubclusters || clusterSize >= 16384)
                && (preallocation == .off || (preallocation == .full && (base == .none || hasSubclusters)))
        }

        var testDescription: String {
            "\(clusterSize)\(hasSubclusters ? " subclusters" : "") base \(base)\(hasDataFile ? " data file" : "") preallocation \(preallocation)"
        }
    }

    static let layouts: [Layout] = {
        var layouts: [Layout] = []
        for clusterSize in [512, 4096, 16384, 65536, 2 << 20] as [UInt64] {
            for hasSubclusters in [false, true] {
                for base in Base.allCases {
                    for hasDataFile in [false, true] {
                        for preallocation in [Preallocation.off, .metadata, .falloc, .full] {
                            layouts.append(
                                Layout(
                                    clusterSize: clusterSize, hasSubclusters: hasSubclusters, base: base,
                                    hasDataFile: hasDataFile, preallocation: preallocation))
                        }
                    }
                }
            }
        }
        return layouts
    }()

    private static let size = 500 << 10 | 3 << 9

    /// What is below, if there is something, and the words for QEMU to open it.
    private func makeBase(
        _ base: Base, _ encrypted: inout Encrypted
    ) throws -> (contents: [UInt8], reference: BackingReference?) {
        let contents = QCOW2ImageTests.sparse(Self.size, seed: 12)
        switch base {
        case .none: return ([UInt8](repeating: 0, count: Self.size), nil)
        case .raw:
            try directory.write("base.raw", contents)
            return (contents, BackingReference(name: "base.raw", format: .raw))
        case .encrypted:
            let path = try encrypted.create("base.qcow2", size: Self.size)
            var engine = try DiskEngine(DiskImage(path: path, options: encrypted.options()), depth: 2)
            try engine.write(0, contents)
            encrypted.below = ",backing.driver=qcow2,backing.file.filename=\(path),backing.encrypt.key-secret=s"
            return (contents, BackingReference(name: "base.qcow2", format: .qcow2))
        }
    }

    private func create(_ layout: Layout, _ encrypted: Encrypted, _ backing: BackingReference?) throws -> String {
        var options = QCOW2Options()
        options.clusterSize = layout.clusterSize
        options.extendedL2 = layout.hasSubclusters
        if layout.hasDataFile { options.dataFile = directory.file("data") }
        return try encrypted.create(
            "disk.qcow2", size: Self.size, options, backing: backing, preallocation: layout.preallocation)
    }

    @Test(arguments: Share.of(layouts.filter(\.isLegal))) func qemuReadsWhatWeMakeAndWrite(layout: Layout) throws {
        var encrypted = try Encrypted(directory)
        let (contents, backing) = try makeBase(layout.base, &encrypted)
        let path = try create(layout, encrypted, backing)
        #expect(try encrypted.qemuContents(path) == contents)
        var workload = Workload(contents, seed: layout.clusterSize, maximum: 60 << 10)
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: encrypted.options()), depth: 8)
            for _ in 0..<10 { try workload.round(&engine) }
            #expect(try engine.readAll() == workload.model)
        }
        encrypted.expectSound(path)
        #expect(try encrypted.qemuContents(path) == workload.model)
        // What is below has not been written, and what is written over by QEMU is read.
        let disk = QCOW2ImageTests.sparse(Self.size, seed: 13)
        try encrypted.qemuWrite(disk, path)
        var engine = try DiskEngine(DiskImage(path: path, options: encrypted.options(readOnly: true)), depth: 4)
        #expect(try engine.readAll() == disk)
    }

    @Test func whatIsNotLegalIsRefused() throws {
        let illegal = Self.layouts.filter { !$0.isLegal }
        #expect(Self.layouts.count - illegal.count > 60 && illegal.count > 100)
        var encrypted = try Encrypted(directory)
        for layout in illegal {
            let (_, backing) = try makeBase(layout.base, &encrypted)
            #expect(throws: DiskImageError.self, "\(layout)") { _ = try create(layout, encrypted, backing) }
            for name in ["disk.qcow2", "data"] { #expect(access(directory.file(name), F_OK) != 0, "\(layout)") }
            unlink(directory.file("base.qcow2"))
        }
    }

    /// The same from the other side, in a few: qemu-img takes a second to find out how long its key derivation takes.
    @Test(
        arguments: Share.of([
            "cluster_size=512 raw", "cluster_size=4k,data_file=DATA raw", "cluster_size=16k,extended_l2=on raw",
            "cluster_size=16k,extended_l2=on,data_file=DATA",
            "cluster_size=32k,extended_l2=on,preallocation=full", "cluster_size=64k,preallocation=full",
            "cluster_size=64k,data_file=DATA,preallocation=falloc",
            "cluster_size=2M,extended_l2=on,refcount_bits=1", "cluster_size=2M,lazy_refcounts=on raw",
        ])) func weReadWhatQEMUMakes(words: String) throws
    {
        var encrypted = try Encrypted(directory)
        let hasBase = words.hasSuffix(" raw")
        let (contents, backing) = try makeBase(hasBase ? .raw : .none, &encrypted)
        let options = words.split(separator: " ")[0].split(separator: "DATA", omittingEmptySubsequences: false).joined(
            separator: directory.file("data"))
        let path = try encrypted.qemuCreate(
            "disk.qcow2", size: Self.size, options, backing: backing.map { ["-b", $0.name, "-F", "raw"] } ?? [])
        var model = contents
        // A part of a cluster, several, and zeroes.
        let (status, output) = run([
            "qemu-io", "--object", "secret,id=s,file=\(encrypted.keyFile)", "--image-opts", encrypted.image(path), "-c",
            "write -q -P 7 100k 3k", "-c", "write -q -P 9 201k 150k",
            "-c", "write -q -z 220k 70k",
        ])
        try #require(status == 0 && output.isEmpty, "\(output)")
        for (start, end, value) in [(100, 103, 7), (201, 351, 9), (220, 290, 0)] as [(Int, Int, UInt8)] {
            model.replaceSubrange(start << 10..<end << 10, with: repeatElement(value, count: (end - start) << 10))
        }
        // What QEMU sets aside has zeroes that are not encrypted, or nothing: noise, the same to both.
        let seen = try encrypted.qemuContents(path)
        #expect(seen == model || options.contains("preallocation"))
        var engine = try DiskEngine(DiskImage(path: path, options: encrypted.options(readOnly: true)), depth: 4)
        #expect(try engine.readAll() == seen)
        var conversion = ImageConversion(source: path, target: directory.file("out.raw"), format: .raw)
        conversion.sourceOptions = encrypted.options(readOnly: true)
        try conversion.run()
        #expect(try directory.read("out.raw") == seen)
    }
}
