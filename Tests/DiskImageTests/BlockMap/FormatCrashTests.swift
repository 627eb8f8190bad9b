// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Images whose small changes exercise what a format's order of writes has to keep.
enum SmallImage: String, CaseIterable, CustomTestStringConvertible {
    case vdi, vdiOfSmallBlocks, vmdk, vmdkWithoutTables, vmdkInThreeFiles, qcow2WithDataFile, qcow2WithRawDataFile

    var testDescription: String { rawValue }
    var format: ImageFormat {
        switch self {
        case .vdi, .vdiOfSmallBlocks: .vdi
        case .vmdk, .vmdkWithoutTables, .vmdkInThreeFiles: .vmdk
        case .qcow2WithDataFile, .qcow2WithRawDataFile: .qcow2
        }
    }
    /// The files, the image's own first.
    var names: [String] {
        switch self {
        case .vmdkInThreeFiles: ["disk.vmdk", "0.vmdk", "1.flat", "2.vmdk"]
        case .qcow2WithDataFile, .qcow2WithRawDataFile: ["disk.qcow2", "data"]
        default: ["disk.\(format)"]
        }
    }
    /// Bytes of the disk, the last cluster of which is truncated.
    var size: Int {
        switch self {
        case .vdi: 6 << 20 | 512
        case .vmdkInThreeFiles: 1452 << 10
        case .vdiOfSmallBlocks, .qcow2WithDataFile, .qcow2WithRawDataFile: 256 << 10 | 512
        default: 2 << 20 | 512
        }
    }

    /// Makes the image, empty.
    func make(in directory: TemporaryDirectory) throws {
        let path = directory.file(names[0])
        var creation = ImageCreation(path: path, format: format, size: UInt64(size))
        switch self {
        case .vdi, .vmdk:
            try creation.create()
        case .vdiOfSmallBlocks:
            let blocks = UInt64(size + 4095) / 4096
            let layout = BlockMapLayout(
                size: UInt64(size), blockBits: 12, entries: .vdi(data: 4096), table: .array(offset: 512))
            let header = VDIHeader.new(layout, dataOffset: 4096, allocated: 0, isStatic: false)
            let table = [UInt8](repeating: 0xff, count: Int(blocks) * 4)
            try directory.write(names[0], header + table + [UInt8](repeating: 0, count: 4096 - 512 - table.count))
        case .vmdkWithoutTables:
            try creation.create()
            var bytes = try directory.bytes(names[0])
            for place in [48, 56] {
                let sector = Int(bytes.littleEndian64(at: place))
                bytes.replaceSubrange(sector * 512..<sector * 512 + 4, with: [0, 0, 0, 0])
            }
            try directory.write(names[0], bytes)
        case .vmdkInThreeFiles:
            let sizes = [640 << 10, 512 << 10, 300 << 10]
            for (index, size) in sizes.enumerated() where index != 1 {
                try ImageCreation(path: directory.file("\(index).vmdk"), format: .vmdk, size: UInt64(size)).create()
            }
            try directory.write("1.flat", [UInt8](repeating: 0, count: sizes[1] + 512))
            let lines = [
                "RW \(sizes[0] / 512) SPARSE \"0.vmdk\"", "RW \(sizes[1] / 512) FLAT \"1.flat\" 1",
                "RW \(sizes[2] / 512) SPARSE \"2.vmdk\"",
            ]
            try directory.write(
                "disk.vmdk", VMDKDescriptor.text(type: "twoGbMaxExtentSparse", extents: lines, sectors: 1))
        case .qcow2WithDataFile, .qcow2WithRawDataFile:
            creation.options.clusterSize = 4096
            // Absolute: qemu-img takes a relative name from its own directory.
            creation.options.dataFile = directory.file("data")
            creation.options.dataFileIsRaw = self == .qcow2WithRawDataFile
            try creation.create()
        }
    }

    /// What a crash may have left: data that was written where the next blocks go, and never became the disk's.
    func leaveRemains(in directory: TemporaryDirectory, seed: UInt64) throws {
        switch self {
        case .vdi, .vdiOfSmallBlocks, .vmdk, .vmdkWithoutTables:
            try directory.write(names[0], directory.bytes(names[0]) + randomBytes(size & ~4095, seed: seed))
        case .vmdkInThreeFiles:
            for name in [names[1], names[3]] {
                try directory.write(name, directory.bytes(name) + randomBytes(512 << 10, seed: seed))
            }
        case .qcow2WithDataFile: try directory.write(names[1], randomBytes(size, seed: seed))
        case .qcow2WithRawDataFile: break
        }
    }

    var options: DiskImageOptions {
        DiskImageOptions(format: format, locking: false, metadataCacheSize: 0, allowsDataFile: true)
    }
}

/// VDI and VMDK images, and such of qcow2 in two files, where the power fails at any moment, and the host at any call.
@Suite(.timed) struct FormatCrashTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// Every prefix of what came to the files, and for each what is left when some sectors written since the last
    /// synchronisation are lost.
    @Test(arguments: Share.of(SmallImage.allCases), [false, true]) func whatWasFlushedSurvivesAndNothingIsDamaged(
        image: SmallImage, isEmpty: Bool
    ) throws {
        let seed =
            UInt64(environment("SWKVM_SEED") ?? 7) &+ image.rawValue.utf8.reduce(0) { $0 &* 31 &+ UInt64($1) }
            &+ (isEmpty ? 1 : 0)
        try image.make(in: directory)
        try image.leaveRemains(in: directory, seed: seed)
        let path = directory.file(image.names[0])
        var contents = [UInt8](repeating: 0, count: image.size)
        if !isEmpty {
            // Half of it.
            let half = randomBytes(image.size / 1024 * 512, seed: seed)
            contents.replaceSubrange(0..<half.count, with: half)
            var engine = try DiskEngine(DiskImage(path: path, options: image.options))
            try engine.write(0, half)
        }
        let start = try image.names.map { try directory.bytes($0) }
        let log = CrashLog(image.names.map { directory.file($0) })
        let states = try log.record(
            path, image.options, contents, seed: seed, maximum: 64 << 10,
            rounds: environment("SWKVM_CRASH_ROUNDS") ?? 30)
        var examined = 0
        try log.replay(start, prefixes: 100, seed: seed, tears: true) { files, flushed, comment in
            for (name, bytes) in zip(image.names, files) { try directory.write(name, bytes) }
            examined += 1
            try examine(image, states[flushed], isJudged: examined % 8 == 0, comment)
        }
        #expect(examined > 100)
    }

    /// What is left can be read and written, and its contents have a reason each.
    private func examine(_ image: SmallImage, _ state: CrashState, isJudged: Bool, _ comment: String) throws {
        let path = directory.file(image.names[0])
        if image.format == .qcow2 { try expectNoErrors(path, comment) }
        // Of VDI qemu-img calls a count of blocks that is too large an error, which a crash may leave.
        if isJudged, image.format == .vmdk { expectSound(path, .vmdk, comment) }
        // Opening it for writing looks through the tables.
        var engine = try DiskEngine(DiskImage(path: path, options: image.options), depth: 4, usesRing: false)
        let wrong = try state.unexplained(engine.readAll(chunk: 8 << 20))
        let damage = engine.image.damage
        #expect(damage == nil && wrong.isEmpty, "sectors at \(wrong.prefix(5)), \(comment)")
        guard isJudged else { return }
        // And it can be gone on with: what is missing is allocated, over what the crash has left.
        let all = randomBytes(image.size, seed: 3)
        try engine.write(0, all)
        try engine.perform(.flush)
        #expect(try isSame(engine.readAll(chunk: 8 << 20), all), "\(comment)")
        _ = consume engine
        switch image {
        case .vdiOfSmallBlocks: break
        case .vdi, .vmdk, .vmdkWithoutTables, .vmdkInThreeFiles: expectSound(path, image.format, comment)
        case .qcow2WithDataFile, .qcow2WithRawDataFile: try expectNoErrors(path, comment)
        }
    }

    /// Data that was not durable when a commit began, and is linked after it, is made durable before the table by the
    /// next one, and while that is done the table stays as it is.
    @Test(arguments: [SmallImage.vdiOfSmallBlocks, .vmdk]) func theTableNeverOvertakesItsData(image: SmallImage) throws
    {
        try image.make(in: directory)
        var engine = try DiskEngine(DiskImage(path: directory.file(image.names[0]), options: image.options))
        try engine.write(0, [UInt8](repeating: 1, count: 512))
        let blockSize = engine.image.clusterSize
        let second = try #require(blockSize)
        let run = try engine.image.allocate(1, at: second, for: nil, .host)
        // The whole commit passes while the data is on its way.
        try engine.perform(.flush)
        let isNothing = try !engine.image.beginCommit(.host)
        engine.image.link(run, at: second, sequence: 0)
        let isWritten = try engine.image.beginCommit(.host), isLocked = engine.image.isLocked
        #expect(isNothing && isWritten && isLocked)
        engine.image.unlock()
    }

    // MARK: - Hosts that fail

    /// One call of a workload fails, or does a part of what it should, or is interrupted, each in its turn: the guest
    /// hears of a failure and of nothing else, what did not fail is there, and the image stays sound.
    @Test(arguments: SmallImage.allCases, HostFault.allCases) func everyCallMayFail(
        image: SmallImage, fault: HostFault
    ) throws {
        try image.make(in: directory)
        let path = directory.file(image.names[0])
        let contents = [UInt8](repeating: 0, count: image.size)
        let start = try image.names.map { try directory.bytes($0) }
        var workload = EveryCall(fault: fault)
        try workload.run(path, image.options, contents) {
            for (name, bytes) in zip(image.names, start) { try directory.write(name, bytes) }
        } examine: { comment in
            if image.format == .qcow2 { return try expectNoErrors(path, comment) }
            // Looks through the tables.
            _ = try DiskImage(path: path, options: image.options)
        }
    }
}
