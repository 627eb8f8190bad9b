// SPDX-License-Identifier: Apache-2.0

import Linux
import TestSupport
import Testing

/// A kernel, an initrd or a command line that cannot be booted.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct KernelRefusalTests: BadInputSuite {
    let directory: TemporaryDirectory
    let host: Namespace

    init() throws {
        directory = try TemporaryDirectory()
        host = try Namespace()
    }

    @Test func kernelMissing() throws {
        try expectRefused(
            ["--kernel", directory("none")], "cannot read \(directory("none")): No such file or directory",
            status: Status.input)
    }

    @Test func kernelIsADirectory() throws {
        try expectRefused(["--kernel", directory.path], "cannot read \(directory.path): ", status: Status.input)
    }

    /// Wherever it is cut.
    @Test func kernelTruncated() throws {
        let whole = try readFile(Host.guestKernel, limit: 16 << 20)
        for size in [whole.count - whole.count / 3, whole.count / 2, 4096, 200, 100, 63, 20] {
            let kernel = try directory.write(whole[..<size], to: "kernel")
            try expectRefused(["--kernel", kernel], "\(kernel) is ", status: Status.input)
        }
    }

    @Test func kernelEmpty() throws {
        let kernel = try directory.write([], to: "kernel")
        try expectRefused(
            ["--kernel", kernel], "\(kernel) is not a kernel: expected an ELF file or a Linux bzImage",
            status: Status.input)
    }

    @Test func kernelForAnotherProcessor() throws {
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.deaf, machine: 183), to: "kernel")
        try expectRefused(
            ["--kernel", kernel], "\(kernel) is an ELF for AArch64 (machine 183); expected x86-64 (machine 62)",
            status: Status.input)
    }

    @Test func kernelIsNoELF() throws {
        let kernel = try directory.write(
            Array("#!/bin/sh\n".utf8) + [UInt8](repeating: 0x20, count: 5000), to: "kernel")
        try expectRefused(
            ["--kernel", kernel], "\(kernel) is not a kernel: expected an ELF file or a Linux bzImage",
            status: Status.input)
    }

    @Test func kernelLargerThanTheMemory() throws {
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.deaf, memorySize: 1 << 30), to: "kernel")
        try expectRefused(
            ["--kernel", kernel, "--mem", "64M"], "\(kernel) does not fit in the guest's memory", status: Status.usage)
    }

    @Test func kernelWhereThePlatformIs() throws {
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.deaf, address: 0x9000), to: "kernel")
        try expectRefused(["--kernel", kernel], "\(kernel) needs ", status: Status.input)
    }

    @Test func initrdMissing() throws {
        try expectRefused(
            ["--kernel", Host.guestKernel, "--initrd", directory("none")],
            "cannot read \(directory("none")): No such file or directory",
            status: Status.input)
    }

    @Test func initrdLargerThanTheMemory() throws {
        try shell("truncate -s 100M '\(directory("initrd"))'")
        try expectRefused(
            ["--kernel", Host.guestKernel, "--initrd", directory("initrd"), "--mem", "64M"],
            "the initrd \(directory("initrd")) of \(100 << 20) bytes does not fit", status: Status.usage)
    }

    @Test func commandLineTooLong() throws {
        try expectRefused(
            ["--cmdline", String(repeating: "x", count: 70_000)], "the kernel's command line has ", status: Status.usage
        )
    }
}
