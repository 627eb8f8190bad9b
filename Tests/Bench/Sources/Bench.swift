// SPDX-License-Identifier: Apache-2.0

import Glibc

/// Measures swkvm beside its peers and prints one table. Started by Tests/Bench/run, which gives it namespaces of its
/// own.
///
///     swkvm-bench SWKVM GUEST PROGRAMS WORK [VMLINUX]
@main
struct Bench {
    static func main() {
        // As process 1 of its namespace it ignores signals by default; when it ends, all its processes end.
        for number in [SIGINT, SIGTERM, SIGHUP] { signal(number) { _exit(128 + $0) } }
        signal(SIGPIPE, SIG_IGN)
        let words = CommandLine.arguments
        guard (5...6).contains(words.count) else {
            print("usage: swkvm-bench SWKVM GUEST PROGRAMS WORK [VMLINUX]")
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
        if let kernel = setup.linux { parts.append(("linux", { try LinuxBench.run(setup, kernel: kernel) })) }
        var rows: [Row] = []
        var failed = false
        for (name, part) in parts where only?.contains(name) ?? true {
            let start = now()
            do { rows += try part() } catch {
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
}
