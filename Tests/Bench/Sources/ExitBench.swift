// SPDX-License-Identifier: Apache-2.0

import CBench
import Glibc

/// (b) Exits to user space and back, the same guest loop under swkvm and under the C program's exit loop. The guest
/// counts ticks.
enum ExitBench {
    private static let rounds = 4000.0  // as in exits.S
    private static let kinds = ["port write", "port read", "MMIO read", "MMIO write"]

    static func run(_ setup: Setup) throws -> [Row] {
        let kernel = "\(setup.programs)/exits.elf"
        let disk = "\(setup.work)/exits.raw"
        try writeFile(disk, [UInt8](repeating: 0, count: 1 << 20))
        let perSecond = ticksPerSecond()
        let commands = [
            setup.run(["--kernel", kernel, "--disk", disk]),
            setup.limit(["boot", kernel, String(Setup.memory)]),
        ]
        var rates = commands.map { _ in kinds.map { _ in [Double]() } }
        for round in -1..<setup.runs {
            for (index, command) in commands.enumerated() {
                let lines = try Child.run(command).output.split { $0 == "\n" || $0 == "\r\n" }
                guard lines.count == kinds.count else {
                    throw BenchError("exits.elf: \(lines.count) lines instead of \(kinds.count)")
                }
                for (kind, line) in lines.enumerated() where round >= 0 {
                    guard let ticks = UInt64(line, radix: 16), ticks > 0 else {
                        throw BenchError("exits.elf: '\(line)' is not a number of ticks")
                    }
                    rates[index][kind].append(rounds * perSecond / Double(ticks) / 1e3)
                }
            }
        }
        return kinds.enumerated().map { kind, name in
            Row(
                name: "exits to user space and back: \(name)", unit: "1000/s", ours: Sample(rates[0][kind]),
                peer: ("the same loop in C", Sample(rates[1][kind])), goal: .atLeast(0.9))
        }
    }

    private static func ticksPerSecond() -> Double {
        let start = now()
        let ticks = bench_ticks()
        usleep(100_000)
        return Double(bench_ticks() - ticks) / (now() - start)
    }
}
