// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

/// `swkvm image bench`.
@Suite(.timed) struct ImageBenchTests: ImageCommandSuite {
    let directory: TemporaryDirectory

    init() throws { directory = try Self.makeDirectory() }

    @Test func benches() throws {
        #expect(try image("convert disk.raw disk.qcow2").status == .status(0))
        for options in [
            "", "--random --depth 1", "--no-ring -s 64K", "--cache none -S 8K",
            "--write --flush-interval 100 --pattern 7",
        ] {
            let result = try image("bench --count 1000 \(options) disk.qcow2")
            #expect(
                result.status == .status(0) && result.output.hasPrefix("Sending 1000 ")
                    && result.output.contains("\nRun completed in "), "\(options): \(result)")
        }
        try shell(
            "cd '\(directory.path)' && qemu-img check -q disk.qcow2 && qemu-io -r -c 'read -P 7 0 4000k' disk.qcow2 | grep -qv rror"
        )
        try expectRefused("bench -s 16M disk.raw", "requests of 16777216 bytes")
    }

    /// The image has 128 MiB of tables, and the cache 32 MiB. The program has 64 MiB of address space, stack excluded.
    @Test func memoryDoesNotGrowWithTheImage() throws {
        #expect(try image("create -q --preallocation metadata large.qcow2 1T").status == .status(0))
        for options in ["", "--write"] {
            let result = try image(
                "bench --random --count 20000 --depth 16 \(options) large.qcow2", limits: "ulimit -v 65536;")
            #expect(result.status == .status(0) && result.output.contains("\nRun completed in "), "\(result)")
        }
    }
}
