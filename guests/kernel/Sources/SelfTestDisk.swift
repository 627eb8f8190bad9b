// SPDX-License-Identifier: Apache-2.0

/// Disks. The tests overwrite the last MiB of a disk (the second half of one below 2 MiB).
extension SelfTest {
    func disks() {
        if devices.disks.isEmpty { skip("disk", "no disk") }
        for disk in devices.disks { test(disk) }
    }

    private func test(_ disk: Disk) {
        let name = disk.name
        check("disk \(name): \(disk.capacity) sectors, \(disk.isReadOnly ? "read-only" : "read-write" as StaticString)")
        { () throws(Failure) in
            try expect(disk.capacity > 0, "it is empty")
            try expect(disk.blockSize >= 512 && disk.blockSize <= 4096, "its blocks have \(disk.blockSize) bytes")
        }
        check("disk \(name): returns its ID") { () throws(Failure) in _ = try disk.identifier() }
        check("disk \(name): two reads of the first and the last sector are equal") { () throws(Failure) in
            for sector in [0, disk.capacity - 1] {
                let first = try checksum(disk, sector, 1)
                let second = try checksum(disk, sector, 1)
                try expect(first == second, "sector \(sector) reads as \(first) and \(second)")
            }
        }
        check("disk \(name): reading beyond its end is an error") { () throws(Failure) in
            for sector in [disk.capacity, disk.capacity + 1, UInt64.max >> 9, UInt64.max >> 1, UInt64.max] {
                try refused(disk, .read, sector, Disk.Outcome.ioError)
            }
        }
        check("disk \(name): a request of unknown type is unsupported") { () throws(Failure) in
            guard let page = unsafe pages.allocate() else { throw Failure("no memory") }
            defer { unsafe pages.release(page, pages: 1) }
            let outcome = try disk.perform(
                type: 0x1234, sector: 0, Segment(address: page, length: 512), deviceWrites: true)
            try expect(outcome == Disk.Outcome.unsupported, Disk.describe(outcome))
        }
        check("disk \(name): 128 reads in flight") { () throws(Failure) in try manyReads(disk) }
        if disk.queues.count > 1 {
            check("disk \(name): each of \(disk.queues.count) queues completes requests") { () throws(Failure) in
                try everyQueue(disk)
            }
        }
        if disk.isReadOnly { testReadOnly(disk) } else { testWriting(disk) }
    }

    private func testReadOnly(_ disk: Disk) {
        check("disk \(disk.name): refuses writes") { () throws(Failure) in
            let before = try checksum(disk, 0, 1)
            try refused(disk, .write, 0, Disk.Outcome.ioError)
            let after = try checksum(disk, 0, 1)
            try expect(before == after, "sector 0 has changed")
        }
    }

    private func testWriting(_ disk: Disk) {
        let scratch = min((1 << 20) / Disk.sectorSize, disk.capacity / 2)
        let start = disk.capacity - scratch
        guard scratch >= 16 else { return skip("disk \(disk.name): writing", "too small") }
        let chunk = min(scratch, Disk.bufferSize / Disk.sectorSize)

        check("disk \(disk.name): data reads back as written, by checksum") { () throws(Failure) in
            for seed in UInt64(1)...2 {
                var written = CRC32()
                for sector in stride(from: start, to: disk.capacity - chunk + 1, by: Int(chunk)) {
                    try withPattern(sectors: chunk, seed: seed ^ sector) { (memory) throws(Failure) in
                        written.add(memory, count: chunk * Disk.sectorSize)
                        try disk.write(sector: sector, count: chunk, from: memory)
                    }
                }
                try disk.flush()
                var read = CRC32()
                for sector in stride(from: start, to: disk.capacity - chunk + 1, by: Int(chunk)) {
                    read.add(try disk.read(sector: sector, count: chunk), count: chunk * Disk.sectorSize)
                }
                try expect(
                    read.value == written.value,
                    "0x\(hex: UInt64(read.value)) instead of 0x\(hex: UInt64(written.value))")
            }
        }
        check("disk \(disk.name): a sector write does not change its neighbours") { () throws(Failure) in
            let before = try checksum(disk, start, 1)
            let beyond = try checksum(disk, start + 2, 1)
            try withPattern(sectors: 1, seed: 77) { (memory) throws(Failure) in
                try disk.write(sector: start + 1, count: 1, from: memory)
            }
            let still = try checksum(disk, start, 1)
            let alsoStill = try checksum(disk, start + 2, 1)
            try expect(before == still && beyond == alsoStill, "a neighbour has changed")
        }
        check("disk \(disk.name): writing beyond its end is an error") { () throws(Failure) in
            try refused(disk, .write, disk.capacity, Disk.Outcome.ioError)
        }
        check("disk \(disk.name): flush") { () throws(Failure) in try disk.flush() }
        if disk.queues.count > 1 {
            check("disk \(disk.name): adjacent sectors, written through all queues concurrently") {
                () throws(Failure) in try neighbours(disk, start)
            }
        }
        clear(disk, .writeZeroes, disk.features.contains(.writeZeroes), start, name: "WRITE_ZEROES")
        clear(disk, .discard, disk.features.contains(.discard), start, name: "DISCARD")
    }

    private func clear(_ disk: Disk, _ request: Disk.Request, _ offered: Bool, _ start: UInt64, name: StaticString) {
        guard offered else { return skip("disk \(disk.name): \(name)", "not offered") }
        check("disk \(disk.name): \(name)") { () throws(Failure) in
            try withPattern(sectors: 16, seed: 5) { (memory) throws(Failure) in
                try disk.write(sector: start, count: 16, from: memory)
            }
            let outcome = try disk.clear(request, sector: start + 8, count: 8)
            try expect(outcome == Disk.Outcome.ok, Disk.describe(outcome))
            if request == .writeZeroes {
                let bytes = try disk.read(sector: start + 8, count: 8).bytes(8 * 512)
                try expect(!bytes.contains { $0 != 0 }, "the sectors are not zero")
            }
            try withPattern(sectors: 16, seed: 5) { (memory) throws(Failure) in
                var expected = CRC32()
                expected.add(memory, count: 8 * Disk.sectorSize)
                let before = try checksum(disk, start, 8)
                try expect(before == expected.value, "the sectors before have changed")
            }
            let beyond = try disk.clear(request, sector: disk.capacity - 1, count: 2)
            try expect(beyond == Disk.Outcome.ioError, "beyond the end: \(Disk.describe(beyond))")
        }
    }

    /// Many requests in flight: each returns its own sector.
    private func manyReads(_ disk: Disk) throws(Failure) {
        let inFlight = 128
        let memoryPages = UInt64(inFlight) * Disk.sectorSize / PageAllocator.pageSize
        guard let memory = unsafe pages.allocate(pages: memoryPages) else { throw Failure("no memory") }
        defer { unsafe pages.release(memory, pages: memoryPages) }
        memory.fill(count: UInt64(inFlight) * Disk.sectorSize, with: 0x5a)
        var waiting: [(slot: UInt16, index: Int)] = []
        var next = 0
        var failure: Text?
        let complete = interrupts.wait(until: clock.now + 20 * seconds) {
            waiting.removeAll { entry in
                guard let outcome = disk.take(entry.slot) else { return false }
                if outcome != Disk.Outcome.ok { failure = Disk.describe(outcome) }
                return true
            }
            while next < inFlight {
                let place = Segment(address: memory + UInt64(next) * Disk.sectorSize, length: UInt32(Disk.sectorSize))
                guard let slot = disk.submit(.read, sector: UInt64(next) * 7919 % disk.capacity, place) else { break }
                waiting.append((slot, next))
                next += 1
            }
            disk.notify()
            return next == inFlight && waiting.isEmpty
        }
        try expect(complete, "\(waiting.count) are not completed")
        if let failure { throw Failure(failure) }
        for index in 0..<inFlight {
            let sector = UInt64(index) * 7919 % disk.capacity
            var there = CRC32()
            there.add(memory + UInt64(index) * Disk.sectorSize, count: Disk.sectorSize)
            let alone = try checksum(disk, sector, 1)
            try expect(there.value == alone, "sector \(sector) is not the same when read alone")
        }
    }

    /// A read through each queue.
    private func everyQueue(_ disk: Disk) throws(Failure) {
        guard let page = unsafe pages.allocate() else { throw Failure("no memory") }
        defer { unsafe pages.release(page, pages: 1) }
        let there = try checksum(disk, 0, 1)
        for index in disk.queues.indices {
            page.fill(count: Disk.sectorSize, with: 0x5a)
            let data = Segment(address: page, length: UInt32(Disk.sectorSize))
            guard
                let slot = disk.submit(to: index, type: Disk.Request.read.rawValue, sector: 0, data, deviceWrites: true)
            else { throw Failure("queue \(index) is full") }
            disk.notify()
            var outcome: UInt8?
            let answered = interrupts.wait(until: clock.now + 10 * seconds) {
                outcome = disk.take(slot)
                return outcome != nil
            }
            try expect(
                answered && outcome == Disk.Outcome.ok,
                "queue \(index): \(outcome.map(Disk.describe) ?? "no completion")")
            var crc = CRC32()
            crc.add(page, count: Disk.sectorSize)
            try expect(crc.value == there, "queue \(index) reads different data")
        }
    }

    /// Sixteen sectors, one after the other through the next queue: in a qcow2 image all of them allocate the same
    /// cluster.
    private func neighbours(_ disk: Disk, _ start: UInt64) throws(Failure) {
        let count: UInt64 = 16
        try withPattern(sectors: count, seed: 91) { (memory) throws(Failure) in
            var waiting: [UInt16] = []
            for sector in 0..<count {
                let data = Segment(address: memory + sector * Disk.sectorSize, length: UInt32(Disk.sectorSize))
                let slot = disk.submit(
                    to: Int(sector) % disk.queues.count, type: Disk.Request.write.rawValue, sector: start + sector,
                    data, deviceWrites: false)
                guard let slot else { throw Failure("a queue is full") }
                waiting.append(slot)
            }
            disk.notify()
            var failure: Text?
            let complete = interrupts.wait(until: clock.now + 20 * seconds) {
                waiting.removeAll { slot in
                    guard let outcome = disk.take(slot) else { return false }
                    if outcome != Disk.Outcome.ok { failure = Disk.describe(outcome) }
                    return true
                }
                return waiting.isEmpty
            }
            try expect(complete, "\(waiting.count) are not completed")
            if let failure { throw Failure(failure) }
            var written = CRC32()
            written.add(memory, count: count * Disk.sectorSize)
            let there = try checksum(disk, start, count)
            try expect(there == written.value, "they read back differently")
        }
    }

    private func refused(_ disk: Disk, _ request: Disk.Request, _ sector: UInt64, _ wanted: UInt8) throws(Failure) {
        guard let page = unsafe pages.allocate() else { throw Failure("no memory") }
        defer { unsafe pages.release(page, pages: 1) }
        let outcome = try disk.perform(request, sector: sector, Segment(address: page, length: 512))
        try expect(outcome == wanted, "sector \(sector): \(Disk.describe(outcome))")
    }

    private func withPattern(sectors: UInt64, seed: UInt64, _ body: (Address) throws(Failure) -> Void) throws(Failure) {
        let count = (sectors * Disk.sectorSize + PageAllocator.pageSize - 1) / PageAllocator.pageSize
        guard let memory = unsafe pages.allocate(pages: count) else { throw Failure("no memory") }
        defer { unsafe pages.release(memory, pages: count) }
        for offset in stride(from: UInt64(0), to: sectors * Disk.sectorSize, by: 8) {
            memory.store(Pattern.word(offset, seed), offset)
        }
        try body(memory)
    }

    private func checksum(_ disk: Disk, _ sector: UInt64, _ count: UInt64) throws(Failure) -> UInt32 {
        var crc = CRC32()
        crc.add(try disk.read(sector: sector, count: count), count: count * Disk.sectorSize)
        return crc.value
    }
}
