// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import TestSupport
import Testing

@testable import swkvm

/// `swkvm run` is parsed without the argument parser where that is possible: what it means must not depend on the way.
@Suite(.timed) struct DirectParseTests {
    /// For each option values that it takes, and some that it does not.
    private static let values: [String: [String]] = [
        "name": ["web", "", "a b", "ä"], "uuid": ["none", "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "x"],
        "cpus": ["1", "4", "0", "-1", "two", "+3"],
        "mem": ["2G", "1.5G", "4096", "2Gi", "x", "-5", ""], "hugepages": ["2M", "1G", "thp", "THP", "off", "4K", ""],
        "prealloc": ["yes"], "shared": [""],
        "numa": ["mem=64M,cpus=0", "mem=32M", "cpus=1", "mem=1G,distance=1:20"],
        "kernel": ["vmlinux", "bundled", "./bundled", "a=b", "-"],
        "boot": ["default", "list", "2", "a title", ""], "append": ["quiet", "a=b c", "", "-x"],
        "firmware": ["bios.bin", "a,,b", "a=b", "a,vars=b", ""],
        "initrd": ["initrd.img"], "cmdline": ["quiet", "test=all root=/dev/vda1", "", "-x", "--mem 1G"],
        "cmdline-raw": ["quiet", "a=b=c"],
        "bus": ["mmio", "pci", "isa"], "discovery": ["acpi", "cmdline", "dtb"],
        "virtqueues": ["split", "packed"],
        "disk": [
            "a.raw", "b.qcow2,ro", "c=d.raw", "e,,f.raw", "g.raw,serial=123,queues=2", "h.raw,queues=99", "",
            "i,key-fd=7", "j,bps=10M,bps-burst=1M,iops=500", "k,iops-burst=5", "l,bps=0", "m,iops=1.5",
        ],
        "net": [
            "nat", "nat=lab,mtu=1400", "nat=Lab", "bridge=b0", "macvtap=e0", "netns=a", "tap=t9,netns=a",
            "tap=t0", "tap=t1,bridge=b0,create,mac=52:54:00:12:34:56", "fd=5", "fd=1", "tap=", "tap=t2,offload=off",
            "tap=t3,queues=4", "tap=t4,queues=9", "fd=5:6:7", "fd=5:", "fd=8:9,queues=3", "fd=5:5",
            "tap=t5,mac-lock=on", "tap=t6,mac-lock", "fd=7,rx-bps=1M,tx-pps=1000", "tap=t7,rx-pps-burst=1",
        ],
        "metadata": [
            "m.json", "a,,b", "m,version=2", "m,version=3", "m,address=169.254.1.2", "m,address=10.0.0.1", "m,x", "",
        ],
        "ssh-key": ["id.pub", "a=b.pub", ""], "user": ["alice", "_b-1", "Alice", ""],
        "password-file": ["p", "/dev/fd/3", ""], "hostname": ["web1", "web1.example.org", "-x", "a_b", ""],
        "user-data": ["u", "-"], "meta-data": ["m", ""], "network-config": ["n", ""],
        "vsock": [
            "cid=3,path=v.sock", "cid=2,path=v", "cid=3", "path=v", "cid=3,path=", "cid=3,path=a,,b", "cid=x,path=v",
            "",
        ],
        "rng": ["max-bytes=1K,period=100", "max-bytes=0", "period=5", "what"],
        "balloon": ["256M", "0", "target=64M,stats=5", "reporting=on,hinting=off", "4G", "12", "stats=x", "what", ""],
        "console": [
            "stdio", "pty", "unix:/tmp/s", "file:x", "tty", "file:x,size=1M,keep=2", "file:a,,b", "pty,bps=9600",
            "stdio,size=1M", "file:x,y", "unix:s,log=l", "unix:s,log=l,size=1M,keep=1", "file:x,log=l", "unix:s,log=",
            "stdio,device=virtio", "pty,device=serial", "pty,device=",
        ],
        "api-sock": ["a.socket", ""], "config-file": ["m.json", ""],
        "daemon": ["messages", "a=b", ""], "pid-file": ["pid", ""],
        "on-reboot": ["restart", "exit", "reset"], "stop-timeout": ["none", "5", "5s", "-1", "99999999"],
        "gdb": ["1234", ":1234", "unix:g", "host:1", "0"],
        "trace": ["exits", "all"], "on-disk-error": ["report", "ignore", "stop", "enospc", "panic"],
        "metrics": ["m.json", "/dev/null"],
        "metrics-format": ["json", "prometheus", "xml"], "metrics-interval": ["1", "86400", "0", "x"],
        "log-level": ["debug", "critical", "loud"],
        "cgroup": [
            "/sys/fs/cgroup/vm", "/sys/fs/cgroup/vm,cpu=1.5,memory=1G,io-weight=50", "a,cpu=0", "a,cpu=1.234",
            "a,memory=x", "",
            "a,weight=5",
        ],
        "sandbox": ["off", "report", "on", "yes", "on,namespaces", "seccomp,landlock", "on,on", "off,user", ""],
        "run-as": ["nobody", "1000:1000", "0:0", "root", "no such user"],
        "log-format": ["text", "json", "yaml"],
    ]

    /// All properties, and whether each has a value.
    private func contents(_ command: RunCommand) -> [String] {
        Mirror(reflecting: command).children.map { "\($0.label ?? ""): \($0.value)" }
    }

    private func parse(_ words: [String]) -> RunCommand? { try? RunCommand.parse(words) }

    @Test func everyDeclaredOptionHasARule() {
        let rules = Set(RunCommand.rules.map(\.name))
        let declared = RunCommand.helpMessage(columns: 10_000).split(separator: "\n").compactMap { line in
            line.hasPrefix("  --") ? line.dropFirst(4).split { $0 == " " || $0 == "[" }.first.map(String.init) : nil
        }
        #expect(rules == Set(declared).subtracting(["version"]))
        #expect(rules == Set(Self.values.keys) && rules.count == RunCommand.rules.count)
    }

    @Test func anEmptyCommandLineIsAllDefaults() throws {
        #expect(contents(try #require(RunCommand(directly: []))) == contents(try RunCommand.parse([])))
    }

    /// One option alone, in both spellings: where the parser takes it, so does the direct way, but for spellings that
    /// only the parser knows.
    @Test(arguments: values.keys.sorted()) func oneOption(name: String) throws {
        var lines = [["--\(name)"]]
        for value in Self.values[name] ?? [] { lines += [["--\(name)", value], ["--\(name)=\(value)"]] }
        var taken = 0
        for line in lines {
            guard let direct = RunCommand(directly: line) else { continue }
            taken += 1
            #expect(contents(direct) == contents(try RunCommand.parse(line)), "\(line)")
        }
        // These need another option.
        let isDependent = name == "initrd" || name == "boot" || name == "metadata" || name.hasPrefix("metrics-")
        #expect(taken > 0 || isDependent)
    }

    @Test func bothWaysAgree() throws {
        var (direct, parsed, refused) = (0, 0, 0)
        let lines = Share.of(UInt64(0)..<4000)
        for seed in lines {
            var generator = SeededGenerator(seed: seed)
            let line = randomLine(&generator)
            let expected = parse(line)
            if let command = RunCommand(directly: line) {
                direct += 1
                #expect(expected.map(contents) == contents(command), "\(line)")
            } else if expected != nil {
                parsed += 1
            } else {
                refused += 1
            }
        }
        // Each of the three kinds of lines was there.
        let least = lines.count / 50
        #expect(
            direct > least && parsed > least && refused > least,
            "\(direct) direct, \(parsed) by the parser only, \(refused) refused")
    }

    private func randomLine(_ generator: inout SeededGenerator) -> [String] {
        let names = Self.values.keys.sorted()
        var line: [String] = []
        for _ in 0..<Int.random(in: 0...6, using: &generator) {
            guard let name = names.randomElement(using: &generator), let values = Self.values[name] else { continue }
            // The first ones are right.
            let count = Int.random(in: 0..<4, using: &generator) == 0 ? values.count : min(2, values.count)
            let value = values[Int.random(in: 0..<count, using: &generator)]
            let isFlag = name == "prealloc" || name == "shared"
            switch Int.random(in: 0..<40, using: &generator) {
            case 0: line.append("--\(name)")
            case 1: line.append(value)
            case 2:
                line.append(
                    ["-h", "--", "-m", "--none", "-", "--help", "--=", "--mem=", "---mem"].randomElement(
                        using: &generator) ?? "")
            case 3..<20 where !isFlag: line.append("--\(name)=\(value)")
            default: line += isFlag ? ["--\(name)"] : ["--\(name)", value]
            }
        }
        return line
    }
}
