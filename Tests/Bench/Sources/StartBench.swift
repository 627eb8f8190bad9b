// SPDX-License-Identifier: Apache-2.0

/// (a) From exec to the guest's first byte on the console, and to the end of the process: the bundled guest, which
/// prints a line and powers off.
enum StartBench {
    static func run(_ setup: Setup) throws -> [Row] {
        let hello = "swkvm guest"
        let size = String(Setup.memory)
        let swkvm = setup.run(["--cmdline", "test=none"])
        let qemu = setup.qemu(["-kernel", setup.guest, "-append", "test=none"])
        let same = setup.limit(["boot", setup.guest, size, "test=none"])
        var ends: [String: [Child.End]] = [:]
        var guest: [Double] = []
        for round in -1..<setup.runs {
            func measure(_ name: String, _ words: [String], wanted: String? = hello) throws -> String {
                let (end, _, errors) = try Child.run(words, wanted: wanted)
                if round >= 0 { ends[name, default: []].append(end) }
                return errors
            }
            _ = try measure("swkvm", swkvm)
            _ = try measure("qemu", qemu)
            let errors = try measure("same", same)
            if round >= 0 { guest.append(try number(after: "run", in: errors) / 1e6) }
            _ = try measure("full", setup.limit(["full", size]), wanted: nil)
            _ = try measure("bare", setup.limit(["bare"]), wanted: nil)
        }
        func values(_ name: String, _ value: KeyPath<Child.End, Double>) -> [Double] {
            (ends[name] ?? []).map { $0[keyPath: value] * 1e3 }
        }
        func sample(_ name: String, _ value: KeyPath<Child.End, Double>) -> Sample { Sample(values(name, value)) }
        func row(
            _ figure: String, _ value: KeyPath<Child.End, Double>, _ peer: String, _ name: String,
            _ goal: Row.Goal? = nil
        ) -> Row {
            Row(name: figure, unit: "ms", ours: sample("swkvm", value), peer: (name, sample(peer, value)), goal: goal)
        }
        let own = "the same guest in C"
        // The guest's time is that of its run in the C program of the same round, which only runs it.
        let less = Sample.differences(values("swkvm", \.total), guest)
        return [
            row("exec → first console byte", \.firstByte, "qemu", "QEMU microvm"),
            row("exec → first console byte", \.firstByte, "same", own),
            row("exec → exit", \.total, "qemu", "QEMU microvm", .atMost(0.25)),
            row("exec → exit", \.total, "same", own),
            row("exec → exit", \.total, "full", "C: VM with irqchip, PIT, RAM, one `out`"),
            row("exec → exit", \.total, "bare", "C: bare VM, one `out`"),
            Row(
                name: "exec → exit less the guest's time", unit: "ms", ours: less,
                peer: ("the guest's time, first KVM_RUN → end", Sample(guest))),
            row("CPU time, exec → exit", \.cpu, "qemu", "QEMU microvm"),
            row("CPU time, exec → exit", \.cpu, "same", own),
            Row(
                name: "CPU time of start-up, exec → first console byte", unit: "ms",
                ours: sample("swkvm", \.cpuToFirstByte), goal: .atMost(5)),
            row("CPU time of start-up, exec → first console byte", \.cpuToFirstByte, "qemu", "QEMU microvm"),
            row("CPU time of start-up, exec → first console byte", \.cpuToFirstByte, "same", own),
        ]
    }
}
