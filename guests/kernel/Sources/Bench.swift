// SPDX-License-Identifier: Apache-2.0

/// Measurements in the guest. One line each: `bench NAME VALUE UNIT`.
enum Bench {
    static func run(_ names: Text, _ boot: BootInformation) -> Never {
        for name in names.split(UInt8(ascii: ",")) { run(one: name, boot) }
        Power.exit(0)
    }

    static func run(one name: Text, _ boot: BootInformation) {
        switch name {
        case "exits": exits()
        case "blk":
            if devices.disks.isEmpty { Console.print("bench blk: no disk") }
            for disk in devices.disks { block(disk) }
        case "net":
            if devices.interfaces.isEmpty { Console.print("bench net: no network device") }
            for interface in devices.interfaces { network(interface, boot) }
        case "all":
            for name: Text in ["exits", "blk", "net"] { run(one: name, boot) }
        default: Console.print("usage: bench exits | blk | net | all")
        }
    }

    private static func report(_ name: Text, _ value: UInt64, _ unit: StaticString) {
        Console.print("bench \(name) \(value) \(unit)")
    }

    private static func rate(_ count: UInt64, _ span: Nanoseconds) -> UInt64 {
        count &* (seconds / 1000) / max(span / 1000, 1)  // in microseconds: no overflow below 10¹³
    }

    // MARK: Exits

    /// Round trips per second to the handlers of a port, an MMIO register and a queue's notification.
    private static func exits() {
        let unusedPort: UInt16 = 0x80
        let rounds = 20_000
        measure("exits.port-read", rounds) { _ = readPort8(unusedPort) }
        measure("exits.port-write", rounds) { writePort8(unusedPort, 0) }
        let string = Core.bootBlock  // any 256 bytes
        measure("exits.port-write-ring0", rounds, each: 256) { string.output(count: 256, to: unusedPort) }
        measure("exits.service", rounds) { reloadPageTables() }
        guard let registers = (devices.disks.first?.device ?? devices.interfaces.first?.driver.device)?.registers else {
            return
        }
        measure("exits.mmio-read", rounds) { _ = registers.load(VirtioMMIO.Register.magic) as UInt32 }
        measure("exits.mmio-write", rounds) { registers.store(UInt32(0), VirtioMMIO.Register.queueSelect) }
        measure("exits.notify", rounds) { registers.store(UInt32(0), VirtioMMIO.Register.queueNotify) }
    }

    private static func measure(_ name: Text, _ rounds: Int, each: Int = 1, _ body: () -> Void) {
        let calls = rounds / each
        for _ in 0..<(calls / 10) { body() }
        let start = clock.now
        for _ in 0..<calls { body() }
        report(name, rate(UInt64(calls * each), clock.now - start), "1/s")
    }

    // MARK: Block requests

    private static func block(_ disk: Disk) {
        let small: UInt64 = 4096
        let large: UInt64 = 128 << 10
        run(disk, "rand-read-4k-q1", size: small, depth: 1, random: true)
        run(disk, "rand-read-4k-q32", size: small, depth: 32, random: true)
        run(disk, "seq-read-128k-q1", size: large, depth: 1, random: false)
        run(disk, "seq-read-128k-q8", size: large, depth: 8, random: false)
    }

    /// Keeps `depth` reads in flight for half a second.
    private static func run(_ disk: Disk, _ name: StaticString, size: UInt64, depth: Int, random: Bool) {
        let sectors = size / Disk.sectorSize
        guard disk.capacity >= sectors,
            let memory = unsafe pages.allocate(pages: UInt64(depth) * size / PageAllocator.pageSize)
        else { return }
        defer { unsafe pages.release(memory, pages: UInt64(depth) * size / PageAllocator.pageSize) }
        let places = disk.capacity / sectors
        var state: UInt64 = 0x1234_5678_9abc_def1
        var position: UInt64 = 0
        func nextSector() -> UInt64 {
            if random {
                state ^= state << 13
                state ^= state >> 7
                state ^= state << 17
                return state % places * sectors
            }
            defer { position = (position + 1) % places }
            return position * sectors
        }

        var slots = [UInt16?](repeating: nil, count: depth)
        var completed: UInt64 = 0
        var failed: UInt64 = 0
        let start = clock.now
        let end = start + seconds / 2
        func refill() -> Int {
            var inFlight = 0
            for index in 0..<depth {
                if let slot = slots[index] {
                    guard let outcome = disk.take(slot) else {
                        inFlight += 1
                        continue
                    }
                    slots[index] = nil
                    completed += 1
                    if outcome != Disk.Outcome.ok { failed += 1 }
                }
                if clock.now < end {
                    let place = Segment(address: memory + UInt64(index) * size, length: UInt32(size))
                    slots[index] = disk.submit(.read, sector: nextSector(), place)
                    if slots[index] != nil { inFlight += 1 }
                }
            }
            disk.notify()
            return inFlight
        }
        interrupts.wait(until: end + 10 * seconds) { refill() == 0 && clock.now >= end }
        let span = clock.now - start
        report("blk.\(disk.name).\(name)", rate(completed, span), "1/s")
        report("blk.\(disk.name).\(name).bytes", rate(completed * size, span) >> 20, "MiB/s")
        if failed > 0 { report("blk.\(disk.name).\(name).failed", failed, "requests") }
    }

    // MARK: Packets

    private static func network(_ interface: NetworkInterface, _ boot: BootInformation) {
        for size in [60, 1514] { transmit(interface.driver, size: size) }
        guard interface.address != .any,
            let peer = boot.value("peer").flatMap({ IPv4Address($0) })
                ?? (interface.gateway == .any ? nil : interface.gateway)
        else { return }
        var count: UInt64 = 0
        let start = clock.now
        while clock.now - start < seconds / 2 {
            guard interface.ping(peer, sequence: UInt16(truncatingIfNeeded: count)) != nil else { break }
            count += 1
        }
        report("net.\(interface.name).echo", rate(count, clock.now - start), "1/s")
    }

    /// Sends frames of a local experimental type, which nobody receives, for half a second, sixteen for each
    /// notification.
    private static func transmit(_ driver: NetworkDevice, size: Int) {
        var frame: [UInt8] = [0x02, 0, 0, 0, 0, 1]
        frame += driver.mac
        frame += [0x88, 0xb5]
        frame += [UInt8](repeating: 0x5a, count: size - frame.count)
        let before = driver.sent
        let start = clock.now
        while clock.now - start < seconds / 2 {
            for _ in 0..<16 where !driver.send(frame, notify: false) { break }
            driver.flush()
        }
        let count = driver.sent - before
        report("net.\(driver.name).send-\(UInt64(size))", rate(count, clock.now - start), "1/s")
    }
}
