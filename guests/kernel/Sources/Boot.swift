// SPDX-License-Identifier: Apache-2.0

/// The first Swift code, called by entry.S in ring 3 on the boot processor.
@c(kernelMain)
func kernelMain(_ startInfo: UInt64) -> Never {
    var boot = BootInformation(at: startInfo)
    Console.start()
    if !boot.has("quiet") { Console.hello("swkvm guest\r\n") }
    if boot.has("test=none") || boot.has("bench=boot") { Power.off() }

    boot.takeMemory()
    PageTables.complete(memoryEnd: boot.memoryEnd)
    clock.start()
    acpi.start(rootPointer: boot.rootPointer)
    interrupts.start()
    PowerButton.start()
    if let crash = boot.value("crash") { Crash.now(crash) }
    devices.start(boot)

    if let tests = boot.value("test") { SelfTest.run(tests, boot) }
    if let benches = boot.value("bench") { Bench.run(benches, boot) }
    let shell = Shell(boot)
    if let commands = boot.value("run") {
        for command in commands.split(UInt8(ascii: ";")) { shell.run(command) }
        Power.off()
    }
    shell.prompt()
}

/// The page tables of the image use 1 GiB pages beyond the first GiB. A CPU without them gets 2 MiB pages for its RAM
/// here.
enum PageTables {
    private static let gib: UInt64 = 1 << 30
    private static let table: UInt64 = 0x67  // present, writable, user, accessed, dirty
    private static let large: UInt64 = 0x80

    static func complete(memoryEnd: UInt64) {
        let oneGiBPages: UInt32 = 1 << 26
        guard CPUID(0x8000_0001).edx & oneGiBPages == 0 else { return }
        let devices: UInt64 = 3
        for index in 1..<max(min((memoryEnd + gib - 1) / gib, 512), 2) where index != devices {
            guard let directory = unsafe pages.allocate() else { return }
            for entry in UInt64(0)..<512 { directory.store(index * gib + entry << 21 + table + large, entry * 8) }
            Core.pageDirectoryPointers.store(directory.value + table, index * 8)
        }
        reloadPageTables()
    }
}

/// `crash=` on the command line and the shell's `crash`: ends that a monitor must distinguish.
enum Crash {
    static func now(_ kind: Text) {
        switch kind {
        case "triple": crashByTripleFault()
        case "internal":
            crashByInternalError()
            Console.print("crash: ring 0 runs natively here: nothing happened")
        case "null": Address(0).store(UInt64(1))
        case "panic": panic("requested")
        default: Console.print("usage: crash triple | internal | null | panic")
        }
    }

    /// Ends the machine with a message.
    static func panic(_ reason: Text) -> Never {
        Console.print("panic: \(reason)")
        Power.exit(ExitStatus.panic)
    }
}
