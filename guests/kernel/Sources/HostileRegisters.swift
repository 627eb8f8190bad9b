// SPDX-License-Identifier: Apache-2.0

/// Registers in wrong orders, and requests and frames that a device has to refuse.
extension Attack {
    private typealias Register = VirtioMMIO.Register
    private typealias Status = VirtioMMIO.Status
    private static let next = DescriptorFlag.next
    private static let write = DescriptorFlag.write

    func registers() {
        attempt("features that were not offered are not accepted", .survives) { driver throws(Failure) in
            try refusesFeatures(driver, driver.device.offeredFeatures | 1 << 50 | 1 << 63)
        }
        attempt("a driver without VERSION_1 is not accepted", .survives) { driver throws(Failure) in
            try refusesFeatures(driver, driver.device.offeredFeatures & ~Features.version1.rawValue)
        }
        attempt("DRIVER_OK before FEATURES_OK", .refused) { driver throws(Failure) in
            try restart(driver, status: Status.acknowledge | Status.driver | Status.driverOK)
        }
        attempt("DRIVER_OK before anything", .refused) { driver throws(Failure) in
            try restart(driver, status: Status.driverOK)
        }
        attempt("a notification before DRIVER_OK", .refused) { driver throws(Failure) in
            try restart(driver, status: Status.acknowledge | Status.driver | Status.featuresOK)
        }
        attempt("features changed after FEATURES_OK", .survives) { driver in driver.device.acceptFeatures(0) }
        attempt("a queue made ready without rings", .survives) { driver throws(Failure) in
            driver.device.status = 0
            _ = try driver.device.negotiate(.ring)
            driver.device.registers.store(driver.queue, Register.queueSelect)
            driver.device.registers.store(UInt32(1), Register.queueReady)
            driver.device.setDriverOK()
            driver.device.notify(queue: driver.queue)
        }
        attempt("a notification of a queue that is not ready", .refused) { driver throws(Failure) in
            driver.device.status = 0
            _ = try driver.device.negotiate(.ring)
            driver.prepareMemory()
            driver.device.setDriverOK()
            driver.describeRead()
            driver.submit()
        }
        attempt("notifications of queues that do not exist", .survives) { driver in
            for queue in [2, 7, 0xffff, 0x8000_0000, 0xffff_ffff] as [UInt32] { driver.device.notify(queue: queue) }
        }
        attempt("queues that do not exist made ready", .survives) { driver throws(Failure) in
            for queue in [129, 0xffff, 0xffff_ffff] as [UInt32] {
                driver.device.registers.store(queue, Register.queueSelect)
                let largest: UInt32 = driver.device.registers.load(Register.queueSizeMax)
                try expect(largest == 0, "queue \(queue) has \(largest) descriptors")
                driver.device.registers.store(UInt32(16), Register.queueSize)
                driver.device.registers.store(UInt32(1), Register.queueReady)
            }
        }
        attempt("status bits cleared without a reset", .survives) { driver in
            driver.device.status = Status.acknowledge
            driver.device.status = Status.acknowledge | Status.driver
            driver.describeRead()
            driver.submit()
        }
        attempt("a driver that sets FAILED, and one that sets NEEDS_RESET", .survives) { driver in
            driver.device.status = Status.failed
            driver.device.status = 0xffff_ffff
        }
        attempt("acknowledgement of interrupts that did not occur", .survives) { driver in
            driver.device.registers.store(UInt32.max, Register.interruptAcknowledge)
        }
        attempt("writes to read-only registers", .survives) { driver throws(Failure) in
            for register in [
                Register.magic, Register.version, Register.deviceID, Register.deviceFeatures, Register.queueSizeMax,
                Register.interruptStatus, Register.configGeneration,
            ] { driver.device.registers.store(UInt32.max, register) }
            let magic: UInt32 = driver.device.registers.load(Register.magic)
            try expect(magic == 0x7472_6976, "the magic value is now 0x\(hex: UInt64(magic))")
        }
        attempt("undefined registers", .survives) { driver in
            for offset in stride(from: UInt64(0), to: 0x100, by: 4) where !Self.effective.contains(offset) {
                let value: UInt32 = driver.device.registers.load(offset)
                driver.device.registers.store(value, offset)
            }
        }
        attempt("register accesses of 1, 2 and 8 bytes, and misaligned ones", .survives) { driver in
            let registers = driver.device.registers
            for offset in [Register.magic, Register.status, Register.queueNotify + 1, Register.queueReady + 2] {
                let byte: UInt8 = registers.load(offset)
                let half: UInt16 = registers.load(offset)
                let word: UInt32 = registers.load(offset + 1)
                let double: UInt64 = registers.load(offset)
                registers.store(byte, offset)
                registers.store(half, offset)
                registers.store(word, offset + 1)
                registers.store(double, offset)
            }
        }
        attempt("reads beyond the configuration space", .survives) { driver in
            let end = (driver.device.registers.value | 0xfff) + 1 - driver.device.registers.value
            for offset in [0x140, 0x1f0, end / 2, end - 8] where offset < end && offset >= Register.config {
                let double: UInt64 = driver.device.registers.load(offset)
                driver.device.registers.store(double, offset)
            }
            let straddling: UInt32 = driver.device.registers.load(Register.config + 57)
            driver.device.registers.store(straddling, Register.config + 57)
        }
        attempt("writes to the configuration space", .survives) { driver in
            for offset in stride(from: UInt64(0), to: 64, by: 4) {
                driver.device.registers.store(UInt32.max, Register.config + offset)
            }
        }
        attempt("a reset with requests in flight", .survives) { driver throws(Failure) in
            for _ in 0..<8 {
                driver.describeRead()
                for _ in 0..<HostileDriver.queueSize { driver.offer(0) }
                driver.kick()
                try driver.bringUp()
            }
        }
    }

    /// Registers that can be written; all others below 0x100 are reserved or read-only.
    private static var effective: [UInt64] {
        [
            Register.deviceFeaturesSelect, Register.driverFeatures, Register.driverFeaturesSelect, Register.queueSelect,
            Register.queueSize,
            Register.queueReady, Register.queueNotify, Register.interruptAcknowledge, Register.status,
            Register.queueDescriptors,
            Register.queueDescriptors + 4, Register.queueDriver, Register.queueDriver + 4, Register.queueDevice,
            Register.queueDevice + 4,
        ]
    }

    private func refusesFeatures(_ driver: HostileDriver, _ features: UInt64) throws(Failure) {
        try driver.device.reset()
        driver.device.status = Status.acknowledge
        driver.device.status = Status.acknowledge | Status.driver
        driver.device.acceptFeatures(features)
        driver.device.status = Status.acknowledge | Status.driver | Status.featuresOK
        try expect(driver.device.status & Status.featuresOK == 0, "FEATURES_OK stays set")
    }

    /// A correct request on a queue of a device whose initialization stopped at `status`.
    private func restart(_ driver: HostileDriver, status: UInt32) throws(Failure) {
        try driver.device.reset()
        if status & Status.featuresOK != 0 { _ = try driver.device.negotiate(.ring) }
        driver.prepareMemory()
        driver.place(driver.descriptors.value, driver.available.value, driver.used.value)
        driver.device.status = status
        driver.describeRead()
        driver.submit()
    }

    // MARK: Block requests

    func blockRequests(capacity: UInt64, isReadOnly: Bool) {
        attempt("a header in two buffers, data in three, the status with the last: allowed", .succeeds, dataLength: 520)
        { driver in
            driver.describe(0, driver.header.value, 5, Self.next, next: 1)
            driver.describe(1, driver.header.value + 5, 11, Self.next, next: 2)
            driver.describe(2, driver.data.value, 1, Self.next | Self.write, next: 3)
            driver.describe(3, driver.data.value + 1, 411, Self.next | Self.write, next: 4)
            driver.describe(4, driver.data.value + 412, 100, Self.next | Self.write, next: 5)
            driver.describe(5, driver.status.value, 1, Self.write)
            driver.submit()
        }
        attempt("a header of 8 bytes", .refused) { driver in
            driver.describeRead()
            driver.describe(0, driver.header.value, 8, Self.next, next: 1)
            driver.submit()
        }
        attempt("a header and nothing else", .refused) { driver in
            driver.describe(0, driver.header.value, 16)
            driver.submit()
        }
        attempt("a request without a status byte", .refused) { driver in
            driver.describe(0, driver.header.value, 16, Self.next, next: 1)
            driver.describe(1, driver.data.value, 512)
            driver.submit()
        }
        attempt("a status byte beyond all RAM", .survives) { driver in
            driver.describeRead()
            driver.describe(2, Self.beyond[0].address, 1, Self.write)
            driver.submit()
        }
        attempt("a read of 100 bytes", .refused) { driver in
            driver.describeRead()
            driver.describe(1, driver.data.value, 100, Self.next | Self.write, next: 2)
            driver.submit()
        }
        attempt("a read into device-readable buffers", .survives, dataLength: 0) { driver in
            driver.describeRead()
            driver.describe(1, driver.data.value, 512, Self.next, next: 2)
            driver.submit()
        }
        attempt("a read across the end of the disk", .status(Disk.Outcome.ioError)) { driver in
            driver.setHeader(type: 0, sector: capacity - 1)
            driver.describeRead()
            driver.describe(1, driver.data.value, 1024, Self.next | Self.write, next: 2)
            driver.submit()
        }
        for sector in [capacity, 1 << 55, 1 << 63, UInt64.max] {
            attempt("a read of sector 0x\(hex: sector)", .status(Disk.Outcome.ioError)) { driver in
                driver.setHeader(type: 0, sector: sector)
                driver.describeRead()
                driver.submit()
            }
        }
        for type in [2, 100, 0x8000_0000, 0xffff_ffff] as [UInt32] {
            attempt("a request of type \(UInt64(type))", .status(Disk.Outcome.unsupported)) { driver in
                driver.setHeader(type: type, sector: 0)
                driver.describeRead()
                driver.submit()
            }
        }
        attempt("GET_ID into four bytes", .survives, dataLength: 8) { driver in
            driver.setHeader(type: 8, sector: 0)
            driver.describeRead()
            driver.describe(1, driver.data.value, 4, Self.next | Self.write, next: 2)
            driver.submit()
        }
        let discard: UInt32 = 11
        let writeZeroes: UInt32 = 13
        for (type, typeName): (UInt32, StaticString) in [(discard, "DISCARD"), (writeZeroes, "WRITE_ZEROES")] {
            attempt("\(typeName) of sectors beyond the disk", .refused) { driver in
                clear(driver, type, sector: capacity, count: 8, flags: 0, length: 16)
            }
            attempt("\(typeName) whose sectors wrap around", .refused) { driver in
                clear(driver, type, sector: UInt64.max - 3, count: 8, flags: 0, length: 16)
            }
            attempt("\(typeName) with unknown flags", .refused) { driver in
                clear(driver, type, sector: capacity - 1, count: 1, flags: 0xffff_fffe, length: 16)
            }
            attempt("\(typeName) of half a segment", .refused) { driver in
                clear(driver, type, sector: capacity - 1, count: 1, flags: 0, length: 8)
            }
        }
        if isReadOnly {
            attempt("a write to a read-only disk", .status(Disk.Outcome.ioError)) { driver in
                driver.setHeader(type: 1, sector: 0)
                driver.describe(0, driver.header.value, 16, Self.next, next: 1)
                driver.describe(1, driver.data.value, 512, Self.next, next: 2)
                driver.describe(2, driver.status.value, 1, Self.write)
                driver.submit()
            }
        }
    }

    private func clear(
        _ driver: HostileDriver, _ type: UInt32, sector: UInt64, count: UInt32, flags: UInt32, length: UInt32
    ) {
        driver.setHeader(type: type, sector: 0)
        driver.data.store(sector)
        driver.data.store(count, 8)
        driver.data.store(flags, 12)
        driver.describe(0, driver.header.value, 16, Self.next, next: 1)
        driver.describe(1, driver.data.value, length, Self.next, next: 2)
        driver.describe(2, driver.status.value, 1, Self.write)
        driver.submit()
    }

    // MARK: Frames

    func frames(isReceiving: Bool) {
        let direction = isReceiving ? Self.write : 0
        for length in [0, 1, 11, 12] as [UInt32] {
            attempt("a frame buffer of \(UInt64(length)) bytes", .survives) { driver in
                driver.describe(0, driver.data.value, length, direction)
                driver.submit()
            }
        }
        attempt("a frame buffer of the wrong direction", .survives, dataLength: isReceiving ? 0 : 0x4000) { driver in
            driver.describe(0, driver.data.value, 1514, isReceiving ? 0 : Self.write)
            driver.submit()
        }
        if !isReceiving {
            attempt("a frame of 16 KiB", .survives) { driver in
                driver.data.fill(count: 0x4000)
                driver.describe(0, driver.data.value, 0x4000)
                driver.submit()
            }
            attempt("a header with a checksum and segments beyond the frame", .survives) { driver in
                driver.data.fill(count: 60)
                for offset in UInt64(0)..<12 { driver.data.store(UInt8(0xff), offset) }
                driver.describe(0, driver.data.value, 72)
                driver.submit()
            }
        }
    }

    // MARK: Random chains

    /// Pseudo-random chains, the same in each run. The device can read only a header for sector 0, and memory that does
    /// not exist, so that no disk is changed.
    func randomChains() {
        attempt("two hundred random chains", .survives) { driver throws(Failure) in
            var state: UInt64 = 0x2545_f491_4f6c_dd1d
            func draw(_ limit: UInt64) -> UInt64 {
                state ^= state << 13
                state ^= state >> 7
                state ^= state << 17
                return state % limit
            }
            for _ in 0..<200 {
                for index in UInt16(0)..<HostileDriver.queueSize {
                    let writes = draw(2) == 0
                    let inside = draw(8) != 0
                    let address =
                        !inside
                        ? Self.beyond[Int(draw(4))].address
                        : writes ? driver.data.value + draw(0x2000) : driver.header.value
                    let length: UInt64 = draw(4) == 0 ? draw(0x2000) : draw(2) * 512 + draw(2) * 16
                    let flags = (writes ? Self.write : 0) | (draw(3) != 0 ? Self.next : 0)
                    driver.describe(
                        index, address, UInt32(writes ? length : min(length, 16)), flags, next: UInt16(draw(20)))
                }
                driver.offer(UInt16(draw(18)))
                driver.kick()
                if driver.device.needsReset { try driver.bringUp() }
            }
        }
    }
}
