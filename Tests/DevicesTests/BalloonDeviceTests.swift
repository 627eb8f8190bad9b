// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import Devices
import Glibc
import GuestMemory
import Linux
import Synchronization
import TestSupport
import Testing
@testable import Virtio

@Suite(.timed) struct BalloonDeviceTests {
    static let formats: [FeatureSet] = [[], .packedRing]

    // MARK: The device

    @Test func offersWhatItIsConfiguredFor() throws {
        #expect(BalloonSettings().features == .balloonMustTellHost)
        let all = BalloonSettings(
            target: 8 << 20, deflatesOnOOM: true, statisticsInterval: 1, reportsFreePages: true, hintsFreePages: true)
        #expect(all.features.rawValue == 0x3f)
        let driver = try BalloonDriver(all)
        #expect(driver.read(0x008) == 5)
        #expect(driver.configuration(0, 4) == 2048 && driver.configuration(4, 4) == 0)
        #expect(driver.configuration(12, 4) == 0 && driver.configuration(16, 1) == 0xff)
    }

    @Test func theDriverWritesItsOwnFieldsOnly() throws {
        let driver = try BalloonDriver(BalloonSettings(target: 4096, reportsFreePages: true))
        for offset in stride(from: 0 as UInt64, to: 16, by: 4) {
            driver.transport.write(7, at: 0x100 + offset, size: 4)
            driver.transport.write(0xff, at: 0x100 + offset, size: 1)
        }
        #expect([0, 4, 8, 12].map { driver.configuration($0, 4) } == [1, 7, 0, 7])
        #expect(driver.device.statistics.actual == 7 * 4096)
        // A reset is the end of what the driver said.
        try driver.start(driver.device.features.union(.version1))
        #expect([0, 4, 8, 12].map { driver.configuration($0, 4) } == [1, 0, 0, 0])
    }

    @Test func aNewTargetIsAChangeOfTheConfiguration() throws {
        let driver = try BalloonDriver()
        let generation = driver.read(0x0fc)
        driver.device.setTarget(3 << 20)
        while driver.read(0x060) & 2 == 0 { driver.transport.irqfd.event.wait() }
        #expect(driver.read(0x0fc) != generation && driver.configuration(0, 4) == 768)
        #expect(driver.device.statistics.target == 3 << 20)
        driver.device.setTarget(.max)
        #expect(driver.configuration(0, 4) == UInt64(UInt32.max))
    }

    /// §5.5.2 gives each queue a number; Linux' driver and QEMU's device count those that exist.
    @Test func queuesAreNumberedInEitherWay() {
        let reports: FeatureSet = .balloonReports
        #expect(BalloonQueue.order(reports, ready: [0, 1, 2]) == [.inflate, .deflate, .reports])
        #expect(BalloonQueue.order(reports, ready: [0, 1, 4]) == BalloonQueue.allCases)
        let both: FeatureSet = [.balloonReports, .balloonHints]
        #expect(BalloonQueue.order(both, ready: [0, 1, 2, 3]) == [.inflate, .deflate, .hints, .reports])
        #expect(BalloonQueue.order(both, ready: [3, 4]) == BalloonQueue.allCases)
        #expect(BalloonQueue.order([.balloonStatistics], ready: []) == [.inflate, .deflate, .statistics])
    }

    // MARK: Pages

    @Test(arguments: formats) func inflatedPagesGoBackToTheHost(format: FeatureSet) throws {
        let driver = try BalloonDriver(features: format)
        try driver.fill(1024)
        // Downwards with gaps, as an allocator gives them, and some of them twice.
        let pages = (0..<1024).reversed().filter { $0 % 8 != 3 }.map(driver.page)
        try driver.put(pages + pages)
        let before = try driver.resident
        try driver.send(Array(pages[..<500] + pages[400...]))
        #expect(try before - driver.resident == UInt64(pages.count) * 4096)
        for page: UInt32 in 0..<1024 { #expect(try driver.byte(page) == (page % 8 == 3 ? 0xee : 0)) }
        #expect(driver.device.statistics.inflated >= UInt64(pages.count) * 4096)
        // It is memory again as soon as it is used.
        try driver.send(pages, queue: 1)
        try driver.fill(1024)
        #expect(try driver.resident >= before && driver.byte(1000) == 0xee)
        #expect(driver.read(0x070) == 15 && driver.transport.function.counters.errors.value == 0)
    }

    @Test func aLongRequestIsServedInSeveralTurns() throws {
        let driver = try BalloonDriver()
        try driver.fill(1024)
        // 128 KiB of page numbers: the data's, again and again.
        try driver.send((0..<32_768).map { driver.page($0 * 7 % 1024) })
        #expect(try driver.byte(0) == 0 && driver.byte(1023) == 0)
        #expect(driver.transport.function.counters.requests.value == 1)
        // Half a number at the end is none.
        try driver.fill(2)
        try driver.put([driver.page(0), driver.page(1)])
        _ = try driver.offer([.init(address: BalloonDriver.numbers, length: 7, isWritable: false)])
        driver.kick()
        try driver.wait(for: 1)
        #expect(try driver.byte(0) == 0 && driver.byte(1) == 0xee)
    }

    @Test func pagesThatAreNotRAMAreIgnored() throws {
        let memory = try GuestMemory(size: 16 << 20)
        let driver = try BalloonDriver(memory: memory)
        try driver.fill(1)
        let end: UInt32 = 0x1000
        try driver.send([end - 1, end, end + 1, 0xc0000, 0xfffff, .max, driver.page(0)])
        #expect(driver.device.statistics.refusedPages == 5)
        #expect(try driver.byte(0) == 0)
        try driver.send([.max, 0x10_0000], queue: 1)
        #expect(driver.read(0x070) == 15)
    }

    @Test func sharedMemoryIsRemovedFromItsFile() throws {
        let driver = try BalloonDriver(memory: GuestMemory(size: 16 << 20, shared: true))
        try driver.fill(512)
        try driver.put((0..<512).map(driver.page))
        let before = try driver.resident
        try driver.send((0..<512).map(driver.page))
        #expect(try before - driver.resident == 2_097_152)
        #expect(try driver.byte(5) == 0)
    }

    // MARK: Hostile drivers

    @Test(arguments: formats) func aDriverThatGivesItsOwnRingsAwayHarmsItselfOnly(format: FeatureSet) throws {
        let driver = try BalloonDriver(features: format)
        let rings = [QueueDriver.table, QueueDriver.available, QueueDriver.used].map { UInt32($0.rawValue >> 12) }
        for pages in [rings, [UInt32(BalloonDriver.numbers >> 12)], Array(0..<4096)] {
            try driver.put(pages)
            _ = try driver.offer([.init(address: BalloonDriver.numbers, length: 4 * pages.count, isWritable: false)])
            driver.kick()
            // A turn of the device's thread, whatever it has found: a reset is served after it.
            driver.device.setTarget(0)
            try driver.start(driver.device.features.union(.version1).union(format))
            try driver.fill(4)
            try driver.send([driver.page(2)])
            #expect(try driver.byte(1) == 0xee && driver.byte(2) == 0)
        }
    }

    /// What another device is about to read into, or write from, goes to the balloon at the same moment: the operation
    /// ends as on other memory, and what the guest finds there is its own affair.
    @Test func pagesInFlightOfAnotherDevice() throws {
        let driver = try BalloonDriver()
        let file = try FileDescriptor.sealedMemory("source", contents: [UInt8](repeating: 0x5a, count: 1 << 20))
        let isOver = Flag(), memory = driver.memory, number = file.rawValue
        let thread = try Linux.Thread.start(name: "reader", stackSize: 1 << 20) {
            while !isOver.isOver.load(ordering: .relaxed) {
                guard var buffer = memory.ram.iovec(for: GuestAddress(QueueDriver.data), count: 1 << 20) else { return }
                if preadv(number, &buffer, 1, 0) != 1 << 20 { isOver.failures.add(1, ordering: .relaxed) }
            }
        }
        for _ in 0..<200 { try driver.send((0..<256).map(driver.page)) }
        isOver.isOver.store(true, ordering: .relaxed)
        thread.join()
        #expect(isOver.failures.load(ordering: .relaxed) == 0 && driver.read(0x070) == 15)
    }

    @Test func whateverAGuestDoes() throws {
        let settings = BalloonSettings(
            deflatesOnOOM: true, statisticsInterval: 1, reportsFreePages: true, hintsFreePages: true)
        let driver = try BalloonDriver(settings)
        let device = driver.device
        let guest = HostileGuest(
            driver.transport, ram: driver.ram, sizes: Array(repeating: UInt16(QueueDriver.queueSize), count: 5),
            features: device.features.union(.transport)
        ) { _, random in
            // Page numbers; sometimes only a buffer that the device may write, as reports are.
            (0..<random.below(16)).flatMap { _ in
                let page = UInt32(truncatingIfNeeded: random.chance(80) ? 0x100 + random.below(0x100) : random.next())
                return (0..<4).map { UInt8(truncatingIfNeeded: page >> UInt32(8 * $0)) }
            }
        }
        try guest.attack(rounds: 60, served: { [device.statistics.inflated] }) { random in
            device.setTarget(random.below(16 << 20))
            if random.chance(10) { _ = device.requestHints(acknowledgesEnd: random.chance(50)) }
            if random.chance(10) { _ = device.setStatisticsInterval(1) }
        }
        try driver.start(device.features.union(.version1))
        try driver.fill(4)
        try driver.send([driver.page(2)])
        #expect(try driver.byte(1) == 0xee && driver.byte(2) == 0, "seed \(guest.seed)")
    }

    // MARK: Statistics

    @Test(arguments: formats) func statisticsAreReadAndRequestedAgain(format: FeatureSet) throws {
        let driver = try BalloonDriver(BalloonSettings(statisticsInterval: 1), features: format)
        try driver.offerStatistics([(4, 1 << 30), (5, 2 << 30), (99, 1), (0, 0)], extra: 5)
        // The device keeps the buffer until it wants new figures.
        try driver.wait(for: 1)
        #expect(driver.device.statistics.guest.free == 1 << 30 && driver.device.statistics.guest.total == 2 << 30)
        #expect(driver.device.statistics.guest.swapIn == 0 && driver.device.statistics.guest.available == nil)
        try driver.offerStatistics([(6, 5), (15, 7), (4, 3)])
        try driver.wait(for: 1)
        let guest = driver.device.statistics.guest
        #expect(guest.free == 3 && guest.total == 2 << 30 && guest.available == 5 && guest.reclaimedDirectly == 7)
        #expect(driver.device.setStatisticsInterval(2) && driver.device.statistics.interval == 2)
        #expect(!(try BalloonDriver().device.setStatisticsInterval(2)))
    }

    @Test func ofSeveralBuffersTheLastOneIsKept() throws {
        let driver = try BalloonDriver(BalloonSettings(statisticsInterval: BalloonSettings.maximumInterval))
        for value in 1...3 as ClosedRange<UInt64> { try driver.offerStatistics([(4, value)]) }
        try driver.wait(for: 2)
        driver.write(0x070, 0)
        #expect(driver.device.statistics.guest.free == 3)
    }

    @Test func aPauseReturnsNothingAndLosesNothing() throws {
        let driver = try BalloonDriver(BalloonSettings(statisticsInterval: 1))
        try driver.offerStatistics([(4, 9)])
        let quiet = EventCount()
        driver.device.pause { quiet.event.signal() }
        quiet.event.wait()
        driver.queue = 0
        try driver.fill(1)
        try driver.put([driver.page(0)], at: BalloonDriver.numbers + 0x1000)
        _ = try driver.offer([.init(address: BalloonDriver.numbers + 0x1000, length: 4, isWritable: false)])
        driver.kick()
        #expect(try driver.byte(0) == 0xee)
        driver.device.resume()
        try driver.wait(for: 1)
        #expect(try driver.byte(0) == 0)
        driver.queue = 2
        try driver.wait(for: 1)
        #expect(driver.device.statistics.guest.free == 9)
    }

    // MARK: Free pages

    @Test(arguments: formats) func reportedPagesGoBackToTheHost(format: FeatureSet) throws {
        let driver = try BalloonDriver(BalloonSettings(reportsFreePages: true), features: format)
        try driver.fill(16)
        // The whole pages of a range.
        try driver.send(
            ranges: [(BalloonDriver.data + 0x800, 0x3000), (BalloonDriver.data + 0x8000, 0x2000)], queue: 2)
        let bytes = try (0..<16).map { try driver.byte($0) }
        #expect(
            bytes == [0xee, 0, 0] + [UInt8](repeating: 0xee, count: 5) + [0, 0] + [UInt8](repeating: 0xee, count: 6))
        #expect(driver.device.statistics.reported == 16_384)
        // A driver that fills free pages with something finds it there (§5.5.6.7).
        driver.transport.write(0xaaaa_aaaa, at: 0x10c, size: 4)
        try driver.send(ranges: [(BalloonDriver.data, 0x10000)], queue: 2)
        #expect(try driver.byte(0) == 0xee && driver.device.statistics.reported == 16_384)
    }

    @Test func hintsOfTheCurrentRunGoBackToTheHost() throws {
        let driver = try BalloonDriver(BalloonSettings(hintsFreePages: true))
        func command(_ value: UInt32) throws {
            driver.queue = 2
            try driver.put([value])
            _ = try driver.offer([.init(address: BalloonDriver.numbers, length: 4, isWritable: false)])
            driver.kick()
            try driver.wait(for: 1)
        }
        func hint(_ page: UInt32) throws -> UInt8 {
            try driver.fill(16)
            try driver.send(ranges: [(UInt64(driver.page(page)) << 12, 4096)], queue: 2)
            return try driver.byte(page)
        }
        #expect(try hint(1) == 0xee)
        #expect(driver.device.requestHints(acknowledgesEnd: true))
        #expect(driver.configuration(8, 4) == 2)
        #expect(try hint(1) == 0xee)
        try command(2)
        #expect(try hint(1) == 0)
        #expect(driver.device.statistics.hinted == 4096 && driver.device.statistics.guestHintCommand == 2)
        try command(0)
        #expect(driver.configuration(8, 4) == 1)
        #expect(try hint(1) == 0xee)
        // The next run has another number, and ends when the host says so.
        #expect(driver.device.requestHints(acknowledgesEnd: false))
        #expect(driver.configuration(8, 4) == 3)
        try command(2)
        #expect(try hint(1) == 0xee)
        try command(3)
        #expect(try hint(1) == 0)
        try command(0)
        #expect(driver.configuration(8, 4) == 3)
        #expect(driver.device.endHints() && driver.configuration(8, 4) == 1)
        #expect(!(try BalloonDriver().device.requestHints(acknowledgesEnd: true)))
    }

    // MARK: Huge pages

    @Test func aHugePageGoesWhenAllOfItIsInTheBalloon() {
        var ledger = HugePageLedger(size: 8 << 20, hugePageSize: 2 << 20)
        var whole: [Int] = []
        for page in 512..<1024 {
            if ledger.insert(page) { whole.append(page) }
            if ledger.insert(page) { whole.append(page) }
        }
        #expect(whole == [1023])
        ledger.setReleased(1023, true)
        let offset = ledger.offset(of: 700), released = [511, 512, 1023, 1024].map { ledger.isReleased($0) }
        #expect(offset == 2 << 20 && released == [false, true, true, false])
        // In, out and another one in: not the whole page.
        ledger.remove(600)
        ledger.remove(600)
        let isOther = ledger.insert(0), isWholeAgain = ledger.insert(600)
        #expect(!isOther && isWholeAgain)
    }

    @Test func hugePagesGoBackToTheirPool() throws {
        // Where the host has none, there is nothing to be seen.
        guard let memory = try? GuestMemory(size: 16 << 20, backing: .hugePages(.twoMiB)) else { return }
        let driver = try BalloonDriver(memory: memory)
        try driver.ram.fill(at: GuestAddress(8 << 20), count: 8 << 20, with: 0xee)
        let before = try driver.resident, first: UInt32 = 0x800
        try driver.send((first..<first + 512 - 1).map { $0 })
        #expect(try driver.resident == before)
        try driver.send([first + 511])
        #expect(try before - driver.resident == 2_097_152)
        // It is there again before the driver may use it.
        try driver.send([first + 7], queue: 1)
        #expect(try driver.resident == before)
    }
}

private final class EventCount: Sendable {
    let event = try! EventFD()
}

private final class Flag: Sendable {
    let isOver = Atomic<Bool>(false)
    let failures = Atomic<Int>(0)
}
