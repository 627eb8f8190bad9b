// SPDX-License-Identifier: Apache-2.0

/// The prompt on the console.
final class Shell {
    private static let longestInput = 1024

    private let boot: BootInformation
    private var input: [UInt8] = []
    private var interrupted = false
    private var editor = LineEditor(prompt: "> ")

    init(_ boot: BootInformation) { self.boot = boot }

    /// Reads lines and runs them, forever.
    func prompt() -> Never {
        Console.handleInterrupt { [self] in receive() }
        Console.listen()
        receive()  // input that came before
        Console.print(
            "\(number(max(acpi.processors.count, 1), of: "CPU")), \(boot.memory >> 20) MiB, \(number(devices.disks.count, of: "disk")), \(number(devices.interfaces.count, of: "network interface")); type help"
        )
        while true { run(line()) }
    }

    /// A number and its noun, in the singular for one.
    private func number(_ count: Int, of noun: StaticString) -> Text {
        let ending: StaticString = count == 1 ? "" : "s"
        return "\(count) \(noun)\(ending)"
    }

    /// Takes input. What does not fit stays in the port, whose other side then waits.
    private func receive() {
        while input.count < Self.longestInput, let byte = Console.receive() {
            // It ends the command that runs, and discards the input before it.
            if byte == LineEditor.controlC {
                interrupted = true
                input.removeAll(keepingCapacity: true)
            }
            input.append(byte)
        }
    }

    /// The next line, edited (``LineEditor``).
    private func line() -> Text {
        Console.write(editor.begin())
        while true {
            receive()
            interrupts.wait { !input.isEmpty }
            let bytes = input
            input.removeAll(keepingCapacity: true)
            interrupted = false
            var echo = Text()
            for (index, byte) in bytes.enumerated() {
                guard let line = editor.take(byte, echo: &echo) else { continue }
                Console.write(echo)
                // The rest belongs to the next line, before the input that came meanwhile.
                input = [UInt8](bytes[(index + 1)...]) + input
                return line
            }
            Console.write(echo)
        }
    }

    /// Waits for `span`; true if Ctrl-C came.
    private func pause(_ span: Nanoseconds) -> Bool { interrupts.wait(until: clock.now + span) { interrupted } }

    func run(_ line: Text) {
        let words = line.split(UInt8(ascii: " "))
        guard let command = words.first else { return }
        do throws(Failure) {
            switch command {
            case "help": help()
            case "mem": memory()
            case "cpus": cpus()
            case "disks": try disks()
            case "read": try read(words)
            case "sum": try sum(words)
            case "write": try write(words)
            case "flood": try flood(words)
            case "net": try network(words)
            case "ping": try ping(words)
            case "tcp": try exchange(words)
            case "echo": Console.print(Text(line.bytes.dropFirst(5)))
            case "bench": Bench.run(one: words.count > 1 ? words[1] : "", boot)
            case "poweroff": Power.off()
            case "exit": try exit(words)
            case "reboot": Power.reset()
            case "panic": Crash.panic("requested")
            case "crash": Crash.now(words.count > 1 ? words[1] : "")
            default: throw Failure("\(command): no such command; type help")
            }
        } catch {
            Console.print(error.reason)
        }
    }

    private func help() {
        Console.write(
            """
            help                          show this list
            mem                           show memory
            cpus                          show CPUs, clock, interrupts
            disks                         show disks
            read DISK SECTOR [COUNT]      show sectors
            sum DISK SECTOR COUNT         print the CRC-32 of sectors
            write DISK SECTOR TEXT        write a sector: the text, then zeroes; or `pattern [COUNT]`
            flood DISK COUNT wait | reset | endless
                                          the largest possible reads: wait for them, reset the device meanwhile, or repeat
            net                           show network interfaces
            net NAME ADDRESS/PREFIX[,GATEWAY] | dhcp
                                          configure an address
            ping ADDRESS [COUNT]          send ICMP echo requests
            tcp ADDRESS PORT [COUNT]      send bytes over TCP to an echo server
            echo TEXT                     print it
            bench exits | blk | net | all run measurements
            exit [STATUS]                 end with a status, 0 to 63; without one, power off
            poweroff, reboot              power off, reset
            panic                         panic: end with status 63
            crash triple | internal | null | panic
                                          crash in this way

            """)
    }

    private func exit(_ words: [Text]) throws(Failure) {
        guard words.count > 1 else { Power.off() }
        guard words.count == 2, let status = words[1].number, status < 64 else {
            throw Failure("usage: exit [STATUS], 0 to 63")
        }
        Power.exit(Int(status))
    }

    private func memory() {
        let (longest, size) = unsafe pages.longest
        Console.print(
            "\(boot.memory >> 10) KiB RAM, \(unsafe pages.free >> 10) KiB free, longest run \(size >> 10) KiB at 0x\(hex: longest.value)"
        )
        Console.print("kernel 0x100000 – 0x\(hex: Core.imageEnd.value)")
    }

    private func cpus() {
        let silent = processors.start()
        Console.print("CPU \(LocalAPIC.identifier): this one")
        for processor in processors.others {
            processors.ask(processor, .count, scratchWord())
            let done = processors.result(processor) != nil
            Console.print("CPU \(processor.identifier): \(done ? "works" : "does not respond" as StaticString)")
        }
        if silent > 0 { Console.print("\(silent) did not start") }
        Console.print(
            "clock \(clock.frequency / 1_000_000) MHz by \(clock.source), timer \(interrupts.timerFrequency / 1_000_000) MHz"
        )
        for (line, count) in interrupts.counts.enumerated() where count > 0 {
            Console.print("interrupt line \(line): \(count)")
        }
    }

    private func scratchWord() -> UInt64 { (Core.bootBlock + Core.pendingOffset + 8).value }

    private func disks() throws(Failure) {
        for disk in devices.disks {
            let access: StaticString = disk.isReadOnly ? "read-only" : "read-write"
            let identifier = try disk.identifier()
            Console.print(
                "\(disk.name): \(disk.capacity) sectors, \(access), blocks of \(disk.blockSize), queues \(disk.queues.count), features 0x\(hex: disk.features.rawValue), id '\(identifier)', \(disk.completed) requests"
            )
        }
    }

    private func diskAndSector(_ words: [Text], _ usage: StaticString) throws(Failure) -> (Disk, UInt64) {
        guard words.count >= 3, let sector = words[2].number else { throw Failure("usage: \(usage)") }
        guard let disk = devices.disk(words[1]) else { throw Failure("\(words[1]): no such disk") }
        return (disk, sector)
    }

    private func read(_ words: [Text]) throws(Failure) {
        let (disk, sector) = try diskAndSector(words, "read DISK SECTOR [COUNT]")
        for offset in 0..<(words.count > 3 ? words[3].number ?? 1 : 1) {
            let data = try disk.read(sector: sector &+ offset)
            dump(data.bytes(512), from: (sector &+ offset) &* 512)
        }
    }

    private func dump(_ bytes: [UInt8], from start: UInt64) {
        for row in stride(from: 0, to: bytes.count, by: 16) {
            var line: Text = "\(hex: start &+ UInt64(row), width: 8) "
            var letters = Text()
            for byte in bytes[row..<min(row + 16, bytes.count)] {
                line.append(" \(hex: UInt64(byte), width: 2)")
                letters.append(byte >= 0x20 && byte < 0x7f ? byte : UInt8(ascii: "."))
            }
            Console.print("\(line)  \(letters)")
        }
    }

    private func sum(_ words: [Text]) throws(Failure) {
        let (disk, start) = try diskAndSector(words, "sum DISK SECTOR COUNT")
        guard words.count == 4, let count = words[3].number else { throw Failure("usage: sum DISK SECTOR COUNT") }
        var crc = CRC32()
        var sector = start
        var left = count
        while left > 0 {
            let chunk = min(left, Disk.bufferSize / Disk.sectorSize)
            crc.add(try disk.read(sector: sector, count: chunk), count: chunk * Disk.sectorSize)
            sector &+= chunk
            left -= chunk
        }
        Console.print("crc32 \(disk.name) \(start) \(count) \(hex: UInt64(crc.value), width: 8)")
    }

    private func write(_ words: [Text]) throws(Failure) {
        let usage: StaticString = "write DISK SECTOR TEXT | pattern [COUNT]"
        let (disk, sector) = try diskAndSector(words, usage)
        guard words.count >= 4, let page = unsafe pages.allocate() else { throw Failure("usage: \(usage)") }
        defer { unsafe pages.release(page, pages: 1) }
        if words[3] == "pattern" {
            let count = words.count > 4 ? words[4].number ?? 1 : 1
            for offset in 0..<count {
                for place in stride(from: UInt64(0), to: 512, by: 8) {
                    page.store(Pattern.word((sector &+ offset) &* 512 &+ place, 0), place)
                }
                try disk.write(sector: sector &+ offset, count: 1, from: page)
            }
        } else {
            var text = words[3]
            for word in words[4...] { text.append(" \(word)") }
            page.fill(count: 512)
            page.write([UInt8](text.bytes.prefix(512)))
            try disk.write(sector: sector, count: 1, from: page)
        }
        try disk.flush()
        Console.print("written")
    }

    private func flood(_ words: [Text]) throws(Failure) {
        let purpose: Flood.Purpose? =
            switch words.count == 4 ? words[3] : "" {
            case "wait": .wait
            case "reset": .reset
            case "endless": .endless
            default: nil
            }
        guard let purpose, let count = words[2].number, (1...256).contains(count) else {
            throw Failure("usage: flood DISK COUNT wait | reset | endless, with a COUNT of 1 to 256")
        }
        guard let disk = devices.disk(words[1]) else { throw Failure("\(words[1]): no such disk") }
        try Flood(disk).run(UInt16(count), purpose)
    }

    private func network(_ words: [Text]) throws(Failure) {
        if words.count == 3 {
            guard let interface = devices.interfaces.first(where: { $0.name == words[1] }) else {
                throw Failure("\(words[1]): no such interface")
            }
            let done = words[2] == "dhcp" ? interface.configureByDHCP() : interface.configure(words[2])
            if !done { throw Failure("\(words[2]): no address") }
        }
        for interface in devices.interfaces {
            let driver = interface.driver
            let link: StaticString = driver.linkIsUp ? "up" : "down"
            Console.print(
                "\(driver.name): MAC \(macText(driver.mac)), link \(link), MTU \(driver.mtu), \(interface.address.text)/\(interface.prefix), gateway \(interface.gateway.text)"
            )
            Console.print("\(driver.name): received \(driver.received), sent \(driver.sent), dropped \(driver.dropped)")
            if driver.pairs.count > 1 {
                for (number, pair) in driver.pairs.enumerated() {
                    Console.print("\(driver.name): queues \(number): received \(pair.received), sent \(pair.sent)")
                }
            }
        }
    }

    private func exchange(_ words: [Text]) throws(Failure) {
        guard words.count >= 3, let target = IPv4Address(words[1]), let port = words[2].number, port > 0, port < 65536
        else {
            throw Failure("usage: tcp ADDRESS PORT [COUNT]")
        }
        guard let interface = devices.interfaces.first(where: { $0.address != .any }) else {
            throw Failure("no interface has an address")
        }
        let count = Int(min(words.count > 3 ? words[3].number ?? 4096 : 4096, 1 << 20))
        var bytes: [UInt8] = []
        bytes.reserveCapacity(count)
        for index in 0..<count { bytes.append(UInt8(truncatingIfNeeded: index &* 7 &+ index >> 8)) }
        let same = try interface.exchange(bytes: bytes, with: target, port: UInt16(port))
        Console.print("\(same) of \(count) bytes came back")
    }

    private func ping(_ words: [Text]) throws(Failure) {
        guard words.count >= 2, let target = IPv4Address(words[1]) else { throw Failure("usage: ping ADDRESS [COUNT]") }
        guard let interface = devices.interfaces.first(where: { $0.address != .any }) else {
            throw Failure("no interface has an address")
        }
        let count = words.count > 2 ? words[2].number ?? 4 : 4
        var answered: UInt64 = 0
        for sequence in 1...max(count, 1) {
            if let span = interface.ping(target, sequence: UInt16(truncatingIfNeeded: sequence)) {
                answered += 1
                Console.print("\(target.text): echo \(sequence), \(span / 1000) us")
            } else {
                Console.print("\(target.text): no reply to \(sequence)")
            }
            if interrupted || (sequence < count && pause(200 * milliseconds)) { break }
        }
        if interrupted {
            // The key was handled, and is not part of the next line.
            interrupted = false
            if input.first == LineEditor.controlC { input.removeFirst() }
        }
        Console.print("\(answered) of \(count) came back")
    }
}
