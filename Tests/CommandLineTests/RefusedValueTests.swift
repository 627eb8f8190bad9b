// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import TestSupport
import Testing

@testable import swkvm

/// A value that is refused is answered with what is wanted.
@Suite(.timed) struct RefusedValueTests {
    private static let nonsense = "no?such?value"

    private func message(_ words: [String]) -> String {
        do { _ = try Command.parseAsRoot(words) } catch { return Command.message(for: error) }
        return ""
    }

    /// Every option and argument of every command, hidden ones included.
    @Test func everyOptionSaysWhatItWants() throws {
        var refusals = 0
        for (path, command) in try CommandTree.whole().all() {
            for argument in command.arguments ?? [] where argument.kind == "option" {
                let name = try #require(argument.names?.first).spelling
                refusals += check(path + [name, Self.nonsense])
            }
            // Arguments without names: all of them are nonsense.
            let places = (command.arguments ?? []).filter { $0.kind == "positional" }.count
            if places > 0 { refusals += check(path + Array(repeating: Self.nonsense, count: places)) }
        }
        // Formats, numbers, sizes …
        #expect(refusals > 40)
    }

    private func check(_ words: [String]) -> Int {
        let message = message(words)
        guard message.contains("is invalid for") else { return 0 }
        #expect(message.contains("expected") || message.contains("Please provide one of"), "\(words): \(message)")
        return 1
    }

    @Test(arguments: [
        (["run", "--cpus", "two"], "The value 'two' is invalid for '--cpus <n>': expected a whole number"),
        (
            ["run", "--mem", "2X"],
            "The value '2X' is invalid for '--mem <size>': expected a size in bytes, or with K, M, G, T, P or E, as in 512M or 1.5G"
        ),
        (
            ["run", "--console", "tty"],
            "The value 'tty' is invalid for '--console <console>': expected stdio, none, pty, unix:PATH or file:PATH"
        ),
        (
            ["run", "--gdb", "host:1"],
            "The value 'host:1' is invalid for '--gdb <port|unix:path>': the debugger port is on 127.0.0.1 only; expected a port or unix:PATH"
        ),
        (
            ["run", "--gdb", "65536"],
            "The value '65536' is invalid for '--gdb <port|unix:path>': expected a port, 0 to 65535, or unix:PATH"
        ),
        (
            ["run", "--mem", "2048"],
            "The value '2048' is invalid for '--mem <size>': a size without a unit is in bytes; did you mean 2048M?"
        ),
        (
            ["run", "--mem", "4096"],
            "The value '4096' is invalid for '--mem <size>': a size without a unit is in bytes; did you mean 4096M?"
        ),
        (
            ["run", "--numa", "mem=2048"],
            "The value 'mem=2048' is invalid for '--numa <node>': mem=2048: a size without a unit is in bytes; did you mean 2048M?"
        ),
        (
            ["run", "--numa", "mem=foo"],
            "The value 'mem=foo' is invalid for '--numa <node>': mem=foo: expected a size in bytes, or with K, M, G, T, P or E, as in 512M or 1.5G"
        ),
        (
            ["run", "--disk", "path=/nowhere/d.qcow2"],
            "The value 'path=/nowhere/d.qcow2' is invalid for '--disk <disk>': disk path=/nowhere/d.qcow2: expected PATH first, without 'path=': /nowhere/d.qcow2"
        ),
        (
            ["run", "file=/nowhere/d.raw,format=raw"],
            "The value 'file=/nowhere/d.raw,format=raw' is invalid for '<image>': disk file=/nowhere/d.raw: expected PATH first, without 'file=': /nowhere/d.raw"
        ),
        (
            ["run", "--disk", "size=10G"],
            "The value 'size=10G' is invalid for '--disk <disk>': disk size=10G: expected PATH first; `swkvm image create` creates"
        ),
        (
            ["image", "create", "z.raw", "16E"],
            "The value '16E' is invalid for '<size>': it is too large; expected a size below 16E"
        ),
        (
            ["image", "create", "z.raw", "18446744073709551616"],
            "The value '18446744073709551616' is invalid for '<size>': it is too large"
        ),
        (["image", "create", "a.raw", "big"], "The value 'big' is invalid for '<size>': expected a size in bytes"),
        (
            ["image", "resize", "a.raw", "+x"],
            "The value '+x' is invalid for '<size>': expected a size, or + or - and a size: 20G, 1.5T, +5G, -512M"
        ),
        (
            ["image", "bench", "--pattern", "256", "a.raw"],
            "The value '256' is invalid for '--pattern <n>': expected a whole number, 0 to 255"
        ),
        (
            ["image", "bench", "--count", "-", "a.raw"],
            "The value '-' is invalid for '--count <n>': expected a whole number, 0 or more"
        ),
        (
            ["image", "create", "-o", "lazy_refcounts=perhaps", "a.qcow2", "1G"],
            "The value 'lazy_refcounts=perhaps' is invalid for '-o <word=value,...>': lazy_refcounts=perhaps is not recognized; expected on or off"
        ),
        (
            ["image", "create", "-o", "frob=1", "a.qcow2", "1G"],
            "The value 'frob=1' is invalid for '-o <word=value,...>': 'frob' is not recognized; expected cluster_size"
        ),
    ])
    func sentences(words: [String], sentence: String) {
        #expect(message(words).hasPrefix(sentence), "\(message(words))")
    }

    /// The defaults that the help states are those that are used.
    @Test func defaultsAreStatedAndTrue() throws {
        let commands: [(path: [String], with: [String])] = [
            (["run"], []), (["image", "bench"], ["a.raw"]), (["image", "create"], ["a.raw", "1G"]),
            (["image", "convert"], ["a.raw", "b.raw"]),
        ]
        for (path, operands) in commands {
            let command = try #require(try CommandTree.whole().all().first { $0.path == path }?.command)
            let unstated = "\(try Command.parseAsRoot(path + operands))"
            for argument in command.arguments ?? [] where argument.kind == "option" {
                guard let text = argument.abstract, let start = text.firstRange(of: "(default: ")?.upperBound else {
                    continue
                }
                let value = String(text[start...].prefix { $0 != ")" })
                let name = try #require(argument.names?.last).spelling
                // What comes of it is the same as without.
                let stated = "\(try Command.parseAsRoot(path + [name, value] + operands))"
                #expect(stated == unstated || name == "--name", "\(path) \(name) \(value)")
            }
        }
    }
}
