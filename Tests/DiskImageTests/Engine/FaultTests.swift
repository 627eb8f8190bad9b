// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import Synchronization
import TestSupport
import Testing

/// System calls that fail or do half, and hosts that run out of room.
@Suite(.timed) struct FaultTests {
    let directory = TemporaryDirectory()

    /// What a plan may do to a call.
    enum Fault { case none, short, error(Int32) }

    /// The host's calls, with the faults that `plan` decides upon by the number of the call.
    static func calls(_ plan: @escaping @Sendable (Int) -> Fault) -> FileCalls {
        let counter = Counter()
        @Sendable func transfer(
            _ file: Int32, _ vectors: UnsafePointer<iovec>, _ count: Int32, _ offset: off_t,
            _ call: (Int32, UnsafePointer<iovec>, Int32, off_t) -> Int
        ) -> Int {
            switch plan(counter.next()) {
            case .none: return unsafe call(file, vectors, count, offset)
            case .error(let error): return -Int(error)
            case .short:
                // The first vector, and of that a part, so that the rest of the memory is untouched.
                var first = unsafe vectors[0]
                unsafe first.iov_len = max(1, first.iov_len / 3)
                return unsafe call(file, &first, 1, offset)
            }
        }
        return unsafe FileCalls(
            read: { unsafe transfer($0, $1, $2, $3, FileCalls.host.read) },
            write: { unsafe transfer($0, $1, $2, $3, FileCalls.host.write) },
            synchronize: { file in
                if case .error(let error) = plan(counter.next()) { return -Int(error) }
                return FileCalls.host.synchronize(file)
            },
            allocate: { file, mode, offset, length in
                if case .error(let error) = plan(counter.next()) { return -Int(error) }
                return FileCalls.host.allocate(file, mode, offset, length)
            },
            truncate: { file, size in
                if case .error(let error) = plan(counter.next()) { return -Int(error) }
                return FileCalls.host.truncate(file, size)
            })
    }

    final class Counter: Sendable {
        private let count = Atomic<Int>(0)
        func next() -> Int { count.wrappingAdd(1, ordering: .relaxed).oldValue }
    }

    @Test func shortTransfersAndInterruptsAreContinued() throws {
        var contents = randomBytes(200_192, seed: 21)
        let path = try directory.write("disk.raw", contents)
        var engine = try DiskEngine(
            DiskImage(path: path), depth: 4, segments: 4,
            calls: Self.calls { call in
                switch call % 4 {
                case 0, 2: .short
                case 1: .error(EINTR)
                default: .error(EAGAIN)
                }
            })
        #expect(try engine.readAll(chunk: 50_176) == contents)
        let piece = randomBytes(100_352, seed: 22)
        try engine.write(1024, piece)
        contents.replaceSubrange(1024..<1024 + piece.count, with: piece)
        #expect(try directory.read("disk.raw") == contents)
        #expect(try engine.readAll() == contents)
    }

    @Test func shortTransfersAreContinuedInEveryKindOfCluster() throws {
        let contents = QCOW2ImageTests.sparse(400 << 10, seed: 23)
        let raw = try directory.write("in.raw", contents)
        let path = directory.file("disk.qcow2")
        qemuImage("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, path)
        qemuIO(path, ["write -P 8 0 64k"])
        let expected = [UInt8](repeating: 8, count: 65536) + contents[65536...]
        var engine = try DiskEngine(
            DiskImage(path: path, options: readOnly), depth: 4, segments: 4,
            calls: Self.calls { $0 % 3 == 2 ? .none : .short })
        #expect(try engine.readAll(chunk: 30 * 512) == expected)
    }

    /// One call of the workload fails, each in its turn: the request that needed it has the error, and nothing else
    /// has.
    @Test func anErrorOfTheHostReachesWhoAskedAndNobodyElse() throws {
        let contents = QCOW2ImageTests.sparse(256 << 10, seed: 24)
        let raw = try directory.write("in.raw", contents)
        let path = directory.file("disk.qcow2")
        qemuImage("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=16k", raw, path)
        qemuIO(path, ["write -P 8 64k 64k"])
        let expected = contents[..<65536] + [UInt8](repeating: 8, count: 65536) + contents[131_072...]
        var failing = 0
        while true {
            let victim = failing
            let counter = Counter()
            var engine = try DiskEngine(
                DiskImage(path: path, options: readOnly), depth: 4, segments: 4,
                calls: Self.calls { call in
                    _ = counter.next()
                    return call == victim ? .error(EIO) : .none
                })
            var errors = 0
            for offset in stride(from: 0, to: expected.count, by: 32768) {
                do {
                    #expect(try engine.read(UInt64(offset), 32768) == Array(expected[offset..<offset + 32768]))
                } catch {
                    #expect(error as? DiskImageError == .request(path: path, SystemCallError("read", errno: EIO)))
                    errors += 1
                    // What failed is tried again the next time.
                    #expect(try engine.read(UInt64(offset), 32768) == Array(expected[offset..<offset + 32768]))
                }
            }
            let total = counter.next()
            if victim >= total { break }
            #expect(errors == 1, "call \(victim)")
            failing += 1
        }
        #expect(failing > 5)
    }

    @Test func errorsOfWritesAndFlushesAreReported() throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 0, count: 65536))
        for (error, operation) in [
            (ENOSPC, DiskOperation.write), (EDQUOT, .write), (EIO, .flush), (EIO, .discard), (ENOSPC, .writeZeroes),
        ] {
            var engine = try DiskEngine(
                DiskImage(path: path), depth: 4, segments: 4, calls: Self.calls { $0 == 0 ? .error(error) : .none })
            #expect(throws: DiskImageError.request(path: path, SystemCallError("\(operation)", errno: error))) {
                if operation == .write {
                    try engine.write(0, [UInt8](repeating: 1, count: 512))
                } else {
                    try engine.perform(operation, at: 0, length: operation == .flush ? 0 : 512)
                }
            }
            // And nothing of it is left behind.
            try engine.perform(.flush)
        }
    }

    /// An image may have several files: the message is about the one that the host refuses, also where that is
    /// metadata. What can be tried again is whatever is not about durability.
    @Test(arguments: [
        "data write", "data synchronisation", "metadata write", "metadata synchronisation", "backing read",
    ])
    func theFileThatFailsIsNamed(_ what: String) throws {
        let image = directory.file("disk.qcow2"), data = directory.file("data.raw")
        let backing = try directory.write("backing.raw", [UInt8](repeating: 3, count: 65536))
        qemuImage("create", "-q", "-f", "qcow2", "-b", backing, "-F", "raw", "-o", "data_file=\(data)", image, "16M")
        let victim = what.hasPrefix("data") ? data : what.hasPrefix("backing") ? backing : image
        let isWrite = ["data write", "backing read"].contains(what)
        // The rest of the cluster is read.
        let length = what == "backing read" ? 512 : 65536
        let isArmed = Guarded(false)
        @Sendable func isRefused(_ file: Int32) -> Bool {
            var status = stat(), wanted = stat()
            // Both are filled by the kernel.
            return unsafe isArmed.withLock { $0 } && fstat(file, &status) == 0 && stat(victim, &wanted) == 0
                && status.st_ino == wanted.st_ino
        }
        let calls = unsafe FileCalls(
            read: {
                unsafe what.hasSuffix("read") && isRefused($0) ? -Int(ENOSPC) : FileCalls.host.read($0, $1, $2, $3)
            },
            write: {
                unsafe what.hasSuffix("write") && isRefused($0) ? -Int(ENOSPC) : FileCalls.host.write($0, $1, $2, $3)
            },
            synchronize: {
                what.hasSuffix("synchronisation") && isRefused($0) ? -Int(ENOSPC) : FileCalls.host.synchronize($0)
            },
            allocate: FileCalls.host.allocate)
        var engine = try DiskEngine(
            DiskImage(path: image, options: DiskImageOptions(dataFile: data)), depth: 4, segments: 4, calls: calls)
        if !isWrite { try engine.write(65536, [UInt8](repeating: 1, count: 65536)) }
        isArmed.withLock { $0 = true }
        let acquired = engine.acquire()
        let request = try #require(acquired)
        var bytes = [UInt8](repeating: 2, count: length)
        let failure: DiskImageError? = try unsafe bytes.withUnsafeMutableBytes { buffer throws -> DiskImageError? in
            // On the stack until the request has ended.
            var vector = unsafe iovec(iov_base: buffer.baseAddress, iov_len: buffer.count)
            return try unsafe withUnsafePointer(to: &vector) { vector throws -> DiskImageError? in
                if isWrite {
                    unsafe engine.start(request, .write, offset: 0, length: UInt64(length), vectors: vector, count: 1)
                } else {
                    engine.start(request, .flush, offset: 0, length: 0)
                }
                let ended = try engine.waitForCompletion()
                let completion = try #require(ended)
                let canRetry = engine.canRetry(completion)
                #expect(completion.error == ENOSPC && completion.isOutOfRoom && !completion.isDamage)
                #expect(canRetry != what.hasSuffix("synchronisation"))
                return engine.failure(of: completion)
            }
        }
        isArmed.withLock { $0 = false }
        let reason = "No space left on device"
        let description = failure?.description ?? ""
        #expect(
            !what.hasSuffix("synchronisation")
                ? description.hasPrefix(
                    "disk \"\(victim)\": \(what.hasSuffix("read") ? "read" : "write"): \(reason) (at byte ")
                    && description.hasSuffix(" of the file)")
                : description == "disk \"\(victim)\": fdatasync: \(reason)", "\(description)")
    }

    @Test func zeroesAreWrittenWhereTheFileSystemMakesNone() throws {
        var contents = randomBytes(1 << 20, seed: 25)
        let path = try directory.write("disk.raw", contents)
        let calls = unsafe FileCalls(
            read: FileCalls.host.read, write: FileCalls.host.write, synchronize: FileCalls.host.synchronize,
            allocate: { _, _, _, _ in -Int(EOPNOTSUPP) })
        var engine = try DiskEngine(DiskImage(path: path), depth: 4, segments: 4, calls: calls)
        for (operation, range) in [
            (DiskOperation.writeZeroes, 512..<700_416), (.writeZeroesUnmapping, 900_096..<1 << 20),
        ] {
            try engine.perform(operation, at: UInt64(range.lowerBound), length: UInt64(range.count))
            contents.replaceSubrange(range, with: repeatElement(0, count: range.count))
            #expect(try directory.read("disk.raw") == contents)
        }
        // A discard is a hint: it may have no effect.
        try engine.perform(.discard, at: 700_416, length: 65536)
        #expect(try directory.read("disk.raw") == contents)
    }

    @Test func anEndlessEAGAINEnds() throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 0, count: 4096))
        var engine = try DiskEngine(
            DiskImage(path: path), depth: 4, segments: 4, calls: Self.calls { _ in .error(EAGAIN) })
        #expect(throws: DiskImageError.request(path: path, SystemCallError("read", errno: EAGAIN))) {
            try engine.read(0, 512)
        }
    }

    @Test(.enabled(if: getuid() == 0, "a file system of its own needs root"), arguments: [true, false])
    func aFullFileSystemIsAnErrorOfTheWrite(usesRing: Bool) throws {
        let mount = directory.file("small")
        #expect(run(["mkdir", mount]).status == 0)
        let mounted = run(["mount", "-t", "tmpfs", "-o", "size=256k", "swkvm-test", mount])
        try #require(mounted.status == 0, "\(mounted.output)")
        defer { #expect(run(["umount", mount]).status == 0) }
        let path = mount + "/disk.raw"
        do {
            let file = try FileDescriptor.open(path, O_RDWR | O_CREAT, mode: 0o600)
            let status = ftruncate(file.rawValue, 1 << 20)
            #expect(status == 0)
        }
        var engine = try DiskEngine(DiskImage(path: path), usesRing: usesRing)
        let piece = randomBytes(128 << 10, seed: 26)
        try engine.write(0, piece)
        #expect(throws: DiskImageError.request(path: path, SystemCallError("write", errno: ENOSPC))) {
            try engine.write(512 << 10, randomBytes(256 << 10, seed: 27))
        }
        #expect(try engine.read(0, piece.count) == piece)
        // A hole makes room again.
        try engine.perform(.discard, at: 512 << 10, length: 512 << 10)
        try engine.write(512 << 10, piece)
        #expect(try engine.read(512 << 10, piece.count) == piece)
    }
}

/// What happens to one call of a workload.
enum HostFault: CaseIterable, CustomTestStringConvertible {
    case full, broken, partial, interrupted

    var testDescription: String { "\(self)" }
    var fault: FaultTests.Fault {
        switch self {
        case .full: .error(ENOSPC)
        case .broken: .error(EIO)
        case .partial: .short
        case .interrupted: .error(EINTR)
        }
    }
    /// Whether the guest may hear of it.
    var isFailure: Bool { self == .full || self == .broken }
}

/// A workload that is done again and again, each time with one fault more towards its end.
struct EveryCall {
    let fault: HostFault
    var rounds = 6
    var seed: UInt64 = 99
    var maximum = 16 << 10
    private(set) var total = 1

    init(fault: HostFault) { self.fault = fault }

    /// - Parameters:
    ///   - reset: makes the image what it was at first, with `contents`.
    ///   - examine: expects an image that nobody has open to be sound.
    mutating func run(
        _ path: String, _ options: DiskImageOptions, _ contents: [UInt8], reset: () throws -> Void,
        examine: (_ comment: String) throws -> Void
    ) throws {
        var victim = 0
        while victim < total {
            try reset()
            let counter = FaultTests.Counter(), failing = victim, fault = fault.fault
            var workload = Workload(contents, seed: seed, maximum: maximum)
            let comment = "call \(failing), seed \(seed)"
            do {
                var engine = try DiskEngine(
                    DiskImage(path: path, options: options), depth: 8, segments: 8,
                    calls: FaultTests.calls { call in
                        _ = counter.next()
                        return call == failing ? fault : .none
                    })
                for round in 0..<rounds {
                    try workload.round(&engine, mayFail: self.fault.isFailure)
                    // What failed holds what nobody knows; the rest holds what the array does.
                    try workload.learn(&engine)
                    if round % 3 != 2 { continue }
                    if self.fault.isFailure { try? engine.perform(.flush) } else { try engine.perform(.flush) }
                }
                total = max(total, counter.next())
                let now = try self.fault.isFailure ? (try? engine.readAll()) ?? engine.readAll() : engine.readAll(),
                    isRight = isSame(now, workload.model)
                #expect(isRight, "\(comment)")
            }
            try examine(comment)
            // Closed in time, it has what was reported to the guest.
            if !self.fault.isFailure {
                var engine = try DiskEngine(DiskImage(path: path, options: options), depth: 4, usesRing: false)
                #expect(try isSame(engine.readAll(), workload.model), "\(comment)")
            }
            victim += 1
        }
        #expect(total > 40, "\(total) calls")
    }
}
