// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import Synchronization
import TestSupport
import Testing

/// A rebase and a commit have many requests in flight. Whatever becomes of one of them, and wherever they end, the disk
/// stays as it is.
@Suite(.timed) struct ImageRebaseFaultTests {
    private let directory = TemporaryDirectory(inMemory: true)
    private static let size = 4 << 20 | 3 << 9

    enum Work: CaseIterable { case rebase, commit }

    /// Every other cluster is the image's own in one part of the disk, so that a window of it takes many requests;
    /// elsewhere many can be one.
    private func make() throws -> (path: String, contents: [UInt8]) {
        try directory.write("old.raw", randomBytes(Self.size, seed: 1))
        var other = randomBytes(Self.size, seed: 2)
        other.replaceSubrange(3 << 20..<7 << 19, with: randomBytes(Self.size, seed: 1)[3 << 20..<7 << 19])
        try directory.write("new.raw", other)
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=16k", "-b", "old.raw", "-F", "raw", path)
        qemuIO(
            path,
            stride(from: 0, to: 256 << 10, by: 32 << 10).map { "write -P \(1 + $0 >> 15) \($0) 16k" } + [
                "write -z 1M 256k", "write -P 9 2M 1M", "write -P 8 3600k 20k", "write -P 7 4M 1k",
            ])
        return (path, try readDisk(path))
    }

    private func run(
        _ work: Work, _ path: String, _ calls: FileCalls?, _ progress: (ImageProgress) -> Bool = { _ in true }
    ) throws(DiskImageError) {
        switch work {
        case .rebase:
            var rebase = ImageRebase(path: path)
            rebase.backing = BackingReference(name: "new.raw", format: .raw)
            rebase.calls = calls
            try rebase.run(progress)
        case .commit:
            var commit = ImageCommit(path: path)
            commit.calls = calls
            try commit.run(progress)
        }
    }

    /// One call fails, does a part or is interrupted, each in its turn.
    @Test(arguments: Work.allCases, HostFault.allCases) func everyCallMayFail(work: Work, fault: HostFault) throws {
        try everyCall(work, isFailure: fault.isFailure) { $0 == $1 ? fault.fault : .none }
    }

    /// From one call on the host does nothing any more, as for a program that was killed.
    @Test(arguments: Work.allCases) func killedAtEveryCall(work: Work) throws {
        try everyCall(work, isFailure: true) { $0 < $1 ? .none : .error(EIO) }
    }

    /// - Parameter plan: what becomes of a call, by its number and that of the one that it is about.
    private func everyCall(
        _ work: Work, isFailure: Bool, _ plan: @escaping @Sendable (_ call: Int, _ victim: Int) -> FaultTests.Fault
    ) throws {
        let (path, contents) = try make()
        let image = try directory.read("disk.qcow2"), old = try directory.read("old.raw")
        // At first none, which says how many there are: after some failures there are few.
        var victim = -1, total = 0, failures = 0
        while victim < total {
            try directory.write("disk.qcow2", image)
            try directory.write("old.raw", old)
            let counter = FaultTests.Counter(), failing = victim < 0 ? .max : victim
            let comment = "call \(failing) of \(total)"
            var failure: DiskImageError?
            do throws(DiskImageError) {
                try run(work, path, FaultTests.calls { _ in plan(counter.next(), failing) })
            } catch { failure = error }
            if victim < 0 { total = counter.next() }
            // Best effort: a failure is not reported.
            if failure != nil { failures += 1 }
            #expect(failure == nil || isFailure, "\(comment): \(failure?.description ?? "")")
            #expect(try isSame(readDisk(path), contents), "\(comment)")
            // No cluster has two owners; some may have none.
            expectSound(path, leaksAllowed: isFailure && victim >= 0, comment)
            if failure == nil { try expectDone(work, path, comment) }
            // And it can be done then.
            if failure != nil, victim % 8 == 0 {
                try run(work, path, nil)
                #expect(try isSame(readDisk(path), contents), "\(comment), again")
                try expectDone(work, path, comment)
            }
            victim += 1
        }
        #expect(total > 20 && failures >= (isFailure ? total * 3 / 4 : 0), "\(failures) of \(total) calls")
    }

    private func expectDone(_ work: Work, _ path: String, _ comment: String) throws {
        #expect(
            try ImageInformation(path: path).backing?.name == (work == .rebase ? "new.raw" : "old.raw"), "\(comment)")
        if work == .commit { #expect(try DiskImage.check(path: path).allocatedClusters == 0, "\(comment)") }
    }

    /// Given up while requests are in flight, at each place where that can be.
    @Test(arguments: Work.allCases) func whoGivesUpHasTheDiskAsItWas(work: Work) throws {
        let (path, contents) = try make()
        let image = try directory.read("disk.qcow2"), old = try directory.read("old.raw")
        for last in 0..<3 {
            try directory.write("disk.qcow2", image)
            try directory.write("old.raw", old)
            var asked = 0
            // What is said is what has become of the files.
            #expect(
                throws: work == .rebase
                    ? DiskImageError.interruptedUnchanged(path: path)
                    : .interruptedInPlace(path: directory.file("old.raw"))
            ) {
                try run(work, path, nil) { _ in
                    asked += 1
                    return asked <= last
                }
            }
            #expect(try isSame(readDisk(path), contents), "after \(last)")
            expectSound(path, "after \(last)")
            #expect(try ImageInformation(path: path).backing?.name == "old.raw")
        }
        // Done again it goes through.
        try run(work, path, nil)
        #expect(try isSame(readDisk(path), contents))
        try expectDone(work, path, "done again")
    }

    /// The power fails at any time, and takes any part of what was not made durable with it.
    @Test(arguments: Work.allCases) func crashes(work: Work) throws {
        let (path, contents) = try make()
        let names = work == .rebase ? ["disk.qcow2"] : ["disk.qcow2", "old.raw"]
        let start = try names.map { try directory.read($0) }
        let log = CrashLog(names.map { directory.file($0) })
        try run(work, path, log.calls)
        try log.replay(start, prefixes: 60, seed: 4, tears: false, overtakes: true) { files, _, comment in
            for (name, bytes) in zip(names, files) { try directory.write(name, bytes) }
            try expectNoErrors(path, comment)
            #expect(try isSame(readDisk(path), contents), "\(comment)")
        }
    }

    private func readDisk(_ path: String) throws -> [UInt8] {
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        return try engine.readAll()
    }
}
