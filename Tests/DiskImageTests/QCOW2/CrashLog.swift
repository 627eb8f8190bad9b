// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import Testing

/// What came to the files of an image, in its order, and what of it is left when the power fails.
final class CrashLog: Sendable {
    enum Entry: Sendable {
        case write(file: Int, offset: Int, bytes: [UInt8])
        case hole(file: Int, offset: Int, length: Int)
        case size(file: Int, Int, grows: Bool)
        case synchronize(file: Int)
        /// The guest's flush number n has ended.
        case flushed(Int)

        var isSynchronisation: Bool {
            if case .synchronize = self { true } else { false }
        }
    }

    private let entries = Guarded<[Entry]>([])
    private let files: [ImageFile.Identity]
    var all: [Entry] { entries.withLock { $0 } }
    func append(_ entry: Entry) { entries.withLock { $0.append(entry) } }

    /// - Parameter paths: the files, by whose numbers here they are known.
    init(_ paths: [String]) {
        files = paths.map { path in
            var status = stat()
            let result = unsafe stat(path, &status)
            #expect(result == 0, "\(path)")
            return ImageFile.Identity(status)
        }
    }

    /// Other entries of the same files.
    init(_ log: CrashLog, _ entries: [Entry]) {
        files = log.files
        self.entries.withLock { $0 = entries }
    }

    private func number(_ descriptor: Int32) -> Int {
        var status = stat()
        guard unsafe fstat(descriptor, &status) == 0, let number = files.firstIndex(of: ImageFile.Identity(status))
        else { fatalError("a file of nobody") }
        return number
    }

    /// The host's calls, which are written down. Those of several threads come one after the other, in the order of the
    /// log.
    var calls: FileCalls {
        unsafe FileCalls(
            read: FileCalls.host.read,
            write: { file, vectors, count, offset in
                self.entries.withLock { entries in
                    let result = unsafe FileCalls.host.write(file, vectors, count, offset)
                    var bytes: [UInt8] = []
                    for index in 0..<Int(count) {
                        unsafe bytes += UnsafeRawBufferPointer(
                            start: vectors[index].iov_base, count: vectors[index].iov_len)
                    }
                    entries.append(
                        .write(file: self.number(file), offset: Int(offset), bytes: Array(bytes.prefix(max(0, result))))
                    )
                    return result
                }
            },
            synchronize: { file in
                self.append(.synchronize(file: self.number(file)))
                return 0
            },
            allocate: { file, mode, offset, length in
                self.entries.withLock { entries in
                    let result = FileCalls.host.allocate(file, mode, offset, length), number = self.number(file)
                    if result >= 0 {
                        entries.append(
                            mode == 0
                                ? .size(file: number, Int(offset + length), grows: true)
                                : .hole(file: number, offset: Int(offset), length: Int(length)))
                    }
                    return result
                }
            },
            truncate: { file, size in
                self.entries.withLock { entries in
                    let result = FileCalls.host.truncate(file, size)
                    if result >= 0 { entries.append(.size(file: self.number(file), Int(size), grows: false)) }
                    return result
                }
            })
    }

    static func apply(_ entry: Entry, to files: inout [[UInt8]]) {
        switch entry {
        case .write(let file, let offset, let bytes):
            guard !bytes.isEmpty else { return }
            grow(&files[file], offset + bytes.count)
            // Faster than a generic method of the array, as tests are built without optimisation.
            unsafe files[file].withUnsafeMutableBytes { target in
                unsafe bytes.withUnsafeBytes {
                    unsafe _ = memcpy(target.baseAddress! + offset, $0.baseAddress!, bytes.count)
                }
            }
        case .hole(let file, let offset, let length):
            let end = min(files[file].count, offset + length)
            if offset < end {
                unsafe files[file].withUnsafeMutableBytes {
                    unsafe _ = memset($0.baseAddress! + offset, 0, end - offset)
                }
            }
        case .size(let file, let size, let grows):
            if files[file].count > size, !grows { files[file].removeLast(files[file].count - size) }
            grow(&files[file], size)
        case .synchronize, .flushed: break
        }
    }

    private static func grow(_ file: inout [UInt8], _ size: Int) {
        if file.count < size { file += [UInt8](repeating: 0, count: size - file.count) }
    }

    /// A write as the sectors that a disk may store or lose one by one, and whatever else as it is.
    private static func sectors(_ entry: Entry) -> [Entry] {
        guard case .write(let file, let offset, let bytes) = entry else { return [entry] }
        var parts: [Entry] = [], start = 0
        while start < bytes.count {
            let end = min(bytes.count, start + 512 - (offset + start) % 512)
            parts.append(.write(file: file, offset: offset + start, bytes: Array(bytes[start..<end])))
            start = end
        }
        return parts
    }

    /// Gives `examine` the files as a power failure may have left them: after prefixes of the log, as if all of it had
    /// reached the disk, and for each second one (or each, if all are taken) with only a part of what no
    /// synchronisation has made durable; and the number of the last flush that had ended.
    /// - Parameters:
    ///   - start: the files before the first entry.
    ///   - prefixes: about how many; `SWKVM_CRASH_STEP=1` takes all.
    ///   - tears: also parts of one write may be lost, by sectors.
    ///   - overtakes: at each of these moments also the last entry alone is there, and nothing else that no
    ///     synchronisation has made durable.
    /// - Returns: how many prefixes there were.
    @discardableResult
    func replay(
        _ start: [[UInt8]], prefixes: Int, seed: UInt64, tears: Bool = true, overtakes: Bool = false,
        _ examine: (_ files: [[UInt8]], _ flushed: Int, _ comment: String) throws -> Void
    ) throws -> Int {
        var generator = SeededGenerator(seed: seed)
        var files = start, durable = start, flushed = 0
        var pending: [(file: Int, entry: Entry)] = []
        let entries = all
        let step = environment("SWKVM_CRASH_STEP") ?? max(1, entries.count / prefixes)
        for (index, entry) in entries.enumerated() {
            Self.apply(entry, to: &files)
            switch entry {
            case .synchronize(let file):
                durable[file] = files[file]
                pending.removeAll { $0.file == file }
            case .flushed(let number): flushed = number
            case .write(let file, _, _), .hole(let file, _, _), .size(let file, _, _): pending.append((file, entry))
            }
            guard index % step == 0 else { continue }
            try examine(files, flushed, "prefix \(index) of \(entries.count), seed \(seed)")
            if overtakes, !pending.isEmpty {
                var overtaken = durable
                Self.apply(entry, to: &overtaken)
                try examine(overtaken, flushed, "only the last write at \(index) of \(entries.count)")
            }
            // Of what was not synchronised, any part may have reached the disk.
            guard !pending.isEmpty, step == 1 || index / step % 2 == 0 else { continue }
            var reordered = durable
            for (_, entry) in pending {
                for part in tears ? Self.sectors(entry) : [entry] where Bool.random(using: &generator) {
                    Self.apply(part, to: &reordered)
                }
            }
            try examine(reordered, flushed, "lost writes at \(index) of \(entries.count), seed \(seed)")
        }
        return (entries.count + step - 1) / step
    }
}

/// What a flush made durable, and what was done until the next one ended.
struct CrashState {
    var flushed: [UInt8]
    var history: [(range: Range<Int>, bytes: [UInt8])] = []
    private static let zeroes = [UInt8](repeating: 0, count: 512)

    /// The sectors of a disk that are neither as they were flushed, nor as somebody made them since, nor, if they were
    /// touched, zeroes (what a discard leaves).
    func unexplained(_ now: [UInt8]) -> [Int] {
        stride(from: 0, to: now.count, by: 512).filter { sector in
            if isEqual(now, sector, flushed, sector) { return false }
            let changes = history.filter { $0.range.contains(sector) }
            let isKnown = changes.contains { isEqual(now, sector, $0.bytes, sector - $0.range.lowerBound) }
            return !isKnown && (changes.isEmpty || !isEqual(now, sector, Self.zeroes, 0))
        }
    }
}

extension CrashLog {
    /// Does a random workload to an image, with a flush after every third round, until there are so many rounds and so
    /// many entries.
    /// - Returns: what each flush left, and what was done until the next.
    func record(
        _ path: String, _ options: DiskImageOptions, _ contents: [UInt8], seed: UInt64, maximum: Int, rounds: Int,
        entries: Int = 0
    ) throws -> [CrashState] {
        var workload = Workload(contents, seed: seed, maximum: maximum)
        var states = [CrashState(flushed: contents)]
        var engine = try DiskEngine(DiskImage(path: path, options: options), depth: 8, segments: 8, calls: calls)
        var round = 0
        while round < rounds || all.count < entries {
            try workload.round(&engine)
            round += 1
            if round % 3 == 0 {
                try engine.perform(.flush)
                append(.flushed(states.count))
                states[states.count - 1].history = workload.history
                workload.history = []
                states.append(CrashState(flushed: workload.model))
            }
        }
        states[states.count - 1].history = workload.history
        return states
    }
}

/// Our check finds no errors in a qcow2 image; for one in eight nor does qemu-img's, with which ours agrees
/// (`CheckTests`).
func expectNoErrors(_ path: String, _ comment: String, encryptedIn directory: TemporaryDirectory? = nil) throws {
    let report = try DiskImage.check(path: path, options: unlocked)
    #expect(report.errors == 0, "\(report.findings.prefix(5)) \(comment)")
    guard examined.next() % 8 == 0 else { return }
    if let directory {
        try Encrypted(directory).expectSound(path, leaksAllowed: true, comment)
    } else {
        expectSound(path, leaksAllowed: true, comment)
    }
}

private let examined = FaultTests.Counter()
