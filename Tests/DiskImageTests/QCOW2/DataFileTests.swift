// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import TestSupport
import Testing

/// Chains in which images keep their data in files beside them.
@Suite(.timed) struct DataFileTests {
    private let directory = TemporaryDirectory(inMemory: true)

    /// An overlay that keeps what it has of its own in a file beside it is committed, and given another backing file or
    /// none. What an emptied one leaves in that file is never seen again.
    @Test func overlaysWithDataFiles() throws {
        var model = randomBytes(1 << 20, seed: 31)
        try directory.write("base.raw", model)
        let data = directory.file("over.data")
        var creation = ImageCreation(path: directory.file("over.qcow2"), format: .qcow2)
        creation.options.dataFile = data
        creation.backing = BackingReference(name: "base.raw", format: .raw)
        try creation.create()
        func change(_ range: Range<Int>, _ value: UInt8) throws {
            var engine = try DiskEngine(
                DiskImage(path: creation.path, options: DiskImageOptions(locking: false, dataFile: data)))
            let bytes = [UInt8](repeating: value, count: range.count)
            try engine.write(UInt64(range.lowerBound), bytes)
            model.replaceSubrange(range, with: bytes)
        }
        func expectDisk(_ comment: String) throws {
            expectSound(creation.path, comment)
            var engine = try DiskEngine(
                DiskImage(
                    path: creation.path, options: DiskImageOptions(readOnly: true, locking: false, dataFile: data)))
            #expect(try engine.readAll() == model, "\(comment)")
            qemuImage("convert", "-U", "-f", "qcow2", "-O", "raw", creation.path, directory.file("out.raw"))
            #expect(try directory.read("out.raw") == model, "\(comment)")
        }
        try change(100 << 10..<300 << 10, 5)

        var commit = ImageCommit(path: creation.path)
        let refused = DiskImageError.dataFileNotAllowed(path: creation.path, name: data)
        #expect(throws: refused) { try commit.run() }
        commit.options = DiskImageOptions(locking: false, dataFile: data)
        try commit.run()
        #expect(try directory.read("base.raw") == model)
        try expectDisk("committed")
        try change(200 << 10..<200 << 10 | 512, 6)
        try expectDisk("written again")

        try directory.write("short.raw", Array(model[..<(400 << 10)]))
        var rebase = ImageRebase(path: creation.path)
        rebase.backing = BackingReference(name: "short.raw", format: .raw)
        #expect(throws: refused) { try rebase.run() }
        rebase.options = commit.options
        try rebase.run()
        try expectDisk("over a shorter one")
        rebase.backing = nil
        try rebase.run()
        try expectDisk("over nothing")
        try change(0..<512, 7)
        try expectDisk("at the end")
        #expect(try ImageInformation(path: creation.path, locking: false).backing == nil)
    }

    /// The data file of a backing file is found by its name, as that image is, and is only read. With
    /// the image's own it is not mixed up.
    @Test func backingFilesMayHaveDataFiles() throws {
        let base = directory.file("base.qcow2"), over = directory.file("over.qcow2"), data = directory.file("base.data")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "data_file=\(data)", base, "1M")
        qemuIO(base, ["write -P 3 0 600k"])
        let before = try directory.read("base.data")
        var contents = [UInt8](repeating: 3, count: 600 << 10) + [UInt8](repeating: 0, count: 424 << 10)
        var creation = ImageCreation(path: over, format: .qcow2)
        creation.backing = BackingReference(name: "base.qcow2", format: .qcow2)
        #expect(try creation.create() == 1 << 20)
        do {
            var engine = try DiskEngine(DiskImage(path: over, options: unlocked))
            try engine.write(300 << 10, [4])
            contents[300 << 10] = 4
            #expect(try engine.readAll() == contents)
        }
        #expect(try directory.read("base.data") == before)
        // Nor does one that is to follow no names follow this one.
        let alone = DiskImageOptions(readOnly: true, locking: false, allowsBacking: false)
        #expect(openError(over, alone) == .backingNotAllowed(path: over, name: "base.qcow2"))
        #expect(openError(base, alone) == .dataFileNotAllowed(path: base, name: data))

        // Over the same one again, and then over nothing.
        var conversion = ImageConversion(source: over, target: directory.file("copy.qcow2"), format: .qcow2)
        conversion.backing = creation.backing
        try conversion.run()
        var rebase = ImageRebase(path: conversion.target)
        rebase.backing = creation.backing
        rebase.options.locking = false
        try rebase.run()
        rebase.backing = nil
        try rebase.run()
        expectSound(conversion.target)
        var engine = try DiskEngine(DiskImage(path: conversion.target, options: readOnly))
        #expect(try engine.readAll() == contents)

        // What is written has to be named.
        var commit = ImageCommit(path: over)
        commit.options.locking = false
        #expect(throws: DiskImageError.backing(of: over, .dataFileNotAllowed(path: base, name: data))) {
            try commit.run()
        }
        commit.backingDataFile = data
        try commit.run()
        #expect(try directory.read("base.data").elementsEqual(contents))
        expectSound(base)
    }

    /// What is read is not overwritten.
    @Test func aConversionLeavesItsSourcesDataAlone() throws {
        let source = directory.file("source.qcow2"), data = directory.file("source.data")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "data_file=\(data)", source, "1M")
        for format in [ImageFormat.raw, .qcow2] {
            var conversion = ImageConversion(source: source, target: data, format: format)
            conversion.sourceOptions.dataFile = data
            conversion.replacing = true
            #expect(throws: DiskImageError.sameFile(path: data, other: data)) { try conversion.run() }
        }
    }

    @Test func noDataFileIsUsedTwice() throws {
        let base = directory.file("base.qcow2"), over = directory.file("over.qcow2"), data = directory.file("one.data")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "data_file=\(data)", base, "1M")
        qemuImage(
            "create", "-q", "-u", "-f", "qcow2", "-o", "data_file=\(data)", "-b", "base.qcow2", "-F", "qcow2", over,
            "1M")
        let options = DiskImageOptions(readOnly: true, locking: false, dataFile: data)
        #expect(openError(over, options) == .backing(of: over, .dataFile(of: base, .backingLoop(path: data))))
        qemuImage("rebase", "-u", "-b", data, "-F", "raw", over)
        #expect(openError(over, options) == .backing(of: over, .backingLoop(path: data)))
    }
}
