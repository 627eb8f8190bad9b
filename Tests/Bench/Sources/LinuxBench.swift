// SPDX-License-Identifier: Apache-2.0

/// (f) A Linux guest from the start of the monitor to power-off, with a user space of one system call.
enum LinuxBench {
    static func run(_ setup: Setup, kernel: String) throws -> [Row] {
        let initrd = "\(setup.work)/initrd"
        try writeFile(initrd, archive(try readFile("\(setup.programs)/init")))
        // Quiet, like the bundled guest; the serial port prints the line "reboot: Power down".
        let line = "console=ttyS0 quiet rdinit=/init panic=-1"
        let swkvm = setup.run(["--kernel", kernel, "--initrd", initrd, "--cmdline", line])
        let qemu = setup.qemu(["-kernel", kernel, "-initrd", initrd, "-append", line], acpi: true)
        let seconds = try interleave(
            setup.runs,
            [swkvm, qemu].map { words in
                { try Child.run(words, wanted: "reboot: Power down").end.total }
            }
        ).map { Sample($0.map { $0 * 1e3 }) }
        return [
            Row(
                name: "Linux, start → power-off", unit: "ms", ours: seconds[0], peer: ("QEMU microvm", seconds[1]),
                goal: .atMost(0.9))
        ]
    }

    /// A cpio archive in the "newc" format with /dev/console and /init.
    static func archive(_ program: [UInt8]) -> [UInt8] {
        var bytes: [UInt8] = []
        func pad() { bytes += [UInt8](repeating: 0, count: -bytes.count & 3) }
        func add(_ name: String, mode: Int, _ content: [UInt8] = [], device: (Int, Int) = (0, 0)) {
            let fields = [
                bytes.count + 1, mode, 0, 0, 1, 0, content.count, 0, 0, device.0, device.1, name.utf8.count + 1, 0,
            ]
            bytes += "070701".utf8
            for field in fields {
                let digits = String(field, radix: 16)
                bytes += (String(repeating: "0", count: 8 - digits.count) + digits).utf8
            }
            bytes += name.utf8 + [0]
            pad()
            bytes += content
            pad()
        }
        add("dev", mode: 0o040755)
        add("dev/console", mode: 0o020600, device: (5, 1))
        add("init", mode: 0o100755, program)
        add("TRAILER!!!", mode: 0)
        return bytes
    }
}
