import FuzzTargets
import Glibc
import Testing

private func environment(_ name: String) -> UInt64? { getenv(name).flatMap { UInt64(String(cString: $0)) } }

/// Whatever the bytes are, the answer is a result or an error. `SWKVM_ROUNDS` and `SWKVM_SEED` change how many inputs, and which.
@Suite struct FuzzTests {
    @Test(arguments: FuzzTarget.all.map(\.name)) func survivesMutations(name: String) throws {
        let target = try #require(FuzzTarget.all.first { $0.name == name })
        for seed in target.seeds { #expect(target.run(seed), "a seed of \(name) is refused") }
        let rounds = environment("SWKVM_ROUNDS") ?? 4000, seed = environment("SWKVM_SEED") ?? 1
        // A trap ends the process: this line then says how to have it again.
        print("fuzz \(name): SWKVM_SEED=\(seed) SWKVM_ROUNDS=\(rounds)")
        var mutator = Mutator(seed: seed), accepted = 0
        for _ in 0 ..< rounds where target.run(mutator.input(for: target)) { accepted += 1 }
        // Not all alike: the changes reach further than the first check, and the checks refuse some.
        #expect(accepted > rounds / 50 && accepted < rounds, "\(accepted) of \(rounds) inputs were accepted")
    }
}
