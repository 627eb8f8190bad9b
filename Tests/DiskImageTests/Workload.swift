// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import Testing

/// Random operations on a disk, several in flight on neighbouring sectors, with an array that has what the disk must
/// have.
struct Workload: ~Copyable {
    var model: [UInt8]
    var generator: SeededGenerator
    let seed: UInt64
    private(set) var operations = 0
    /// Bytes of a request, at most.
    let maximum: Int
    /// Which sectors it uses; others are another workload's.
    var owns: (_ sector: Int) -> Bool = { _ in true }
    private let memory: UnsafeMutableRawBufferPointer
    private let vectors: UnsafeMutableBufferPointer<iovec>

    static let width = 8

    init(_ model: [UInt8], seed: UInt64, maximum: Int) {
        self.model = model
        self.seed = seed
        self.maximum = maximum
        generator = SeededGenerator(seed: seed)
        unsafe memory = .allocate(byteCount: Self.width * maximum, alignment: 4096)
        unsafe vectors = .allocate(capacity: Self.width)
    }

    deinit {
        unsafe memory.deallocate()
        unsafe vectors.deallocate()
    }

    /// Up to eight operations at once, whose sectors are near each other and not the same. Those that the host fails
    /// may have done a part of what they should: `failed` says which ranges hold what nobody knows.
    mutating func round(
        _ engine: inout DiskEngine, mayFail: Bool = false, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        var expectations: [(request: Int, slot: Int, operation: DiskOperation, range: Range<Int>, expected: [UInt8])] =
            []
        let sectors = model.count / 512
        var sector = Int.random(in: 0..<sectors, using: &generator)
        let largest = Bool.random(using: &generator) ? 8 : maximum / 512
        for slot in 0..<Int.random(in: 1...Self.width, using: &generator) {
            while sector < sectors, !owns(sector) { sector += 1 }
            guard sector < sectors else { break }
            let wanted = min(sectors - sector, Int.random(in: 1...largest, using: &generator))
            let count = (1..<wanted).first { !owns(sector + $0) } ?? wanted
            let range = sector * 512..<(sector + count) * 512
            sector += count + (Bool.random(using: &generator) ? 0 : Int.random(in: 0...largest, using: &generator))
            let operation = [
                DiskOperation.read, .read, .write, .write, .write, .discard, .writeZeroes, .writeZeroesUnmapping,
            ].randomElement(using: &generator)!
            let free = engine.acquire()
            let request = try #require(free)
            let piece = unsafe UnsafeMutableRawBufferPointer(
                rebasing: memory[slot * maximum..<slot * maximum + range.count])
            unsafe vectors[slot] = iovec(iov_base: piece.baseAddress, iov_len: range.count)
            var expected = Array(model[range])
            switch operation {
            case .read: unsafe piece.initializeMemory(as: UInt8.self, repeating: 0xee)
            case .write:
                expected = randomBytes(range.count, seed: generator.next())
                unsafe piece.copyBytes(from: expected)
            case .discard, .flush: break
            case .writeZeroes, .writeZeroesUnmapping: expected = [UInt8](repeating: 0, count: range.count)
            }
            if operation != .read { history.append((range, expected)) }
            expectations.append((request, slot, operation, range, expected))
            if operation == .read || operation == .write {
                unsafe engine.start(
                    request, operation, offset: UInt64(range.lowerBound), length: UInt64(range.count),
                    vectors: vectors.baseAddress! + slot, count: 1)
            } else {
                engine.start(request, operation, offset: UInt64(range.lowerBound), length: UInt64(range.count))
            }
        }
        operations += expectations.count
        for _ in expectations {
            let ended = try engine.waitForCompletion()
            let completion = try #require(ended, "seed \(seed)")
            let expectation = try #require(expectations.first { $0.request == completion.request })
            engine.release(completion.request)
            let range = expectation.range
            guard completion.error == 0 else {
                #expect(
                    mayFail, "\(expectation.operation) \(range): errno \(completion.error), seed \(seed)",
                    sourceLocation: sourceLocation)
                unknown.append(range)
                continue
            }
            if expectation.operation == .read {
                let start = expectation.slot * maximum
                let same = unsafe expectation.expected.withUnsafeBytes {
                    unsafe memcmp($0.baseAddress!, memory.baseAddress! + start, range.count) == 0
                }
                #expect(same, "read \(range), operation \(operations), seed \(seed)", sourceLocation: sourceLocation)
            } else if expectation.operation != .discard {
                model.replaceSubrange(range, with: expectation.expected)
            } else {
                discarded.append(range)
            }
        }
        try awaitAll(&engine, sourceLocation)
    }

    /// Lets an engine go while writes of what the disk has already, and a flush, are in flight.
    mutating func leave(_ engine: consuming DiskEngine) {
        let sectors = model.count / 512
        for slot in 0..<Self.width - 1 {
            guard let sector = (Int.random(in: 0..<sectors, using: &generator)..<sectors).first(where: owns),
                let request = engine.acquire()
            else { continue }
            let piece = unsafe UnsafeMutableRawBufferPointer(rebasing: memory[slot * maximum..<slot * maximum + 512])
            unsafe piece.copyBytes(from: model[sector * 512..<(sector + 1) * 512])
            unsafe vectors[slot] = iovec(iov_base: piece.baseAddress, iov_len: 512)
            unsafe engine.start(
                request, .write, offset: UInt64(sector) * 512, length: 512, vectors: vectors.baseAddress! + slot,
                count: 1)
        }
        if let request = engine.acquire() { engine.start(request, .flush, offset: 0, length: 0) }
        if Bool.random(using: &generator) { try? engine.submit() }
        // Here it ends, while the memory is there.
        _ = consume engine
    }

    /// What came to which sectors, since the owner last emptied it.
    var history: [(range: Range<Int>, bytes: [UInt8])] = []
    private var discarded: [Range<Int>] = []
    private(set) var unknown: [Range<Int>] = []

    /// What was discarded reads as before or as zeroes.
    private mutating func awaitAll(_ engine: inout DiskEngine, _ sourceLocation: SourceLocation) throws {
        for range in discarded {
            let bytes = try readAgain(&engine, range)
            for sector in stride(from: 0, to: range.count, by: 512) {
                guard !isEqual(bytes, sector, model, range.lowerBound + sector) else { continue }
                let now = bytes[sector..<sector + 512]
                #expect(now.allSatisfy { $0 == 0 }, "discard \(range), seed \(seed)", sourceLocation: sourceLocation)
                model.replaceSubrange(range.lowerBound + sector..<range.lowerBound + sector + 512, with: now)
            }
        }
        discarded = []
    }

    /// Reads a range, once more if the one call that fails is this one's. Where it was a load of metadata for which
    /// another engine waits, too, that one has to hear of it before anybody tries again.
    private func readAgain(_ engine: inout DiskEngine, _ range: Range<Int>) throws -> [UInt8] {
        for _ in 0..<10_000 {
            if let bytes = try? engine.read(UInt64(range.lowerBound), range.count) { return bytes }
            Thread.yield()
        }
        return try engine.read(UInt64(range.lowerBound), range.count)
    }

    /// Forgets which ranges nobody knows, after reading them.
    mutating func learn(_ engine: inout DiskEngine) throws {
        for range in unknown {
            let bytes = try readAgain(&engine, range)
            model.replaceSubrange(range, with: bytes)
        }
        unknown = []
    }
}

/// Whether two sectors are the same. Tests are built without optimisation, where comparing collections takes long.
func isEqual(_ left: [UInt8], _ leftOffset: Int, _ right: [UInt8], _ rightOffset: Int) -> Bool {
    unsafe left.withUnsafeBytes { left in
        unsafe right.withUnsafeBytes { right in
            unsafe memcmp(left.baseAddress! + leftOffset, right.baseAddress! + rightOffset, 512) == 0
        }
    }
}

/// Without locks: a program that another test starts at this moment has our descriptors for an instant, and their locks
/// with them.
let unlocked = DiskImageOptions(locking: false)

/// Runs qemu-img check and expects no error, and no leak unless they are allowed.
func expectSound(
    _ path: String, leaksAllowed: Bool = false, _ comment: String = "",
    sourceLocation: SourceLocation = #_sourceLocation
) {
    let (status, output) = run(["qemu-img", "check", "-U", "-f", "qcow2", path])
    #expect(
        status == 0 || (leaksAllowed && status == 3), "qemu-img check: \(status) \(output.prefix(1500)) \(comment)",
        sourceLocation: sourceLocation)
}
