// SPDX-License-Identifier: Apache-2.0

/// Breaks the virtio rules one by one. A device may need a reset, refuse the request or ignore it. It must not do what
/// is not allowed, must not access memory outside its buffers, and must work with a correct driver after a reset. The
/// next line of output shows that the monitor still runs.
extension SelfTest {
    /// The outcomes that a test allows.
    enum Expectation {
        /// Any, as long as it works after a reset.
        case survives
        /// Any but a success.
        case refused
        /// A success: unusual, but within the specification.
        case succeeds
        /// This status and no other.
        case status(UInt8)
    }

    func hostile() {
        if devices.disks.isEmpty && devices.interfaces.isEmpty { skip("hostile", "no device") }
        for disk in devices.disks { hostile(disk) }
        for interface in devices.interfaces { hostile(interface) }
    }

    private func hostile(_ disk: Disk) {
        let name: Text = "hostile \(disk.name)"
        var baseline: UInt32 = 0
        check("\(name): a correct driver works before") { () throws(Failure) in baseline = try checksum(disk) }
        guard let driver = makeDriver(disk.device, queue: 0) else { return fail(name, "no memory") }
        let attack = Attack(test: self, driver: driver, name: name) { () throws(Failure) in
            try disk.restart()
            let now = try self.checksum(disk)
            try expect(now == baseline, "sector 0 reads as 0x\(hex: UInt64(now)) instead of 0x\(hex: UInt64(baseline))")
        }
        attack.chains()
        attack.indirectTables()
        attack.ringIndices()
        attack.ringAddresses()
        attack.registers()
        attack.blockRequests(capacity: disk.capacity, isReadOnly: disk.isReadOnly)
        attack.randomChains()
    }

    private func hostile(_ interface: NetworkInterface) {
        for (queue, queueName): (UInt32, StaticString) in [(0, "receive"), (1, "transmit")] {
            let name: Text = "hostile \(interface.name) \(queueName)"
            guard let driver = makeDriver(interface.driver.device, queue: queue) else { return fail(name, "no memory") }
            let attack = Attack(test: self, driver: driver, name: name) { () throws(Failure) in
                try interface.driver.restart()
                try expect(
                    interface.driver.sendAndWait(
                        [UInt8](repeating: 0xff, count: 6) + interface.driver.mac + [0x88, 0xb5]
                            + [UInt8](repeating: 0, count: 46)),
                    "a frame is not sent")
            }
            attack.chains()
            attack.indirectTables()
            attack.ringIndices()
            attack.ringAddresses()
            if queue == 0 { attack.registers() }
            attack.frames(isReceiving: queue == 0)
            attack.randomChains()
        }
    }

    private func makeDriver(_ device: VirtioMMIO, queue: UInt32) -> HostileDriver? {
        do throws(Failure) { return try HostileDriver(device, queue: queue) } catch { return nil }
    }

    private func checksum(_ disk: Disk) throws(Failure) -> UInt32 {
        var crc = CRC32()
        crc.add(try disk.read(sector: 0), count: Disk.sectorSize)
        return crc.value
    }
}

/// The tests for one queue of one device.
struct Attack {
    let test: SelfTest
    let driver: HostileDriver
    let name: Text
    /// A correct driver's initialization and requests.
    let recover: () throws(Failure) -> Void

    private static let outside: UInt64 = 0x7000_0000_0000  // beyond any RAM
    private static let hole: UInt64 = 0xd000_0000  // the devices' addresses
    static let beyond: [(name: StaticString, address: UInt64)] = [
        ("beyond all RAM", outside), ("in the hole below 4 GiB", hole),
        ("that is not canonical", 0x8000_0000_0000_0000),
        ("at the end of 2^64", 0xffff_ffff_ffff_fff0),
    ]

    private var isBlock: Bool { driver.device.kind == .block }
    private static let next = DescriptorFlag.next
    private static let write = DescriptorFlag.write
    private static let indirect = DescriptorFlag.indirect

    /// Initializes the device, runs `body` and checks the outcome.
    func attempt(
        _ what: Text, _ expectation: SelfTest.Expectation, dataLength: UInt64 = 0x4000,
        features: Features = [.ring, .mergeableBuffers],
        _ body: (HostileDriver) throws(Failure) -> Void
    ) {
        test.check("\(name): \(what)") { () throws(Failure) in
            try driver.bringUp(features)
            try body(driver)
            let patient: Bool
            switch expectation {
            case .succeeds, .status: patient = true
            case .survives, .refused: patient = false
            }
            let outcome = driver.outcome(patience: patient ? 10 * seconds : 40 * milliseconds)
            switch expectation {
            case .survives: break
            case .refused:
                if case .completed(Disk.Outcome.ok, _) = outcome { throw Failure("the request succeeded") }
            case .succeeds:
                guard case .completed(Disk.Outcome.ok, _) = outcome else { throw Failure(outcome.text) }
            case .status(let wanted):
                guard case .completed(wanted, _) = outcome else { throw Failure(outcome.text) }
            }
            try expect(driver.untouched(dataLength: dataLength), "the device wrote to memory outside its buffers")
            try recover()
        }
    }

    // MARK: Chains

    func chains() {
        attempt("a chain that is a cycle", .refused) { driver in
            driver.describe(0, driver.header.value, 16, Self.next, next: 1)
            driver.describe(1, driver.data.value, 512, Self.next | Self.write, next: 0)
            driver.submit()
        }
        attempt("a descriptor that is its own next", .refused) { driver in
            driver.describe(0, driver.data.value, 512, Self.next, next: 0)
            driver.submit()
        }
        attempt("a head index out of range", .refused) { driver in
            driver.describeRead()
            driver.offer(HostileDriver.queueSize)
            driver.kick()
        }
        attempt("a head index of 65535", .refused) { driver in
            driver.describeRead()
            driver.offer(0xffff)
            driver.kick()
        }
        attempt("a next index out of range", .refused) { driver in
            driver.describe(0, driver.header.value, 16, Self.next, next: HostileDriver.queueSize)
            driver.submit()
        }
        for (place, address) in Self.beyond {
            attempt("a buffer \(place)", .refused) { driver in
                driver.describeRead()
                driver.describe(0, isBlock ? driver.header.value : address, 16, Self.next, next: 1)
                driver.describe(1, address, 512, Self.next | Self.write, next: 2)
                driver.submit()
            }
        }
        attempt("a buffer whose end wraps around 2^64", .refused) { driver in
            driver.describeRead()
            driver.describe(1, 0xffff_ffff_ffff_f000, 0x2000, Self.next | Self.write, next: 2)
            driver.submit()
        }
        attempt("a buffer of 4 GiB less one byte", .refused) { driver in
            driver.describeRead()
            driver.describe(1, 0xffff_f000, 0xffff_ffff, Self.next | Self.write, next: 2)
            driver.submit()
        }
        for (what, end): (StaticString, UInt64) in [
            ("the end of RAM", test.boot.memoryEnd), ("the beginning of the hole", test.boot.lowMemoryEnd),
        ] {
            attempt("a buffer across \(what)", .refused) { driver in
                driver.describeRead()
                driver.describe(1, end &- 256, 512, Self.next | Self.write, next: 2)
                driver.submit()
            }
        }
        attempt("a buffer from RAM through the hole to RAM", .refused) { driver in
            driver.describeRead()
            driver.describe(1, test.boot.lowMemoryEnd &- 512, 0x4000_0400, Self.next | Self.write, next: 2)
            driver.submit()
        }
        attempt("device-writable before device-readable descriptors", .refused) { driver in
            driver.describe(0, driver.status.value, 1, Self.next | Self.write, next: 1)
            driver.describe(1, driver.header.value, 16)
            driver.submit()
        }
        attempt("a chain of empty buffers", .refused) { driver in
            driver.describe(0, driver.header.value, 0, Self.next, next: 1)
            driver.describe(1, driver.data.value, 0, Self.next | Self.write, next: 2)
            driver.describe(2, driver.status.value, 0, Self.write)
            driver.submit()
        }
        attempt("undefined flags", .survives) { driver in
            driver.describeRead()
            driver.describe(0, driver.header.value, 16, Self.next | 0xfff8, next: 1)
            driver.submit()
        }
    }

    // MARK: Indirect tables

    func indirectTables() {
        attempt("an indirect table without INDIRECT_DESC", .refused, features: []) { driver in
            fillTable(driver)
            driver.describe(0, driver.table.value, 48, Self.indirect)
            driver.submit()
        }
        guard driver.features.contains(.version1),
            driver.device.offeredFeatures & Features.indirectDescriptors.rawValue != 0
        else { return }
        attempt("an indirect table within an indirect table", .refused) { driver in
            fillTable(driver)
            driver.describe(inTable: 1, driver.table.value, 48, Self.indirect)
            driver.describe(0, driver.table.value, 48, Self.indirect)
            driver.submit()
        }
        for (what, length): (StaticString, UInt32) in [("of no length", 0), ("of 24 bytes", 24), ("of 15 bytes", 15)] {
            attempt("an indirect table \(what)", .refused) { driver in
                fillTable(driver)
                driver.describe(0, driver.table.value, length, Self.indirect)
                driver.submit()
            }
        }
        attempt("an indirect table of 4 GiB", .survives) { driver in
            fillTable(driver)
            driver.describe(0, driver.table.value, 0xffff_fff0, Self.indirect)
            driver.submit()
        }
        attempt("an indirect table with a cycle", .refused) { driver in
            driver.describe(inTable: 0, driver.header.value, 16, Self.next, next: 1)
            driver.describe(inTable: 1, driver.header.value, 16, Self.next, next: 0)
            driver.describe(0, driver.table.value, 32, Self.indirect)
            driver.submit()
        }
        attempt("an indirect chain longer than the queue", .survives) { driver in
            let count: UInt64 = 256
            for index in 0..<count {
                driver.describe(
                    inTable: index, driver.header.value, 1, index + 1 < count ? Self.next : 0, next: UInt16(index + 1))
            }
            driver.describe(0, driver.table.value, UInt32(count * 16), Self.indirect)
            driver.submit()
        }
        attempt("a next index beyond the indirect table", .refused) { driver in
            fillTable(driver)
            driver.describe(inTable: 0, driver.header.value, 16, Self.next, next: 3)
            driver.describe(0, driver.table.value, 48, Self.indirect)
            driver.submit()
        }
        attempt("a descriptor both indirect and with a next", .survives) { driver in
            fillTable(driver)
            driver.describe(0, driver.table.value, 48, Self.indirect | Self.next, next: 1)
            driver.describe(1, driver.data.value, 512, Self.write)
            driver.submit()
        }
        for (place, address) in Self.beyond {
            attempt("an indirect table \(place)", .refused) { driver in
                driver.describe(0, address, 48, Self.indirect)
                driver.submit()
            }
        }
    }

    /// The read of `describeRead`, in the table.
    private func fillTable(_ driver: HostileDriver) {
        driver.describe(inTable: 0, driver.header.value, 16, Self.next, next: 1)
        driver.describe(inTable: 1, driver.data.value, 512, Self.next | Self.write, next: 2)
        driver.describe(inTable: 2, driver.status.value, 1, Self.write)
    }

    // MARK: Rings

    func ringIndices() {
        attempt("an available index that jumps beyond the queue", .survives) { driver in
            driver.describeRead()
            for _ in 0..<HostileDriver.queueSize { driver.offer(0) }
            driver.kick(index: HostileDriver.queueSize &+ 1)
        }
        attempt("an available index that jumps by half its range", .survives) { driver in
            driver.describeRead()
            driver.kick(index: 0x8000)
        }
        attempt("an available index that decreases", .survives) { driver in
            driver.describeRead()
            driver.submit()
            _ = driver.outcome()
            driver.kick(index: 0)
        }
        attempt("one chain offered sixteen times at once", .survives) { driver in
            driver.describeRead()
            for _ in 0..<HostileDriver.queueSize { driver.offer(0) }
            driver.kick()
        }
        attempt("many notifications without a buffer", .survives) { driver in
            for _ in 0..<200 { driver.device.notify(queue: driver.queue) }
        }
    }

    func ringAddresses() {
        for (place, address) in Self.beyond {
            for ring in 0..<3 {
                let what: StaticString = ring == 0 ? "descriptors" : ring == 1 ? "an available ring" : "a used ring"
                attempt("\(what) \(place)", .survives) { driver throws(Failure) in
                    try replace(driver, ring: ring, address & ~0xfff)
                }
            }
        }
        attempt("rings that are not aligned", .survives) { driver throws(Failure) in
            driver.device.status = 0
            _ = try driver.device.negotiate(.ring)
            driver.prepareMemory()
            driver.place(driver.descriptors.value + 8, driver.available.value + 1, driver.used.value + 2)
            driver.device.setDriverOK()
            driver.kick()
        }
        attempt("rings that overlap", .survives) { driver throws(Failure) in
            driver.device.status = 0
            _ = try driver.device.negotiate(.ring)
            driver.prepareMemory()
            driver.place(driver.used.value, driver.used.value, driver.used.value)
            driver.device.setDriverOK()
            driver.used.store(UInt16(1), 2)
            driver.device.notify(queue: driver.queue)
        }
        for size in [0, 3, 0x1_0000, 0xffff_ffff] as [UInt32] {
            attempt("a queue of \(UInt64(size)) descriptors", .survives) { driver throws(Failure) in
                driver.device.status = 0
                _ = try driver.device.negotiate(.ring)
                driver.prepareMemory()
                driver.place(driver.descriptors.value, driver.available.value, driver.used.value, size: size)
                driver.device.setDriverOK()
                driver.describeRead()
                driver.submit()
            }
        }
        attempt("rings that move while the queue is ready", .survives) { driver in
            driver.device.registers.store(driver.queue, VirtioMMIO.Register.queueSelect)
            driver.device.storeAddress(Self.outside, VirtioMMIO.Register.queueDescriptors)
            driver.device.registers.store(UInt32(1024), VirtioMMIO.Register.queueSize)
            driver.describeRead()
            driver.submit()
        }
    }

    /// Initializes the device again with one of the three rings at `address`.
    private func replace(_ driver: HostileDriver, ring: Int, _ address: UInt64) throws(Failure) {
        driver.device.status = 0
        _ = try driver.device.negotiate(.ring)
        driver.prepareMemory()
        driver.place(
            ring == 0 ? address : driver.descriptors.value, ring == 1 ? address : driver.available.value,
            ring == 2 ? address : driver.used.value)
        driver.device.setDriverOK()
        driver.describeRead()
        driver.submit()
    }
}
