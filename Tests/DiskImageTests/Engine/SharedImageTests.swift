// SPDX-License-Identifier: Apache-2.0

import CAllocationCounter
import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Two engines of one image in one thread, so that each moment between their steps can be had.
@Suite(.timed) struct SharedImageTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// A request's memory, which lives as long as the value.
    final class Buffer: @unchecked Sendable {
        let vector: UnsafeMutablePointer<iovec>
        let bytes: UnsafeMutableRawBufferPointer

        init(_ contents: [UInt8]) {
            unsafe bytes = .allocate(byteCount: contents.count, alignment: 4096)
            unsafe bytes.copyBytes(from: contents)
            unsafe vector = .allocate(capacity: 1)
            unsafe vector.initialize(to: iovec(iov_base: bytes.baseAddress, iov_len: contents.count))
        }

        deinit {
            unsafe bytes.deallocate()
            unsafe vector.deallocate()
        }

        var contents: [UInt8] { unsafe Array(bytes) }
    }

    private func start(
        _ engine: inout DiskEngine, _ operation: DiskOperation, _ offset: UInt64, _ buffer: Buffer
    ) throws {
        let free = engine.acquire()
        let request = try #require(free)
        unsafe engine.start(
            request, operation, offset: offset, length: UInt64(buffer.bytes.count), vectors: buffer.vector, count: 1)
    }

    private func flush(_ engine: inout DiskEngine) throws {
        let free = engine.acquire()
        engine.start(try #require(free), .flush, offset: 0, length: 0)
    }

    private func isReadable(_ descriptor: Int32) -> Bool {
        var entry = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
        return unsafe poll(&entry, 1, 0) == 1
    }

    /// The one request in flight ends.
    private func end(
        _ engine: inout DiskEngine, sourceLocation: SourceLocation = #_sourceLocation
    ) throws -> DiskCompletion {
        let ended = try engine.waitForCompletion()
        let completion = try #require(ended, sourceLocation: sourceLocation)
        engine.release(completion.request)
        return completion
    }

    private func image(
        _ arguments: String..., size: String = "4M", calls: FileCalls = .host, cache: Int = 32 << 20
    ) throws -> SharedImage {
        let path = directory.file("disk.qcow2")
        let (status, output) = run(["qemu-img", "create", "-q", "-f", "qcow2"] + arguments + [path, size])
        #expect(status == 0, "\(output)")
        return try SharedImage(
            DiskImage(path: path, options: DiskImageOptions(locking: false, metadataCacheSize: cache)), calls: calls)
    }

    private func expectDisk(_ expected: [UInt8], sourceLocation: SourceLocation = #_sourceLocation) throws {
        expectSound(directory.file("disk.qcow2"), sourceLocation: sourceLocation)
        var engine = try DiskEngine(
            DiskImage(path: directory.file("disk.qcow2"), options: DiskImageOptions(readOnly: true, locking: false)))
        #expect(try engine.read(0, expected.count) == expected, sourceLocation: sourceLocation)
    }

    /// Neighbours in one cluster, from two engines: the second waits for the first, is called when it has ended, and
    /// writes to the same new cluster.
    @Test(arguments: [true, false]) func copiesOfOneClusterComeOneAfterTheOther(usesRing: Bool) throws {
        let contents = randomBytes(4 << 20, seed: 1)
        try directory.write("base.raw", contents)
        var expected = Array(contents[0..<128 << 10])
        do {
            let shared = try image("-b", directory.file("base.raw"), "-F", "raw")
            var one = try DiskEngine(shared, depth: 4, usesRing: usesRing),
                other = try DiskEngine(shared, depth: 4, usesRing: usesRing)
            // The slice is in memory, so that only the copy is waited for.
            #expect(try one.read(0, 512) == Array(contents[0..<512]))
            let first = Buffer([UInt8](repeating: 1, count: 512)), second = Buffer([UInt8](repeating: 2, count: 1024))
            try start(&one, .write, 512, first)
            try start(&other, .write, 1024, second)
            try other.submit()
            #expect(other.nextCompletion() == nil && other.inFlight == 1)
            #expect(!isReadable(other.descriptor))
            #expect(try end(&one).error == 0)
            #expect(isReadable(other.descriptor))
            #expect(try end(&other).error == 0)
            // A third is in place, at either.
            try one.write(4096, [UInt8](repeating: 3, count: 512))
            try other.perform(.flush)
        }
        expected.replaceSubrange(512..<1024, with: repeatElement(1, count: 512))
        expected.replaceSubrange(1024..<2048, with: repeatElement(2, count: 1024))
        expected.replaceSubrange(4096..<4608, with: repeatElement(3, count: 512))
        try expectDisk(expected)
        // Header, refcount table and block, L1, L2, and the one cluster.
        #expect(try directory.read("disk.qcow2").count == 6 << 16)
    }

    /// Zeroes that begin and end within subclusters of a cluster that has no place yet: both ends come to one new
    /// cluster.
    @Test func zeroesWithSubclustersTakeOneCluster() throws {
        let contents = randomBytes(4 << 20, seed: 3)
        try directory.write("base.raw", contents)
        do {
            let shared = try image("-b", directory.file("base.raw"), "-F", "raw", "-o", "extended_l2=on")
            var engine = try DiskEngine(shared, depth: 4)
            try engine.perform(.writeZeroes, at: 1536, length: 16384)
        }
        var expected = contents
        expected.replaceSubrange(1536..<1536 + 16384, with: repeatElement(0, count: 16384))
        try expectDisk(expected)
    }

    /// Zeroes of which a part is being written when the rest of them leaves nothing in the cluster: it may not be given
    /// back before.
    @Test(arguments: [true, false]) func zeroesWaitForTheirOwnWrites(usesRing: Bool) throws {
        let contents = randomBytes(4 << 20, seed: 4)
        try directory.write("base.raw", contents)
        do {
            let shared = try image("-b", directory.file("base.raw"), "-F", "raw", "-o", "extended_l2=on")
            var engine = try DiskEngine(shared, depth: 4, usesRing: usesRing)
            // The only subcluster with a place; of the first one's neighbour a part is to be zeroes.
            try engine.write(10240, [UInt8](repeating: 1, count: 2048))
            try engine.perform(.writeZeroesUnmapping, at: 2560, length: 65536 - 2560)
            #expect(shared.damage() == nil)
            #expect(try engine.read(2560, 512) == [UInt8](repeating: 0, count: 512))
        }
        var expected = contents
        expected.replaceSubrange(2560..<65536, with: repeatElement(0, count: 65536 - 2560))
        try expectDisk(expected)
    }

    /// A discard of what another engine is writing waits, as does one that covers much more.
    @Test func discardsWaitForTheWritesOfOthers() throws {
        let shared = try image("-o", "cluster_size=4k")
        var one = try DiskEngine(shared, depth: 4), other = try DiskEngine(shared, depth: 4)
        #expect(try one.read(0, 512) == [UInt8](repeating: 0, count: 512))
        let bytes = Buffer([UInt8](repeating: 1, count: 8192))
        try start(&one, .write, 16384, bytes)
        let free = other.acquire()
        other.start(try #require(free), .writeZeroesUnmapping, offset: 0, length: 1 << 20)
        try other.submit()
        #expect(other.nextCompletion() == nil && other.inFlight == 1)
        #expect(try end(&one).error == 0)
        #expect(try end(&other).error == 0)
        #expect(try one.read(16384, 8192) == [UInt8](repeating: 0, count: 8192))
    }

    /// A cluster that one engine frees is nobody else's as long as an operation of another, which found it before, may
    /// still use it.
    @Test(arguments: [DiskOperation.read, .write]) func freedClustersWaitForTheOperationsOfOthers(
        operation: DiskOperation
    ) throws {
        let size = 64 << 10
        let ones = [UInt8](repeating: 1, count: size), twos = [UInt8](repeating: 2, count: size),
            zeroes = [UInt8](repeating: 0, count: size)
        do {
            let shared = try image()
            var one = try DiskEngine(shared, depth: 4, usesRing: false),
                other = try DiskEngine(shared, depth: 4, usesRing: false)
            try other.write(0, ones)
            try other.perform(.flush)
            // Known where, and not yet done.
            let late = Buffer([UInt8](repeating: 9, count: size))
            try start(&one, operation, 0, late)
            try other.perform(.discard, at: 0, length: UInt64(size))
            try other.perform(.flush)
            try other.write(1 << 20, twos)
            try other.perform(.flush)
            #expect(try end(&one).error == 0)
            #expect(operation == .write || late.contents == ones || late.contents == zeroes)
            #expect(try other.read(1 << 20, size) == twos)
            // Then it is used again.
            try other.perform(.flush)
            try other.write(2 << 20, ones)
        }
        try expectDisk(zeroes)
        #expect(try directory.read("disk.qcow2").count == 7 << 16)
    }

    /// Metadata that one engine is reading is waited for by the other, which is called; if the reader goes, the other
    /// reads it.
    @Test(arguments: [true, false], [true, false]) func metadataIsReadOnce(usesRing: Bool, readerGoes: Bool) throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "4M")
        qemuIO(path, ["write -P 7 0 64k"])
        let reads = Guarded(0)
        var calls = FileCalls.host
        unsafe calls.read = { file, vectors, count, offset in
            reads.withLock { $0 += 1 }
            return unsafe FileCalls.host.read(file, vectors, count, offset)
        }
        let shared = try SharedImage(DiskImage(path: path, options: unlocked), calls: calls)
        var other = try DiskEngine(shared, depth: 4, usesRing: usesRing)
        let buffers = [Buffer([UInt8](repeating: 0, count: 512)), Buffer([UInt8](repeating: 0, count: 512))]
        do {
            var one = try DiskEngine(shared, depth: 4, usesRing: usesRing)
            try start(&one, .read, 0, buffers[0])
            try start(&other, .read, 4096, buffers[1])
            try other.submit()
            #expect(other.nextCompletion() == nil && other.inFlight == 1)
            if !readerGoes {
                #expect(try end(&one).error == 0)
                #expect(buffers[0].contents == [UInt8](repeating: 7, count: 512))
            }
        }
        #expect(try end(&other).error == 0)
        #expect(buffers[1].contents == [UInt8](repeating: 7, count: 512))
        // The L2 slice once, or twice when its reader went, and two sectors, or one.
        if !usesRing { #expect(reads.withLock { $0 } == 3) }
    }

    /// A load that failed, for which two engines waited: once each has heard of it anybody may try again. An engine
    /// whose owner takes a completion and asks no further has heard of it.
    @Test func aLoadThatFailedIsTriedAgain() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "4M")
        // Two pieces of the L2 table's: 512 clusters each.
        qemuIO(path, ["write -P 7 0 64k", "write -P 8 2M 64k"])
        let fails = Guarded(false)
        var calls = FileCalls.host
        unsafe calls.read = { file, vectors, count, offset in
            if fails.withLock({ fails in
                defer { fails = false }; return fails
            }) {
                return -Int(EIO)
            }
            return unsafe FileCalls.host.read(file, vectors, count, offset)
        }
        let shared = try SharedImage(DiskImage(path: path, options: unlocked), calls: calls)
        var one = try DiskEngine(shared, depth: 4, usesRing: false),
            other = try DiskEngine(shared, depth: 4, usesRing: false)
        #expect(try one.read(0, 512) == [UInt8](repeating: 7, count: 512))
        let buffers = (0..<3).map { _ in Buffer([UInt8](repeating: 0, count: 512)) }
        try start(&one, .read, 2 << 20, buffers[0])
        try start(&other, .read, 2 << 20, buffers[1])
        try start(&other, .read, 4096, buffers[2])
        fails.withLock { $0 = true }
        #expect(try end(&one).error == EIO)
        // It had the error, and the other has not heard of it.
        let ended = [try end(&other)]
        #expect(try one.read(2 << 20, 512) == [UInt8](repeating: 8, count: 512))
        let all = try ended + [end(&other)]
        #expect(all.map(\.error).sorted() == [0, EIO])
        #expect(buffers[2].contents == [UInt8](repeating: 7, count: 512))
    }

    /// An engine goes while it writes new clusters and copies others: nothing stays claimed, and nothing that it took
    /// is lost.
    @Test(arguments: [true, false]) func anEngineGoesInTheMiddleOfWrites(usesRing: Bool) throws {
        let contents = randomBytes(4 << 20, seed: 2)
        try directory.write("base.raw", contents)
        do {
            let shared = try image("-b", directory.file("base.raw"), "-F", "raw", "-o", "cluster_size=4k")
            var other = try DiskEngine(shared, depth: 4, usesRing: usesRing)
            let same = [
                Buffer(Array(contents[0..<8192])), Buffer(Array(contents[8704..<9216])),
                Buffer(Array(contents[100 << 10..<100 << 10 + 512])),
            ]
            let mine = Buffer([UInt8](repeating: 9, count: 4096))
            do {
                var one = try DiskEngine(shared, depth: 4, usesRing: usesRing)
                #expect(try one.read(0, 512) == Array(contents[0..<512]))
                try start(&one, .write, 0, same[0])
                try start(&one, .write, 8704, same[1])
                try start(&one, .write, 100 << 10, same[2])
                try start(&other, .write, 6144, mine)
                try other.submit()
                #expect(other.nextCompletion() == nil && other.inFlight == 1)
            }
            #expect(isReadable(other.descriptor))
            #expect(try end(&other).error == 0)
            #expect(shared.claims.isEmpty && shared.engines.count == 1)
            try other.perform(.flush)
        }
        var expected = contents
        expected.replaceSubrange(6144..<10240, with: repeatElement(9, count: 4096))
        try expectDisk(expected)
    }

    /// A flush of one engine covers what has ended at the other.
    @Test func aFlushCoversWhatEndedAtOthers() throws {
        let path = directory.file("disk.qcow2")
        let shared = try image("-o", "cluster_size=4k")
        var one = try DiskEngine(shared, depth: 4, usesRing: false),
            other = try DiskEngine(shared, depth: 4, usesRing: false)
        try one.write(4096, [UInt8](repeating: 1, count: 6000 / 512 * 512))
        // Nothing refers to it in the file before.
        qemuIO(path, ["read -P 0 -r 4096 512"].map { $0.replacing("-r ", with: "") })
        try other.perform(.flush)
        qemuIO(path, ["read -P 1 4096 5632"])
    }

    /// One engine runs the commit for both. If it goes, the other runs it anew.
    @Test(arguments: [true, false], [true, false]) func flushesOfBothEnd(usesRing: Bool, runnerGoes: Bool) throws {
        let shared = try image("-o", "cluster_size=4k")
        var other = try DiskEngine(shared, depth: 4, usesRing: usesRing)
        try other.write(0, [UInt8](repeating: 3, count: 4096))
        let old = Buffer([UInt8](repeating: 4, count: 512)), new = Buffer([UInt8](repeating: 5, count: 4096))
        do {
            var one = try DiskEngine(shared, depth: 4, usesRing: usesRing)
            try flush(&one)
            try flush(&other)
            try other.submit()
            #expect(other.nextCompletion() == nil && other.inFlight == 1)
            // While the mapping is locked, what is allocated goes on, and what is new waits.
            try start(&other, .write, 512, old)
            let ended = try end(&other)
            #expect(ended.operation == .write && ended.error == 0)
            try start(&other, .write, 8192, new)
            try other.submit()
            #expect(other.nextCompletion() == nil && other.inFlight == 2)
            if !runnerGoes {
                #expect(try end(&one).error == 0)
                // The one after it was begun by the same engine.
                #expect(shared.commit.step != .none && shared.commit.engine == one.number)
                // It is under way although nobody has called that engine again.
                if !usesRing { #expect(isReadable(one.descriptor)) }
            }
        }
        while other.inFlight > 0 { #expect(try end(&other).error == 0) }
        #expect(shared.commit.step == .none)
        try other.perform(.flush)
        #expect(try other.read(8192, 4096) == [UInt8](repeating: 5, count: 4096))
        expectSound(directory.file("disk.qcow2"))
    }

    /// What one engine finds lost, damaged or full is so for all.
    @Test func failuresAreThoseOfAll() throws {
        let fails = Guarded<(synchronize: Int32, write: Int32)>((0, 0))
        var calls = FileCalls.host
        calls.synchronize = { _ in -Int(fails.withLock { $0.synchronize }) }
        unsafe calls.write = { file, vectors, count, offset in
            let error = fails.withLock { $0.write }
            return unsafe error != 0 ? -Int(error) : FileCalls.host.write(file, vectors, count, offset)
        }
        let shared = try image("-o", "cluster_size=4k", calls: calls)
        var one = try DiskEngine(shared, depth: 4, usesRing: false),
            other = try DiskEngine(shared, depth: 4, usesRing: false)
        try one.write(0, [UInt8](repeating: 1, count: 4096))
        // A full host fails a flush, which can be tried again.
        fails.withLock { $0.write = ENOSPC }
        try flush(&one)
        try flush(&other)
        #expect(try end(&one).error == ENOSPC && end(&other).error == ENOSPC)
        fails.withLock { $0.write = 0 }
        try other.perform(.flush)
        // What the host has lost is lost for all.
        try one.write(4096, [UInt8](repeating: 1, count: 4096))
        fails.withLock { $0.synchronize = EIO }
        try flush(&one)
        try one.submit()
        try flush(&other)
        #expect(try end(&one).error == EIO && end(&other).error == EIO)
        fails.withLock { $0.synchronize = 0 }
        #expect(throws: DiskImageError.request(path: shared.path, SystemCallError("write", errno: EIO))) {
            try other.write(8192, [UInt8](repeating: 1, count: 512))
        }
        #expect(try other.read(0, 4096) == [UInt8](repeating: 1, count: 4096))
        #expect(shared.damage() == nil)
    }

    /// Damage that one engine meets stops the other's writes.
    @Test func damageIsThatOfAll() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "4M")
        qemuIO(path, ["write -P 3 0 16k"])
        var bytes = try directory.read("disk.qcow2")
        let l2 = Int(bytes.bigEndian64(at: Int(bytes.bigEndian64(at: 40))) & 0xff_ffff_ffff)
        bytes.store(1 << 63 | 1 << 40 as UInt64, at: l2)
        try directory.write("disk.qcow2", bytes)
        let shared = try SharedImage(DiskImage(path: path, options: unlocked))
        var one = try DiskEngine(shared, depth: 4), other = try DiskEngine(shared, depth: 4)
        try other.write(8192, [UInt8](repeating: 4, count: 512))
        #expect(throws: DiskImageError.self) { try one.write(0, [UInt8](repeating: 4, count: 512)) }
        #expect("\(try #require(shared.damage()))".contains("beyond the end"))
        #expect(throws: DiskImageError.self) { try other.write(8192, [UInt8](repeating: 5, count: 512)) }
        #expect(try other.read(8192, 512) == [UInt8](repeating: 4, count: 512))
    }

    /// What changes the image as a whole waits until the other engines are idle; there is a limit of engines; numbers
    /// of those that went are used again.
    @Test func whoMayAttach() throws {
        let shared = try image("-o", "cluster_size=4k")
        do {
            var one = try DiskEngine(shared, depth: 1), other = try DiskEngine(shared, depth: 1)
            let buffer = Buffer([UInt8](repeating: 1, count: 512))
            try start(&other, .write, 0, buffer)
            #expect(throws: DiskImageError.self) { try one.resize(to: 8 << 20) }
            #expect(throws: DiskImageError.self) { try one.createSnapshot(named: "s") }
            #expect(shared.size == 4 << 20)
            #expect(try end(&other).error == 0)
            try one.resize(to: 8 << 20)
            try one.createSnapshot(named: "s")
            #expect(try other.read(0, 512) == buffer.contents && shared.size == 8 << 20)
        }
        let attachments = (0..<SharedImage.maximumEngines).map { _ in
            AttachedEngine(requests: 1, operations: 1, wakeup: nil)
        }
        for attachment in attachments { try shared.attach(attachment) }
        #expect(Set(attachments.map(\.number)) == Set(0..<SharedImage.maximumEngines))
        #expect(
            "\(#expect(throws: DiskImageError.self) { try DiskEngine(shared, depth: 1).depth }!)".contains("64 engines")
        )
        shared.detach(attachments[5])
        let again = AttachedEngine(requests: 1, operations: 1, wakeup: nil)
        try shared.attach(again)
        #expect(again.number == 5)
    }

    /// A request allocates nothing, also where several engines have the image.
    @Test(arguments: [true, false]) func requestsAllocateNothing(usesRing: Bool) throws {
        let shared = try image("-o", "preallocation=full")
        var one = try DiskEngine(shared, depth: 16, usesRing: usesRing)
        let other = try DiskEngine(shared, depth: 16, usesRing: usesRing)
        let buffer = Buffer([UInt8](repeating: 1, count: 8192))
        var before: UInt = 0, failures = 0
        for round in 0..<50 {
            // The first are for what the runtime makes once in a process.
            if round == 4 { before = allocation_count() }
            while let request = one.acquire() {
                unsafe one.start(
                    request, round % 2 == 0 ? .write : .read, offset: UInt64(request * 65536 + round * 512),
                    length: 8192, vectors: buffer.vector, count: 1)
                // One that is alone, then as many as there can be.
                if round % 4 < 2 { break }
            }
            while one.inFlight > 0 {
                guard let completion = try one.waitForCompletion() else { break }
                if completion.error != 0 { failures += 1 }
                one.release(completion.request)
            }
        }
        let count = allocation_count() - before
        #expect(count == 0 && failures == 0)
        #expect(other.inFlight == 0)
    }

    /// Claims against a list of them.
    @Test func claims() {
        var table = ClaimTable(), list: [(range: Range<UInt64>, owner: ClaimTable.Owner)] = []
        var generator = SeededGenerator(seed: 3)
        var hits = 0
        for _ in 0..<20000 {
            let owner = ClaimTable.Owner(
                engine: Int.random(in: 0..<3, using: &generator), request: Int32.random(in: 0..<4, using: &generator))
            let start = UInt64.random(in: 0..<200, using: &generator) * 512
            let range = start..<start + UInt64.random(in: 1...8, using: &generator) * 512
            let isTaken = list.contains { $0.range.overlaps(range) && $0.owner != owner }
            #expect(table.isClaimed(range, besides: owner) == isTaken)
            hits += isTaken ? 1 : 0
            let own = list.filter { $0.range.overlaps(range) }
            if !isTaken, own.isEmpty || (own.allSatisfy { $0.range == range } && range.count == 512) {
                table.insert(range, of: owner)
                list.append((range, owner))
            } else if let index = list.indices.randomElement(using: &generator) {
                table.remove(list[index].range.lowerBound, of: list[index].owner)
                list.remove(at: index)
            }
            if list.count > 60 {
                table.removeAll(ofEngine: 1)
                list.removeAll { $0.owner.engine == 1 }
            }
            #expect(table.isEmpty == list.isEmpty)
        }
        #expect(hits > 1000)
    }
}
