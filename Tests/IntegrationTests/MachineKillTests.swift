// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// Verbs that are killed at any moment: the next verb finds each machine as it was before, or as it was to be.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct MachineKillTests {
    private let home: MachineHome

    init() throws { home = try MachineHome() }

    private func disk(_ name: String, _ file: String = "disk.qcow2") -> String {
        "\(home.path)/machines/\(name)/\(file)"
    }

    /// Starts a verb, and kills it after a random time, in which it may have ended.
    private func kill(_ words: [String], within microseconds: UInt32, _ generator: inout SeededGenerator) throws {
        let verb = try home.start(words, environment: ["VISUAL=true"])
        usleep(UInt32.random(in: 0...microseconds, using: &generator))
        verb.send(signal: SIGKILL)
        _ = try verb.waitForExit()
    }

    /// The machines that are defined, after the next verb, each of which has a directory; and no others have one.
    private func machines() throws -> [String] {
        let names = try home.swkvm("list", "--names").output.lines
        let directories = try shell("ls -A '\(home.path)/machines' 2>/dev/null || true").split(separator: "\n").map(
            String.init)
        #expect(names == directories.sorted())
        for name in names {
            let rest = try home.files(of: name).filter { $0.hasPrefix(".") && $0 != ".snapshot" }
            #expect(rest.isEmpty, "\(name): \(rest)")
        }
        #expect(
            try shell("ls -A '\(home.path)/definitions'").split(separator: "\n").allSatisfy { $0.hasSuffix(".toml") })
        return names
    }

    /// An image that can be used, with what was written to it. Clusters that nothing refers to are no damage.
    private func expectValid(_ path: String, byte: Int? = nil) throws {
        let check = try Program(["qemu-img", "check", "-q", "-f", "qcow2", path])
        let end = try check.waitForEnd()
        #expect(end == .status(0) || end == .status(3), "\(check.story)")
        guard let byte else { return }
        let text = try shell("qemu-io -f qcow2 -r -c 'read -P \(byte) 64k 64k' '\(path)'")
        #expect(!text.contains("verification failed"), "\(path): \(text)")
    }

    @Test(arguments: 0..<4) func verbsOfStoppedMachines(seed: Int) throws {
        var generator = SeededGenerator(seed: UInt64(seed))
        try home.swkvm("create", "web", "--mem", "64M", "--disk-size", "1M")
        _ = try shell(
            """
            qemu-img create -q -f qcow2 '\(disk("web", "data.qcow2"))' 1M
            sed -i 's|^disk = .*|disk = ["disk.qcow2", "data.qcow2"]|' '\(home.path)/definitions/web.toml'
            for disk in '\(disk("web"))' '\(disk("web", "data.qcow2"))'; do qemu-io -f qcow2 -c 'write -P 1 64k 64k' "$disk" >/dev/null; done
            """)
        var name = "web"
        for round in 0..<rounds {
            switch Int.random(in: 0..<6, using: &generator) {
            case 0:
                try kill(["create", "m", "--mem", "64M", "--disk-size", "1G"], within: 30_000, &generator)
                if try machines().contains("m") {
                    try expectValid(disk("m"))
                    try kill(["delete", "m"], within: 20_000, &generator)
                    if try machines().contains("m") {
                        try expectValid(disk("m"))
                        try home.swkvm("delete", "m")
                    }
                }
            case 1:
                try kill(
                    ["clone", name, "copy"] + (Bool.random(using: &generator) ? ["--copy"] : []), within: 60_000,
                    &generator)
                if try machines().contains("copy") {
                    for file in ["disk.qcow2", "data.qcow2"] { try expectValid(disk("copy", file), byte: 1) }
                    try home.swkvm("delete", "copy")
                }
            case 2:
                let new = "n\(round)"
                try kill(["rename", name, new], within: 30_000, &generator)
                let left = try machines()
                #expect(left == [name] || left == [new], "\(left)")
                name = left.first ?? name
            case 3:
                let tag = "t\(Int.random(in: 0..<3, using: &generator))"
                let action = ["create", "revert", "delete"].randomElement(using: &generator) ?? "create"
                try kill(["snapshot", name, action, tag], within: 60_000, &generator)
                let list = try home.swkvm("snapshot", name, "list").output.lines.dropFirst()
                #expect(list.allSatisfy { $0.hasSuffix(" 2") }, "\(list)")
            case 4:
                try kill(["resize", name, "--disk-size", "+64K", "--cpus", "2"], within: 40_000, &generator)
            default:
                try kill(["edit", name], within: 20_000, &generator)
                _ = try shell("rm -f '\(home.path)/machines/\(name)'/edited-*")
            }
            #expect(try machines() == [name])
            for file in ["disk.qcow2", "data.qcow2"] { try expectValid(disk(name, file), byte: 1) }
        }
        // Nothing is in the way of what comes next.
        try home.swkvm("snapshot", name, "create", "last")
        #expect(try home.files(of: name).sorted() == ["data.qcow2", "disk.qcow2"])
    }

    @Test(arguments: 0..<2) func startsAndStops(seed: Int) throws {
        var generator = SeededGenerator(seed: UInt64(seed))
        try home.swkvm("create", "web", "--mem", "64M", "--disk-size", "1M")
        for _ in 0..<rounds / 2 {
            try kill(["start", "web"], within: 150_000, &generator)
            // The machine's own process may just be starting, or ending since nobody waits for it.
            let again = try home.start(["start", "web"])
            let end = try again.waitForEnd()
            #expect(
                end == .status(0) || again.errors.text.contains("web is running")
                    || again.errors.text.contains("locked"),
                "\(again.story)")
            try kill(["stop", "--force", "web"], within: 50_000, &generator)
            let stop = try home.start(["stop", "web"])
            let stopEnd = try stop.waitForEnd()
            #expect(stopEnd == .status(0) || stop.errors.text.contains("web is not running"), "\(stop.story)")
            #expect(try home.states == ["web stopped"])
            try expectValid(disk("web"))
        }
        try home.swkvm("start", "web")
        try home.swkvm("stop", "web")
    }

    /// More by hand: `SWKVM_KILL_ROUNDS=25`, for each of the seeds.
    private var rounds: Int { getenv("SWKVM_KILL_ROUNDS").flatMap { Int(String(cString: $0)) } ?? 6 }

    /// No room for an overlay, a definition or a seed: nothing is left, and what there was stays.
    @Test func aFullDisk() throws {
        let mount = home.directory("small"), key = home.directory("key.pub")
        _ = try shell(
            "echo 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI\(String(repeating: "A", count: 43)) x' >'\(key)'; qemu-img create -q -f raw '\(home.directory("base.raw"))' 8M; qemu-io -f raw -c 'write -P 3 0 8M' '\(home.directory("base.raw"))' >/dev/null"
        )
        let program = try Program([
            "unshare", "-m", "sh", "-euc",
            """
            mkdir '\(mount)' && mount -t tmpfs -o size=2M none '\(mount)'
            export SWKVM_HOME='\(mount)/home'
            '\(Host.swkvm)' create web --mem 64M --disk-size 1M --ssh-key '\(key)' >/dev/null
            for words in "create copy \(home.directory("base.raw")) --copy --kernel bundled" "clone web other"; do
                head -c 4M /dev/zero >'\(mount)/filler' 2>/dev/null || true
                [ "$words" != "${words#clone}" ] || dd if=/dev/null of='\(mount)/filler' bs=1 seek=64k 2>/dev/null
                s=0; '\(Host.swkvm)' $words || s=$?; echo "status=$s"
                ls -A '\(mount)/home/machines' '\(mount)/home/definitions' | sed '/^$/d'
            done
            # With a full disk, it starts, stops and is deleted all the same.
            head -c 4M /dev/zero >'\(mount)/filler' 2>/dev/null || true
            '\(Host.swkvm)' delete web
            ls -A '\(mount)/home/machines' '\(mount)/home/definitions' | sed '/^$/d'
            """,
        ])
        #expect(try program.waitForEnd() == .status(0), "\(program.story)")
        let text = program.output.text
        #expect(text.contains("status=1\n"), "\(program.story)")
        #expect(!text.contains("copy") && !text.contains("other"), "\(program.story)")
        #expect(text.contains("web: deleted"), "\(program.story)")
        #expect(program.errors.text.contains("No space left on device"), "\(program.story)")
    }
}
