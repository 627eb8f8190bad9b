// SPDX-License-Identifier: Apache-2.0

import Glibc

/// A third of many generated cases, chosen by a seed, or all of them.
///
/// `make test` gives a new seed to each run in `SWKVM_TEST_SHARE`, and prints it; the same seed chooses the same cases.
/// Without it, as in `make test-all`, all cases run. For matrices and long random workloads only: a case that was
/// written for a fault always runs.
public enum Share {
    private static let seed: UInt64? = {
        guard let text = unsafe getenv("SWKVM_TEST_SHARE") else { return nil }
        // The value is the environment's, and ends with a zero.
        return unsafe UInt64(String(cString: text))
    }()

    /// - Parameters:
    ///   - cases: of a test, in an order that does not change.
    ///   - file, line: where it stands, so that each test has a choice of its own.
    /// - Returns: a third of them, rounded up, in their order.
    public static func of<Cases: Collection>(
        _ cases: Cases, file: String = #fileID, line: UInt64 = #line
    ) -> [Cases.Element] {
        guard let seed else { return Array(cases) }
        // FNV-1a of the file's name.
        let place = file.utf8.reduce(line ^ 0xcbf2_9ce4_8422_2325) { ($0 ^ UInt64($1)) &* 0x100_0000_01b3 }
        var generator = SeededGenerator(seed: seed ^ place)
        let chosen = Array(cases.indices).shuffled(using: &generator).prefix((cases.count + 2) / 3)
        return chosen.sorted().map { cases[$0] }
    }
}
