// SPDX-License-Identifier: Apache-2.0

import Glibc

/// Measures swkvm beside its peers and prints one table. Started by Tests/Bench/run, which gives it namespaces of its
/// own.
///
///     swkvm-bench SWKVM GUEST PROGRAMS WORK [VMLINUX]
///     swkvm-bench --compare OLD NEW
@main
struct Bench {
    static func main() {
        // As process 1 of its namespace it ignores signals by default; when it ends, all its processes end.
        for number in [SIGINT, SIGTERM, SIGHUP] { signal(number) { _exit(128 + $0) } }
        signal(SIGPIPE, SIG_IGN)
        let words = CommandLine.arguments
        if words.count == 4, words[1] == "--compare" { compare(words[2], words[3]) }
        guard (5...6).contains(words.count) else {
            print("usage: swkvm-bench SWKVM GUEST PROGRAMS WORK [VMLINUX]\n       swkvm-bench --compare OLD NEW")
            exit(2)
        }
        let runs = getenv("BENCH_RUNS").flatMap { Int(String(cString: $0)) } ?? 20
        let setup = Setup(
            swkvm: words[1], guest: words[2], programs: words[3], work: words[4],
            linux: words.count > 5 ? words[5] : nil, runs: max(1, runs))
        let only = getenv("BENCH_ONLY").map { String(cString: $0).split(separator: ",").map(String.init) }
        var parts: [(String, () throws -> [Row])] = [
            ("start", { try StartBench.run(setup) }),
            ("exits", { try ExitBench.run(setup) }),
            ("disk", { try DiskBench.run(setup) }),
            ("image", { try ToolBench.run(setup) }),
            ("queues", { try QueueBench.run(setup) }),
            ("net", { try NetworkBench.run(setup) }),
            ("footprint", { try FootprintBench.run(setup) }),
        ]
        if let kernel = setup.linux {
            parts.append(("linux", { try LinuxBench.run(setup, kernel: kernel) }))
            if let guest = getenv("BENCH_GUEST").map({ String(cString: $0) }) {
                parts.append(("guest", { try GuestBench.run(setup, kernel: kernel, parts: guest) }))
                parts.append(("loaded", { try GuestBench.run(setup, kernel: kernel, parts: guest, hogs: 2) }))
            }
        }
        var rows: [Row] = []
        var failed = false
        for (name, part) in parts where only?.contains(name) ?? true {
            let start = now()
            do {
                let new = try part()
                rows += new
                if let path = getenv("BENCH_JSON") { try Figure.append(new, to: String(cString: path)) }
            } catch {
                failed = true
                print("\(name): \(error)")
            }
            print("measured: \(name), \(Int(now() - start)) s")
            fflush(nil)
        }
        print()
        printTable(rows)
        exit(failed ? 1 : 0)
    }

    /// Compares two files of results.
    private static func compare(_ old: String, _ new: String) -> Never {
        let limit = getenv("BENCH_LIMIT").flatMap { Double(String(cString: $0)) }
        do {
            let isGood = try Figure.compare(old, new, limit: limit ?? 0.97)
            exit(isGood || limit == nil ? 0 : 1)
        } catch {
            print("bench-compare: \(error)")
            exit(2)
        }
    }
}
