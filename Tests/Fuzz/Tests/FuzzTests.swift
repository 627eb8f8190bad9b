// SPDX-License-Identifier: Apache-2.0

import FuzzTargets
import Glibc
import TestSupport
import Testing

private func environment(_ name: String) -> UInt64? { getenv(name).flatMap { UInt64(String(cString: $0)) } }

/// Says what is tried, before a trap can end the process.
private func announce(_ line: String) {
    print(line)
    fflush(nil)
}

/// Whatever the bytes are, the answer is a result or an error. `SWKVM_ROUNDS` and `SWKVM_SEED` change how many inputs,
/// and which.
@Suite(.timed) struct FuzzTests {
    private func target(_ name: String) throws -> FuzzTarget { try #require(FuzzTarget.all.first { $0.name == name }) }

    private static let thorough = Set(Share.of(FuzzTarget.all.map(\.name)))

    /// The targets of this run's share get more inputs than the others.
    @Test(arguments: FuzzTarget.all.map(\.name)) func survivesMutations(name: String) throws {
        let target = try target(name)
        for (index, seed) in target.seeds.enumerated() {
            let isAccepted = target.run(seed)
            #expect(isAccepted, "seed \(index) of \(name) is refused")
        }
        let rounds = environment("SWKVM_ROUNDS") ?? (Self.thorough.contains(name) ? 4000 : 800)
        let seed = environment("SWKVM_SEED") ?? 1
        announce("fuzz \(name): SWKVM_SEED=\(seed) SWKVM_ROUNDS=\(rounds)")
        var mutator = Mutator(seed: seed), accepted = 0
        for _ in 0..<rounds where target.run(mutator.input(for: target)) { accepted += 1 }
        // Not all alike: the changes reach further than the first check, and the checks refuse some.
        #expect(accepted > rounds / 50 && accepted < rounds, "\(accepted) of \(rounds) inputs were accepted")
    }

    /// What `make fuzz` starts from, and what once was a mistake.
    @Test(arguments: FuzzTarget.all.map(\.name)) func survivesTheCorpus(name: String) throws {
        let target = try target(name), corpus = try Corpus(name)
        #expect(!corpus.files.isEmpty)
        announce("fuzz \(name): \(corpus.files.count) files of the corpus")
        for file in corpus.files {
            LastWords.set("fuzz \(name): \(file)\n")
            _ = target.run(try corpus.read(file))
        }
        LastWords.set("")
    }

    @Test func everyCorpusHasATarget() throws {
        let all = try Corpus.directories()
        #expect(all.sorted() == FuzzTarget.all.map(\.name).sorted())
        var size = 0
        for name in all {
            let corpus = try Corpus(name)
            for file in corpus.files { size += try corpus.read(file).count }
        }
        #expect(size <= 512 << 10, "\(size) bytes in the repository")
    }
}

/// What a thread was trying: written when a trap, or a bad access, ends the process in it. Nothing is in the way of who
/// would come then.
private enum LastWords {
    private static let signals = [SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV]

    /// Each thread's words, which end with a 0.
    nonisolated(unsafe) private static var key = pthread_key_t()
    /// What was to be done for each signal before, by its number.
    nonisolated(unsafe) private static let former = UnsafeMutablePointer<sigaction>.allocate(capacity: 65)

    private static let isListening: Bool = {
        pthread_key_create(&key) { free($0) }
        for signal in signals {
            var action = sigaction()
            action.__sigaction_handler.sa_handler = { signal in
                if let words = pthread_getspecific(LastWords.key) {
                    write(STDERR_FILENO, words, strlen(words.assumingMemoryBound(to: CChar.self)))
                }
                // What happened happens again.
                sigaction(signal, LastWords.former + Int(signal), nil)
            }
            action.sa_flags = SA_ONSTACK
            sigaction(signal, &action, former + Int(signal))
        }
        return true
    }()

    static func set(_ words: String) {
        guard isListening else { return }
        let old = pthread_getspecific(key)
        pthread_setspecific(key, strdup(words))
        free(old)
    }
}

/// The inputs of a target that are in the repository.
private struct Corpus {
    let files: [String]
    private let directory: String

    private static var root: String { String(#filePath.dropLast("Tests/FuzzTests.swift".count)) + "Corpus" }

    init(_ target: String) throws {
        directory = Self.root + "/" + target
        files = try Self.entries(of: directory).sorted()
    }

    static func directories() throws -> [String] { try entries(of: root) }

    private static func entries(of path: String) throws -> [String] {
        let directory = try #require(opendir(path), "\(path)")
        defer { closedir(directory) }
        var names: [String] = []
        while let entry = readdir(directory) {
            let name = withUnsafeBytes(of: entry.pointee.d_name) {
                String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self)
            }
            if !name.hasPrefix(".") { names.append(name) }
        }
        return names
    }

    func read(_ file: String) throws -> [UInt8] {
        let stream = try #require(fopen(directory + "/" + file, "r"))
        defer { fclose(stream) }
        var bytes = [UInt8](repeating: 0, count: 64 << 10)
        let count = fread(&bytes, 1, bytes.count, stream)
        try #require(count < bytes.count, "\(file) is no small input")
        return Array(bytes[..<count])
    }
}
