// SPDX-License-Identifier: Apache-2.0

import Linux
import Testing

@testable import GuestMemory
@testable import Virtio

/// A device that only notes what its transport asks of it.
final class RecordingDevice: VirtioDevice {
    enum Event: Equatable {
        case activate(FeatureSet, ready: [Bool])
        case reset
        case stop(Int)
        case start(QueueConfiguration)
        case write(UInt64, offset: Int, size: Int)
    }

    static let wanted = FeatureSet(bit: 3), disliked = FeatureSet(bit: 50), high = FeatureSet(bit: 66), highest = FeatureSet(bit: 127)

    let name = "test0"
    let deviceID: UInt32 = 42
    let features: FeatureSet = [wanted, disliked, high, highest]
    let maximumQueueSizes: [UInt16] = [8, 256]
    let configuration = ConfigurationSpace([0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99])
    private let recorded = Guarded<[Event]>([])
    private let lastActivation = Guarded<Activation?>(nil)
    private let lastFeatures = Guarded<FeatureSet?>(nil)

    var events: [Event] { recorded.withLock { $0 } }
    var activation: Activation? { lastActivation.withLock { $0 } }
    var negotiatedFeatures: FeatureSet? { lastFeatures.withLock { $0 } }

    func accepts(_ features: FeatureSet) -> Bool { !features.contains(Self.disliked) }
    func negotiated(_ features: FeatureSet) { lastFeatures.withLock { $0 = features } }
    func writeConfiguration(_ value: UInt64, at offset: Int, size: Int) { note(.write(value, offset: offset, size: size)) }
    func activate(_ activation: Activation) {
        lastActivation.withLock { $0 = activation }
        note(.activate(activation.features, ready: activation.queues.map(\.isReady)))
    }
    func reset() { note(.reset) }
    func stopQueue(_ index: Int) { note(.stop(index)) }
    func startQueue(_ configuration: QueueConfiguration) { note(.start(configuration)) }

    private func note(_ event: Event) { recorded.withLock { $0.append(event) } }
}

/// The registers as a driver writes them.
extension MMIOTransport {
    func get(_ offset: UInt64) -> UInt32 { UInt32(read(at: offset, size: 4)) }
    func set(_ offset: UInt64, _ value: UInt32) { write(UInt64(value), at: offset, size: 4) }
    var status: UInt32 { self.get(0x70) }

    /// Up to FEATURES_OK; returns what the status reads then.
    @discardableResult
    func negotiate(_ features: FeatureSet) -> UInt32 {
        set(0x70, 0)
        set(0x70, 1)
        set(0x70, 3)
        for word in 0..<FeatureSet.words {
            set(0x24, word)
            set(0x20, features[word: word])
        }
        set(0x70, 11)
        return status
    }

    func setUp(_ queue: QueueConfiguration) {
        set(0x30, UInt32(queue.index))
        set(0x38, queue.size)
        for (offset, address) in [(UInt64(0x80), queue.descriptorTable), (0x90, queue.availableRing), (0xa0, queue.usedRing)] {
            set(offset, UInt32(truncatingIfNeeded: address.rawValue))
            set(offset + 4, UInt32(truncatingIfNeeded: address.rawValue >> 32))
        }
        set(0x44, 1)
    }

    /// The whole way to DRIVER_OK.
    func bringUp(_ features: FeatureSet, _ queues: QueueConfiguration...) {
        negotiate(features)
        for queue in queues { setUp(queue) }
        set(0x70, 15)
    }
}

@Suite struct MMIOTransportTests {
    private let guest: TestGuest
    private let device = RecordingDevice()
    private let transport: MMIOTransport
    private let queue0: QueueConfiguration
    private let queue1: QueueConfiguration

    init() throws {
        guest = try TestGuest()
        transport = try MMIOTransport(device: device, memory: guest.memory)
        queue0 = DriverQueue(guest, index: 0, size: 8, base: 0x1000).configuration
        queue1 = DriverQueue(guest, index: 1, size: 64, base: TestGuest.highStart).configuration
    }

    private func isReady(_ queue: UInt32) -> Bool {
        transport.set(0x30, queue)
        return transport.get(0x44) == 1
    }

    // MARK: What a driver finds

    @Test func identity() {
        #expect(transport.get(0x00) == 0x7472_6976)
        #expect(transport.get(0x04) == 2)
        #expect(transport.get(0x08) == 42)
        #expect(transport.status == 0)
        transport.set(0x14, 0)
        #expect(transport.get(0x10) == 1 << 3 | 1 << 28 | 1 << 29)
        transport.set(0x14, 1)
        #expect(transport.get(0x10) == 1 << 0 | 1 << 8 | 1 << 18)
        for (select, word) in [(2, 1 << 2), (3, 1 << 31), (4, 0), (.max, 0)] as [(UInt32, UInt32)] {
            transport.set(0x14, select)
            #expect(transport.get(0x10) == word)
        }
        for (queue, maximum) in [(UInt32(0), UInt32(8)), (1, 256), (2, 0), (.max, 0)] {
            transport.set(0x30, queue)
            #expect(transport.get(0x34) == maximum)
            #expect(transport.get(0x44) == 0)
        }
        // No shared memory (§4.2.2).
        #expect([0xb0, 0xb4, 0xb8, 0xbc].allSatisfy { transport.get($0) == .max })
    }

    @Test func oddAccessesReadOnesAndWriteNothing() {
        transport.negotiate(.version1)
        for (offset, size) in [
            (UInt64(0x70), 1), (0x70, 2), (0x70, 8), (0x71, 4), (0x72, 4), (0x73, 1), (0xfe, 4), (0x70, 0), (0x70, 3),
        ] {
            let ones: [Int: UInt64] = [0: 0, 1: 0xff, 2: 0xffff, 3: 0xff_ffff, 4: 0xffff_ffff, 8: .max]
            #expect(transport.read(at: offset, size: size) == ones[size])
            transport.write(0, at: offset, size: size)
            #expect(transport.status == 11)
        }
        // Registers that are not there, and those that only take or only give.
        for offset in [UInt64(0x0c), 0x18, 0x1c, 0x28, 0x2c, 0x3c, 0x40, 0x48, 0x4c, 0x54, 0x58, 0x5c, 0x68, 0x74, 0x88, 0xac, 0xe0] {
            transport.set(offset, .max)
        }
        for offset in [UInt64(0x00), 0x04, 0x08, 0x10, 0x34, 0x60, 0xfc] { transport.set(offset, 0) }
        for offset in [UInt64(0x14), 0x20, 0x24, 0x30, 0x38, 0x50, 0x64, 0x80, 0x18, 0xe0] { #expect(transport.get(offset) == .max) }
        #expect(transport.get(0x04) == 2)
        #expect(transport.status == 11)
    }

    @Test func configurationSpace() {
        #expect(transport.read(at: 0x100, size: 1) == 0x11)
        #expect(transport.read(at: 0x102, size: 2) == 0x4433)
        #expect(transport.read(at: 0x104, size: 4) == 0x8877_6655)
        #expect(transport.read(at: 0x100, size: 8) == 0x8877_6655_4433_2211)
        #expect(transport.read(at: 0x108, size: 1) == 0x99)
        for (offset, size, ones) in [
            (UInt64(0x108), 2, UInt64(0xffff)), (0x108, 8, .max), (0x109, 1, 0xff), (0x101, 2, 0xffff), (0xffc, 4, 0xffff_ffff),
            (0x1000, 1, 0xff), (.max, 1, 0xff), (.max - 7, 8, .max), (0x102, 4, 0xffff_ffff),
        ] {
            #expect(transport.read(at: offset, size: size) == ones)
        }
        transport.write(0xffff_ab, at: 0x105, size: 1)
        transport.write(1, at: 0x101, size: 4)
        transport.write(1, at: .max, size: 1)
        #expect(device.events == [.write(0xab, offset: 5, size: 1)])

        #expect(transport.get(0xfc) == 0)
        device.configuration.update { $0[0] = 0xaa }
        #expect(transport.get(0xfc) == 1)
        #expect(transport.read(at: 0x100, size: 1) == 0xaa)
        device.configuration.update { $0[0] = 0xaa }
        #expect(transport.get(0xfc) == 1, "nothing has changed")
    }

    // MARK: Status and features

    @Test func theGoodOrder() throws {
        #expect(transport.negotiate([.version1, .eventIndex, RecordingDevice.wanted]) == 11)
        transport.setUp(queue0)
        transport.setUp(queue1)
        #expect(isReady(0) && isReady(1))
        transport.set(0x70, 15)
        #expect(transport.status == 15)
        #expect(device.events == [.reset, .activate([.version1, .eventIndex, RecordingDevice.wanted], ready: [true, true])])
        let activation = try #require(device.activation)
        #expect(activation.queues == [queue0, queue1.with(maximumSize: 256)])
        #expect(try activation.makeQueue(0) != nil)
        #expect(try activation.makeQueue(2) == nil)
    }

    @Test("Status bits too early", arguments: [UInt32(2), 4, 8, 10, 12, 14, 0x40, 0x10, 0x20, 0x100])
    func tooEarly(bits: UInt32) {
        transport.set(0x70, bits)
        #expect(transport.status == 0)
        #expect(device.events.isEmpty)
    }

    @Test func driverOKNeedsFeaturesOK() {
        transport.set(0x70, 1)
        transport.set(0x70, 3)
        transport.set(0x70, 7)
        #expect(transport.status == 3)
        // VERSION_1 was not written, so FEATURES_OK is refused and DRIVER_OK with it.
        transport.set(0x70, 15)
        #expect(transport.status == 3)
        #expect(device.events.isEmpty)
    }

    @Test func bitsStayUntilReset() {
        transport.bringUp(.version1, queue0)
        transport.set(0x70, 1)
        #expect(transport.status == 15)
        transport.set(0x70, 15)
        #expect(device.events == [.reset, .activate(.version1, ready: [true, false])], "activated twice")
        transport.set(0x70, 0)
        #expect(transport.status == 0)
        #expect(device.events.last == .reset)
        #expect(!isReady(0))
    }

    @Test("Features that are refused", arguments: [
        [], FeatureSet(bit: 3), [.version1, FeatureSet(bit: 0)], [.version1, FeatureSet(bit: 63)],
        [.version1, FeatureSet(bit: 33)], [.version1, RecordingDevice.disliked], FeatureSet(rawValue: .max),
    ] as [FeatureSet])
    func refused(features: FeatureSet) {
        #expect(transport.negotiate(features) == 3)
        transport.set(0x70, 15)
        #expect(transport.status == 3)
        // A driver may think again.
        for word in 0..<FeatureSet.words {
            transport.set(0x24, word)
            transport.set(0x20, word == 1 ? 1 : 0)
        }
        transport.set(0x70, 11)
        #expect(transport.status == 11)
    }

    @Test func featuresAboveBit63AreNegotiated() throws {
        let wanted: FeatureSet = [.version1, RecordingDevice.high, RecordingDevice.highest]
        transport.bringUp(wanted)
        #expect(transport.status == 15)
        #expect(try #require(device.activation).features == wanted)
        #expect(transport.negotiate([.version1, FeatureSet(bit: 64)]) == 3, "not offered")
        #expect(transport.negotiate([.version1, FeatureSet(bit: 126)]) == 3, "not offered")
    }

    @Test func featuresAboveBit127AreRefused() {
        transport.set(0x70, 1)
        transport.set(0x70, 3)
        transport.set(0x24, 1)
        transport.set(0x20, 1)
        transport.set(0x24, 4)
        transport.set(0x20, 0)
        transport.set(0x24, .max)
        transport.set(0x20, 1)
        transport.set(0x70, 11)
        #expect(transport.status == 3)
        #expect(transport.negotiate(.version1) == 11, "a reset forgets it")
    }

    @Test func featuresAreFrozenByFeaturesOK() {
        transport.negotiate(.version1)
        transport.set(0x24, 0)
        transport.set(0x20, 1 << 3)
        transport.set(0x70, 15)
        #expect(device.events.last == .activate(.version1, ready: [false, false]))
    }

    @Test func featuresBeforeDriverAreNotTaken() {
        transport.set(0x24, 1)
        transport.set(0x20, 1)
        transport.set(0x70, 1)
        transport.set(0x20, 1)
        transport.set(0x70, 3)
        transport.set(0x70, 11)
        #expect(transport.status == 3)
    }

    @Test func failedAllowsNothingButReset() {
        transport.negotiate(.version1)
        transport.set(0x70, 0x80)
        #expect(transport.status == 0x8b)
        transport.setUp(queue0)
        #expect(!isReady(0))
        transport.set(0x70, 15)
        #expect(transport.status == 0x8b)
        #expect(device.events == [.reset])
        transport.bringUp(.version1, queue0)
        #expect(transport.status == 15)
    }

    // MARK: Queues

    @Test func queuesAreSetUpBetweenFeaturesOKAndDriverOK() {
        transport.setUp(queue0)
        #expect(!isReady(0))
        transport.set(0x70, 1)
        transport.set(0x70, 3)
        transport.setUp(queue0)
        #expect(!isReady(0))
        transport.bringUp(.version1, queue0)
        transport.setUp(queue1)
        #expect(!isReady(1), "a queue set up after DRIVER_OK without VIRTIO_F_RING_RESET")
    }

    @Test func aReadyQueueIgnoresChanges() throws {
        transport.negotiate(.version1)
        transport.setUp(queue0)
        transport.set(0x38, 4)
        for offset in stride(from: UInt64(0x80), through: 0xa4, by: 4) { transport.set(offset, 0xdead_0000) }
        transport.set(0x70, 15)
        #expect(try #require(device.activation).queues[0] == queue0)
    }

    @Test func queuesThatAreNotThere() {
        transport.negotiate(.version1)
        for index in [UInt32(2), 3, 0x8000_0000, .max] {
            var queue = queue0
            queue = QueueConfiguration(index: 0, maximumSize: 8)
            queue.size = 8
            transport.set(0x30, index)
            transport.set(0x38, queue.size)
            transport.set(0x80, 0x1000)
            transport.set(0x44, 1)
            transport.set(0xc0, 1)
            #expect(transport.get(0x44) == 0)
        }
        #expect(!isReady(0) && !isReady(1))
    }

    @Test("Queues that are refused", arguments: [
        { $0.size = 0 }, { $0.size = 3 }, { $0.size = 16 }, { $0.size = .max },
        { $0.descriptorTable = GuestAddress(0x1008) }, { $0.availableRing = GuestAddress(0x2001) },
        { $0.usedRing = GuestAddress(0x2002) }, { $0.descriptorTable = GuestAddress(3 << 30) },
        { $0.availableRing = GuestAddress(TestGuest.lowSize - 8) }, { $0.usedRing = GuestAddress(.max - 15) },
        { $0.usedRing = GuestAddress(TestGuest.highStart + TestGuest.highSize) },
    ] as [@Sendable (inout QueueConfiguration) -> Void])
    func refusedQueues(mistake: @Sendable (inout QueueConfiguration) -> Void) {
        var queue = queue0
        mistake(&queue)
        transport.negotiate([.version1, .ringReset])
        transport.setUp(queue)
        #expect(!isReady(0))
        #expect(transport.counters.errors.value == 1)
        // The driver may mend it.
        transport.setUp(queue0)
        #expect(isReady(0))
    }

    @Test func valuesOfQueueReadyOtherThanOneAndZero() {
        transport.negotiate(.version1)
        transport.setUp(queue0)
        transport.set(0x44, 2)
        #expect(isReady(0))
        transport.set(0x44, 0)
        #expect(!isReady(0))
        transport.set(0x44, .max)
        #expect(!isReady(0))
        #expect(device.events == [.reset], "a queue was stopped that had not been started")
    }

    @Test func queueReadyZeroStopsALiveQueue() {
        transport.bringUp(.version1, queue0)
        transport.set(0x30, 0)
        transport.set(0x44, 0)
        #expect(!isReady(0))
        #expect(device.events.last == .stop(0))
    }

    @Test func queueResetAndBack() {
        transport.bringUp([.version1, .ringReset], queue0, queue1)
        transport.set(0x30, 1)
        #expect(transport.get(0xc0) == 0)
        transport.set(0xc0, 0)
        transport.set(0xc0, 2)
        #expect(isReady(1))
        transport.set(0xc0, 1)
        #expect(transport.get(0xc0) == 0 && !isReady(1))
        #expect(device.events.last == .stop(1))
        transport.set(0xc0, 1)
        #expect(device.events.filter { $0 == .stop(1) }.count == 1)

        var smaller = queue1
        smaller.size = 16
        transport.setUp(smaller)
        #expect(isReady(1))
        #expect(device.events.last == .start(smaller.with(maximumSize: 256)))
        #expect(isReady(0), "the other queue went on")
    }

    /// §4.2.2.1: after a reset of the queue QueueReady reads 0, in whatever state the device is.
    @Test func aQueueResetBeforeDriverOKLeavesNoReadyQueue() {
        transport.negotiate([.version1, .ringReset])
        transport.setUp(queue0)
        transport.setUp(queue1)
        transport.set(0x30, 1)
        transport.set(0xc0, 1)
        #expect(transport.get(0xc0) == 0 && !isReady(1) && isReady(0))
        // There is nothing yet that the device would have to stop, and the queue can be set up anew.
        #expect(device.events == [.reset])
        transport.setUp(queue1)
        #expect(isReady(1))
        transport.set(0x30, 1)
        transport.set(0xc0, 1)
        transport.set(0x70, 15)
        #expect(device.events.last == .activate([.version1, .ringReset], ready: [true, false]))
    }

    @Test func aQueueResetBeforeDriverOKThatWasNotNegotiated() {
        transport.negotiate(.version1)
        transport.setUp(queue0)
        transport.set(0x30, 0)
        transport.set(0xc0, 1)
        #expect(isReady(0))
    }

    @Test func theDeviceKnowsTheFeaturesFromFeaturesOKOn() {
        #expect(device.negotiatedFeatures == nil)
        transport.negotiate([.version1, RecordingDevice.disliked])
        #expect(device.negotiatedFeatures == nil, "refused")
        transport.negotiate([.version1, RecordingDevice.wanted])
        #expect(device.negotiatedFeatures == [.version1, RecordingDevice.wanted])
        #expect(device.activation == nil)
    }

    @Test func queueResetThatWasNotNegotiated() {
        transport.bringUp(.version1, queue0)
        transport.set(0x30, 0)
        transport.set(0xc0, 1)
        #expect(isReady(0))
        #expect(device.events.last == .activate(.version1, ready: [true, false]))
    }

    // MARK: Kicks and interrupts

    @Test func kicksThatReachUserSpaceSignalTheDoorbell() {
        for (value, size) in [(UInt64(1), 4), (1, 1), (1, 2), (1, 8), (0xabcd_0001, 2)] {
            transport.write(value, at: MMIOTransport.queueNotifyOffset, size: size)
        }
        for value in [UInt64(2), 0xffff_ffff, .max, 0x1_0000_0001] {
            transport.write(value, at: MMIOTransport.queueNotifyOffset, size: 8)
        }
        transport.write(1, at: 0x51, size: 1)
        #expect(transport.doorbells[0].event.drain() == 0)
        #expect(transport.doorbells[1].event.drain() == 5)
        #expect(transport.counters.exitKicks.value == 5)
    }

    @Test func interruptsStayUntilTheyAreAcknowledged() {
        transport.bringUp(.version1, queue0)
        #expect(transport.get(0x60) == 0)
        transport.interrupts.queues[0].signal()
        transport.interrupts.queues[0].signal()
        #expect(transport.get(0x60) == 1)
        #expect(transport.get(0x60) == 1, "reading acknowledged")
        transport.interrupts.configuration.signal()
        #expect(transport.get(0x60) == 3)
        #expect(transport.irqfd.event.drain() == 3)
        transport.set(0x64, 0)
        transport.set(0x64, 0xffff_fffc)
        #expect(transport.get(0x60) == 3)
        transport.set(0x64, 1)
        #expect(transport.get(0x60) == 2)
        transport.set(0x64, .max)
        #expect(transport.get(0x60) == 0)
        #expect(transport.counters.interrupts.value == 3)
    }

    @Test func needsResetIsSeenAndEndsWithTheReset() {
        transport.bringUp(.version1, queue0)
        transport.interrupts.configuration.markNeedsReset()
        #expect(transport.status == 0x4f)
        #expect(transport.get(0x60) == 2)
        transport.set(0x70, 0x0f)
        #expect(transport.status == 0x4f, "a driver cannot clear it")
        transport.set(0x70, 0)
        #expect(transport.status == 0)
        #expect(transport.get(0x60) == 0)
        transport.bringUp(.version1, queue0)
        #expect(transport.status == 0x0f)
    }

    @Test func aResetForgetsKicks() {
        transport.write(0, at: 0x50, size: 4)
        transport.set(0x70, 0)
        #expect(transport.doorbells[0].event.drain() == 0)
    }
}

extension QueueConfiguration {
    /// The same queue of a device that would take a larger one.
    func with(maximumSize: UInt16) -> QueueConfiguration {
        var queue = QueueConfiguration(index: index, maximumSize: maximumSize)
        (queue.size, queue.isReady) = (size, isReady)
        (queue.descriptorTable, queue.availableRing, queue.usedRing) = (descriptorTable, availableRing, usedRing)
        return queue
    }
}
