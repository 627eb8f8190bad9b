/// The first Swift that runs, in ring 3 on the boot processor: entry.S comes straight here.
@c(kernelMain)
func kernelMain(_ startInfo: UInt64) -> Never {
    let boot = BootInformation(at: startInfo)
    Console.start()
    if !boot.has("quiet") { Console.print("swkvm guest") }
    if boot.value("test").map({ $0 == "none" }) ?? false || boot.value("bench").map({ $0 == "boot" }) ?? false { Power.off() }
    Console.print("\(boot.memory >> 20) MiB, \(boot.words.count) words, rsdp \(hex: boot.rootPointer)")
    for w in boot.words { Console.print(w) }
    Power.exit(5)
}

@c(processorMain)
func processorMain(_ argument: UInt64) -> Never {
    while true { idle() }
}
