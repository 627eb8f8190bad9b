// SPDX-License-Identifier: Apache-2.0

import CLinux
import CSystemCallFilter
import Linux
import Synchronization
import TestSupport
import Testing

@testable import GuestMemory
@testable import Virtio

/// What the tests see of an engine that runs on its own thread.
final class EngineLog: Sendable {
    let resets = Atomic<Int>(0)
    let stops = Atomic<Int>(0)
    let backEndEvents = Atomic<Int>(0)
    let isGone = Atomic<Bool>(false)
    let waiting = Atomic<Int>(0)
    /// Signalled by a test: the back-end has something.
    let gate: EventFD

    /// From its next activation on the engine's thread cannot wait for descriptors.
    let hasNoMemory = Atomic<Bool>(false)

    init() throws { gate = try EventFD() }
}

/// Returns each request's readable bytes, plus one, in its writable ones. A request that begins with 0xff stays in
/// flight until the back-end's descriptor is ready, or a reset completes it.
struct EchoEngine: ~Copyable, DeviceEngine {
    let log: EngineLog
    let queueAtWork = 0
    private var queue: Virtqueue?
    private var activation: Activation?
    private let pool = IOVectorPool(slots: 16, capacity: 16)
    private var waiting: [DescriptorChain] = []
    private var isPaused = false

    init(log: EngineLog) { self.log = log }

    deinit { log.isGone.store(true, ordering: .sequentiallyConsistent) }

    mutating func activate(_ activation: Activation, epoll: borrowing Epoll) throws(VirtqueueError) {
        self.activation = activation
        queue = try activation.makeQueue(0)
        if log.hasNoMemory.load(ordering: .sequentiallyConsistent) { _ = fail_system_call(epoll_ctl_number(), ENOMEM) }
        try? epoll.add(log.gate.rawValue, .input, token: DeviceWorkerToken.firstOfEngine)
    }

    mutating func notified(queue index: Int, epoll: borrowing Epoll) throws(VirtqueueError) {
        guard index == 0, queue != nil else { return }
        repeat {
            queue?.disableNotifications()
            while !isPaused, let chain = try queue?.pop(into: pool[waiting.count]) ?? nil {
                if chain.readable.load(UInt8.self) == 0xff { wait(for: chain) } else { complete(chain) }
            }
            publish()
            if isPaused { return }
        } while queue?.enableNotifications() ?? false
    }

    mutating func pause(epoll: borrowing Epoll) { isPaused = true }

    var isQuiet: Bool { waiting.isEmpty }

    mutating func resume(epoll: borrowing Epoll) { isPaused = false }

    mutating func ready(token: UInt64, events: Epoll.Events, epoll: borrowing Epoll) throws(VirtqueueError) {
        log.gate.drain()
        log.backEndEvents.add(1, ordering: .sequentiallyConsistent)
        completeWaiting()
    }

    mutating func reset(epoll: borrowing Epoll) {
        completeWaiting()
        epoll.remove(log.gate.rawValue)
        queue = nil
        activation = nil
        isPaused = false
        log.resets.add(1, ordering: .sequentiallyConsistent)
    }

    mutating func stopQueue(_ index: Int, epoll: borrowing Epoll) {
        completeWaiting()
        queue = nil
        log.stops.add(1, ordering: .sequentiallyConsistent)
    }

    mutating func startQueue(
        _ configuration: QueueConfiguration, of activation: Activation, epoll: borrowing Epoll
    ) throws(VirtqueueError) {
        queue = try Virtqueue(configuration, features: activation.features, ram: activation.ram)
    }

    private mutating func wait(for chain: DescriptorChain) {
        waiting.append(chain)
        log.waiting.store(waiting.count, ordering: .sequentiallyConsistent)
    }

    private mutating func completeWaiting() {
        for chain in waiting { complete(chain) }
        waiting.removeAll()
        log.waiting.store(0, ordering: .sequentiallyConsistent)
        publish()
    }

    private mutating func complete(_ chain: DescriptorChain) {
        var written: UInt64 = 0
        while let byte = chain.readable.load(UInt8.self, at: written), chain.writable.store(byte &+ 1, at: written) {
            written += 1
        }
        queue?.push(chain.head, written: UInt32(written))
        activation?.counters.requests.add()
    }

    private mutating func publish() {
        if queue?.publish() ?? false { activation?.interrupts.queues[0].signal() }
    }
}

/// A device whose work is all its engine's.
final class EchoDevice: VirtioDevice {
    let name = "echo0"
    let deviceID: UInt32 = 42
    let features: FeatureSet = []
    let maximumQueueSizes: [UInt16] = [8, 8]
    let configuration = ConfigurationSpace([])
    let log: EngineLog
    /// What the host's log got.
    let lines = Lines()
    let deviceEvents: DeviceEvents
    private let worker: DeviceWorker
    var isInFlight: Bool { log.waiting.load(ordering: .sequentiallyConsistent) > 0 }

    init() throws {
        log = try EngineLog()
        deviceEvents = DeviceEvents(log: lines.add)
        worker = try DeviceWorker(name: name, engine: EchoEngine(log: log), events: deviceEvents)
    }

    func start(first: @escaping @Sendable () -> Void) throws(SystemCallError) {
        try worker.start(first: first)
    }
    func activate(_ activation: Activation) { worker.activate(activation) }
    func reset() { worker.reset() }
    func stopQueue(_ index: Int) { worker.stopQueue(index) }
    func startQueue(_ configuration: QueueConfiguration) { worker.startQueue(configuration) }
    func pause(onQuiet: @escaping @Sendable () -> Void) { worker.pause(onQuiet: onQuiet) }
    func resume() { worker.resume() }
}

/// A whole device, with the test as the guest. Waits end after a minute at the latest, with a failure instead of a
/// hang.
@Suite(.timed) struct DeviceWorkerTests {
    private let guest: TestGuest
    private let device: EchoDevice
    private let transport: MMIOTransport
    private var driver: DriverQueue

    init() throws {
        guest = try TestGuest()
        device = try EchoDevice()
        try device.start()
        transport = try MMIOTransport(device: device, memory: guest.memory)
        driver = DriverQueue(guest)
    }

    /// Waits for the interrupt's line, as KVM does.
    private func interrupt() -> Bool {
        var entry = pollfd(fd: transport.irqfd.event.rawValue, events: Int16(POLLIN), revents: 0)
        return unsafe poll(&entry, 1, 60_000) == 1 && transport.irqfd.event.drain() > 0
    }

    private func waitUntil(_ condition: () -> Bool) -> Bool {
        for _ in 0..<60_000 {
            if condition() { return true }
            usleep(1000)
        }
        return false
    }

    private mutating func request(_ bytes: [UInt8], head: UInt16 = 0) throws {
        try guest.ram.write(bytes, at: GuestAddress(0x8000 + UInt64(head) * 256))
        try guest.ram.fill(at: GuestAddress(0x9000 + UInt64(head) * 256), count: 16)
        try driver.chain(
            [.read(0x8000 + UInt64(head) * 256, UInt32(bytes.count)), .write(0x9000 + UInt64(head) * 256, 16)], at: head
        )
        try driver.offer(head)
    }

    private func answer(_ head: UInt16 = 0, count: Int) throws -> [UInt8] {
        try guest.ram.readBytes(at: GuestAddress(0x9000 + UInt64(head) * 256), count: count)
    }

    private func kick() { transport.function.doorbells[0].event.signal() }

    /// A good driver's request, from reset on.
    private mutating func expectThatItWorks(_ features: FeatureSet = .version1) throws {
        driver = DriverQueue(guest)
        try guest.ram.fill(at: GuestAddress(0x1000), count: 0x1000)
        transport.bringUp(features, driver.configuration)
        #expect(transport.status == 15)
        transport.irqfd.event.drain()
        try request([1, 2, 3])
        kick()
        #expect(interrupt())
        #expect(try driver.usedIndex() == 1)
        #expect(try driver.used(0) == (0, 3))
        #expect(try answer(count: 4) == [2, 3, 4, 0])
        #expect(transport.get(0x60) == 1)
    }

    @Test(
        "A request",
        arguments: [FeatureSet.version1, [.version1, .eventIndex], [.version1, .eventIndex, .indirectDescriptors]])
    mutating func aRequest(features: FeatureSet) throws {
        try expectThatItWorks(features)
        #expect(transport.function.counters.requests.value == 1)
        #expect(transport.function.counters.kicks.value == 1)
        #expect(transport.function.counters.interrupts.value == 1)
    }

    /// What is in flight ends and is shown, what comes in the pause waits, and nothing is lost.
    @Test mutating func aPause() throws {
        try expectThatItWorks()
        try request([0xff, 1], head: 2)
        kick()
        #expect(waitUntil { device.isInFlight })
        let quiet = Atomic<Int>(0)
        device.pause { quiet.add(1, ordering: .sequentiallyConsistent) }
        #expect(quiet.load(ordering: .sequentiallyConsistent) == 0)
        // Kicked while the engine is being drained.
        try request([4], head: 4)
        kick()
        device.log.gate.signal()
        #expect(interrupt())
        #expect(waitUntil { quiet.load(ordering: .sequentiallyConsistent) == 1 })
        #expect(try driver.usedIndex() == 2)
        #expect(try answer(2, count: 2) == [0, 2])
        // Kicked when it is quiet; the doorbell is not taken.
        try request([5], head: 6)
        kick()
        device.pause {}
        #expect(transport.function.doorbells[0].event.drain() > 0)
        #expect(try driver.usedIndex() == 2)
        device.resume()
        #expect(interrupt())
        #expect(waitUntil { (try? driver.usedIndex()) == 4 })
        #expect(try answer(4, count: 1) == [5] && answer(6, count: 1) == [6])
        device.resume()
        try expectThatItWorks()
    }

    @Test mutating func aResetEndsAPause() throws {
        let quiet = Atomic<Int>(0)
        for isActive in [false, true] {
            if isActive {
                try expectThatItWorks()
                try request([0xff], head: 2)
                kick()
                #expect(waitUntil { device.isInFlight })
            }
            device.pause { quiet.add(1, ordering: .sequentiallyConsistent) }
            device.reset()
            #expect(quiet.load(ordering: .sequentiallyConsistent) == (isActive ? 2 : 1))
            transport.set(0x70, 0)
            try expectThatItWorks()
        }
    }

    @Test mutating func requestsBeforeTheKickOrDriverOKAreNotLost() throws {
        // Available and kicked before DRIVER_OK: by an ioeventfd, by an exit, or not at all.
        for way in 0..<3 {
            driver = DriverQueue(guest)
            try guest.ram.fill(at: GuestAddress(0x1000), count: 0x1000)
            transport.negotiate(.version1)
            transport.setUp(driver.configuration)
            try request([7])
            if way == 0 { kick() }
            if way == 1 { transport.write(0, at: 0x50, size: 4) }
            transport.set(0x70, 15)
            #expect(interrupt())
            #expect(try answer(count: 1) == [8])
        }
    }

    @Test mutating func manyRequestsWithoutRegardForTheWorker() throws {
        transport.bringUp([.version1, .eventIndex], driver.configuration)
        for round in 0..<2000 {
            let head = UInt16(round % 4) * 2, before = try driver.usedIndex()
            try driver.setUsedEvent(before)
            try request([UInt8(truncatingIfNeeded: round) & 0x7f, 1], head: head)
            // The driver kicks only when it is asked to (§2.7.10), as Linux does.
            clinux_full_fence()
            if try driver.availableEvent() == driver.availableIndex &- 1 { kick() }
            guard interrupt() else { Issue.record("request \(round) was lost"); return }
            while transport.get(0x60) & 1 != 0 { transport.set(0x64, 1) }
            guard waitUntil({ (try? driver.usedIndex()) == before &+ 1 }) else {
                Issue.record("request \(round)"); return
            }
        }
        #expect(try driver.usedIndex() == 2000)
        #expect(transport.function.counters.requests.value == 2000)
    }

    @Test mutating func aResetWaitsForRequestsInFlight() throws {
        transport.bringUp(.version1, driver.configuration)
        try request([0xff, 5])
        kick()
        #expect(waitUntil { transport.function.counters.kicks.value == 1 })
        #expect(try driver.usedIndex() == 0)
        transport.set(0x70, 0)
        // The write has returned, so the request is done and nothing is written any more.
        #expect(try answer(count: 2) == [0, 6])
        #expect(try driver.usedIndex() == 1)
        #expect(device.log.resets.load(ordering: .sequentiallyConsistent) == 1)
        #expect(transport.get(0x60) == 0)
        try guest.ram.fill(at: GuestAddress(0), count: TestGuest.lowSize)
        kick()
        device.log.gate.signal()
        transport.set(0x70, 0)
        #expect(try guest.ram.readBytes(at: GuestAddress(0), count: Int(TestGuest.lowSize)).allSatisfy { $0 == 0 })
        try expectThatItWorks()
    }

    @Test mutating func theBackEndFinishesRequests() throws {
        transport.bringUp(.version1, driver.configuration)
        try request([0xff, 5], head: 0)
        try request([0xff, 6], head: 2)
        kick()
        #expect(waitUntil { transport.function.counters.kicks.value == 1 })
        device.log.gate.signal()
        #expect(interrupt())
        #expect(try driver.usedIndex() == 2)
        #expect(try answer(2, count: 2) == [0, 7])
        #expect(device.log.backEndEvents.load(ordering: .sequentiallyConsistent) == 1)
    }

    @Test mutating func oneQueueIsStoppedAndStarted() throws {
        transport.bringUp([.version1, .ringReset], driver.configuration)
        try request([0xff, 1])
        kick()
        #expect(waitUntil { transport.function.counters.kicks.value == 1 })
        transport.set(0x30, 0)
        transport.set(0xc0, 1)
        #expect(try answer(count: 2) == [0, 2], "the queue's reset did not wait")
        #expect(device.log.stops.load(ordering: .sequentiallyConsistent) == 1)
        transport.irqfd.event.drain()

        driver = DriverQueue(guest, base: TestGuest.highStart)
        try request([9])
        transport.setUp(driver.configuration)
        #expect(interrupt())
        #expect(try answer(count: 1) == [10])
        #expect(transport.status == 15)
    }

    @Test("A driver that breaks the rules", arguments: 0..<6)
    mutating func rulesBroken(offence: Int) throws {
        transport.bringUp([.version1, .indirectDescriptors], driver.configuration)
        try request([0xff, 3], head: 4)  // a request in flight, to make it harder
        kick()
        #expect(waitUntil { transport.function.counters.kicks.value == 1 })
        switch offence {
        case 0: try driver.setAvailableIndex(100)
        case 1: try driver.offer(8)
        case 2: try driver.describe(0, .max, 16)
        case 3: try driver.describe(0, 0x8000, 1, flags: nextFlag, next: 0)
        case 4: try driver.describe(0, 0x8000, 16, flags: indirectFlag | nextFlag)
        default: try driver.chain([.write(0x8000, 1), .read(0x8000, 1)])
        }
        if offence > 1 { try driver.offer(0) }
        kick()
        #expect(waitUntil { transport.status == 0x4f })
        #expect(interrupt())
        #expect(waitUntil { device.log.resets.load(ordering: .sequentiallyConsistent) == 1 })
        #expect(transport.get(0x60) & 2 == 2, "no configuration change was announced (§2.1.2)")
        #expect(try answer(4, count: 2) == [0, 4], "the request in flight was lost")
        #expect(transport.function.counters.errors.value == 1)
        #expect(device.lines.all.count == 1)
        #expect(
            device.lines.all.first?.hasPrefix("warning: the driver broke a rule in queue 0: ") == true,
            "\(device.lines.all)")
        // Until its reset the device does nothing, whatever is written.
        kick()
        transport.set(0x30, 0)
        transport.set(0x44, 0)
        transport.set(0x70, 15)
        #expect(transport.status == 0x4f)
        try expectThatItWorks()
    }

    /// The host has no memory to wait for a queue: the driver learns it, and so does the log.
    @Test func aQueueThatCannotBeWaitedForNeedsAReset() throws {
        transport.set(0x70, 0)
        device.log.hasNoMemory.store(true, ordering: .sequentiallyConsistent)
        transport.bringUp(.version1, driver.configuration)
        #expect(transport.status == 0x4f)
        #expect(
            device.lines.all == [
                "error: the host has no memory to wait for queue 0; the device does nothing until the driver resets it"
            ])
        #expect(device.deviceEvents.totals == ["start": 1, "needs_reset": 1])
    }

    @Test mutating func resetsInEveryState() throws {
        for _ in 0..<3 { transport.set(0x70, 0) }
        #expect(device.log.resets.load(ordering: .sequentiallyConsistent) == 0, "there was nothing to reset")
        for _ in 0..<50 {
            transport.bringUp(.version1, driver.configuration)
            kick()
        }
        try expectThatItWorks()
    }

    @Test func theThreadEndsWithItsDevice() throws {
        let log: EngineLog
        do {
            let other = try EchoDevice()
            log = other.log
            try other.start()
            let transport = try MMIOTransport(device: other, memory: guest.memory)
            transport.bringUp(.version1, driver.configuration)
            #expect(log.isGone.load(ordering: .sequentiallyConsistent) == false)
        }
        #expect(log.isGone.load(ordering: .sequentiallyConsistent) == true)
        #expect(log.resets.load(ordering: .sequentiallyConsistent) == 1, "ended without a reset")
    }
}
