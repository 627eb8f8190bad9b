/// The first Swift that runs, in ring 3 on the boot processor: entry.S comes straight here.
@c(kernelMain)
func kernelMain(_ startInfo: UInt64) -> Never {
    let boot = BootInformation(at: startInfo)
    Console.start()
    if !boot.has("quiet") { Console.print("swkvm guest") }
    if boot.value("test").map({ $0 == "none" }) ?? false || boot.value("bench").map({ $0 == "boot" }) ?? false { Power.off() }
    Console.print("\(boot.memory >> 20) MiB, \(boot.words.count) words, rsdp \(hex: boot.rootPointer)")
    for w in boot.words { Console.print(w) }
    clock.start(); acpi.start(rootPointer: boot.rootPointer); interrupts.start(); Console.print("\(clock.frequency) \(clock.source) \(interrupts.timerFrequency)"); Console.print("\(processors.start()) silent of \(acpi.processors.count)"); interrupts.setPeriodicTimer(frequency: 1000); interrupts.wait { interrupts.counts[48] >= 100 };let p = processors.others[0]; let t = timestamp(); processors.ask(p, .count, 0x20000); Console.print("\(processors.result(p) ?? 99) \(timestamp() - t)")
    Power.exit(5)
}

