// SPDX-License-Identifier: Apache-2.0

import Linux
import TestSupport
import Testing

@testable import GuestMemory
@testable import Virtio

/// What a driver may do, and what the device hears of it: the same behind every transport (``TransportKind``).
@Suite(.timed) struct VirtioFunctionTests {
    private let guest: TestGuest
    private let device = RecordingDevice()
    private let queue0: QueueConfiguration
    private let queue1: QueueConfiguration

    init() throws {
        guest = try TestGuest()
        queue0 = DriverQueue(guest, index: 0, size: 8, base: 0x1000).configuration
        queue1 = DriverQueue(guest, index: 1, size: 64, base: TestGuest.highStart).configuration
    }

    private func make(_ kind: TransportKind) throws -> any TransportHarness { try kind.make(device, guest.memory) }

    // MARK: What a driver finds

    @Test(arguments: TransportKind.allCases) func identity(_ kind: TransportKind) throws {
        let transport = try make(kind)
        #expect(transport.deviceID == 42)
        #expect(transport.status == 0)
        let words = [1 << 3 | 1 << 28 | 1 << 29, 1 << 0 | 1 << 8 | 1 << 18, 1 << 2, 1 << 31] as [UInt32]
        #expect((0..<4).map { transport.deviceFeatures(word: $0) } == words)
        for word in [4, 5, .max] as [UInt32] { #expect(transport.deviceFeatures(word: word) == 0) }
        for (queue, maximum) in [(0, 8), (1, 256), (2, 0), (.max, 0)] as [(UInt32, UInt32)] {
            #expect(transport.maximumSize(ofQueue: queue) == maximum)
            #expect(!transport.isReady(queue: queue))
        }
    }

    @Test(arguments: TransportKind.allCases) func configurationSpace(_ kind: TransportKind) throws {
        let transport = try make(kind)
        #expect(transport.readConfiguration(at: 0, size: 1) == 0x11)
        #expect(transport.readConfiguration(at: 2, size: 2) == 0x4433)
        #expect(transport.readConfiguration(at: 4, size: 4) == 0x8877_6655)
        #expect(transport.readConfiguration(at: 0, size: 8) == 0x8877_6655_4433_2211)
        #expect(transport.readConfiguration(at: 8, size: 1) == 0x99)
        for (offset, size, ones) in [
            (8, 2, 0xffff), (8, 8, .max), (9, 1, 0xff), (1, 2, 0xffff), (2, 4, 0xffff_ffff), (0, 3, 0xff_ffff),
            (0x800, 4, 0xffff_ffff),
        ] as [(UInt64, Int, UInt64)] {
            #expect(transport.readConfiguration(at: offset, size: size) == ones)
        }
        transport.writeConfiguration(0xffff_ab, at: 5, size: 1)
        transport.writeConfiguration(1, at: 1, size: 4)
        transport.writeConfiguration(1, at: 0, size: 3)
        #expect(device.events == [.write(0xab, offset: 5, size: 1)])

        #expect(transport.configurationGeneration == 0)
        device.configuration.update { $0[0] = 0xaa }
        #expect(transport.configurationGeneration == 1)
        #expect(transport.readConfiguration(at: 0, size: 1) == 0xaa)
        device.configuration.update { $0[0] = 0xaa }
        #expect(transport.configurationGeneration == 1, "nothing has changed")
    }

    @Test func configurationOffsetsBeyondAllBounds() throws {
        let function = try BareFunction(device: device, memory: guest.memory, queues: .split).function
        for offset in [.max, .max - 7, 1 << 63, UInt64(Int.max) - 7] as [UInt64] {
            #expect(function.readConfiguration(at: offset, size: 1) == 0xff)
            #expect(function.readConfiguration(at: offset & ~7, size: 8) == .max)
            function.writeConfiguration(1, at: offset, size: 1)
        }
        // Offsets that there might be are the device's affair.
        #expect(device.events == [.write(1, offset: Int.max - 7, size: 1)])
    }

    // MARK: Status and features

    @Test(arguments: TransportKind.allCases) func theGoodOrder(_ kind: TransportKind) throws {
        let transport = try make(kind)
        #expect(transport.negotiate([.version1, .eventIndex, RecordingDevice.wanted]) == 11)
        transport.setUp(queue0)
        transport.setUp(queue1)
        #expect(transport.isReady(queue: 0) && transport.isReady(queue: 1))
        transport.status = 15
        #expect(transport.status == 15)
        #expect(
            device.events == [
                .reset, .activate([.version1, .eventIndex, RecordingDevice.wanted], ready: [true, true]),
            ])
        let activation = try #require(device.activation)
        #expect(activation.queues == [queue0, queue1.with(maximumSize: 256)])
        #expect(activation.interrupts.queues.count == 2 && activation.doorbells.count == 2)
        #expect(try activation.makeQueue(0) != nil)
        #expect(try activation.makeQueue(2) == nil)
    }

    @Test(
        "Status bits too early", arguments: TransportKind.allCases, [2, 4, 8, 10, 12, 14, 0x40, 0x10, 0x20] as [UInt32])
    func tooEarly(_ kind: TransportKind, bits: UInt32) throws {
        let transport = try make(kind)
        transport.status = bits
        #expect(transport.status == 0)
        #expect(device.events.isEmpty)
    }

    @Test(arguments: TransportKind.allCases) func driverOKNeedsFeaturesOK(_ kind: TransportKind) throws {
        let transport = try make(kind)
        for value: UInt32 in [1, 3, 7] { transport.status = value }
        #expect(transport.status == 3)
        // VERSION_1 was not written, so FEATURES_OK is refused and DRIVER_OK with it.
        transport.status = 15
        #expect(transport.status == 3)
        #expect(device.events.isEmpty)
    }

    @Test(arguments: TransportKind.allCases) func bitsStayUntilReset(_ kind: TransportKind) throws {
        let transport = try make(kind)
        transport.bringUp(.version1, queue0)
        transport.status = 1
        #expect(transport.status == 15)
        transport.status = 15
        #expect(device.events == [.reset, .activate(.version1, ready: [true, false])], "activated twice")
        transport.status = 0
        #expect(transport.status == 0)
        #expect(device.events.last == .reset)
        #expect(!transport.isReady(queue: 0))
    }

    @Test(
        "Features that are refused", arguments: TransportKind.allCases,
        [
            [], FeatureSet(bit: 3), [.version1, FeatureSet(bit: 0)], [.version1, FeatureSet(bit: 63)],
            [.version1, FeatureSet(bit: 33)], [.version1, FeatureSet(bit: 64)], [.version1, FeatureSet(bit: 126)],
            [.version1, RecordingDevice.disliked], FeatureSet(rawValue: .max),
        ] as [FeatureSet])
    func refused(_ kind: TransportKind, features: FeatureSet) throws {
        let transport = try make(kind)
        #expect(transport.negotiate(features) == 3)
        transport.status = 15
        #expect(transport.status == 3)
        // A driver may think again.
        for word in 0..<FeatureSet.words { transport.setDriverFeatures(word: word, to: word == 1 ? 1 : 0) }
        transport.status = 11
        #expect(transport.status == 11)
    }

    @Test(arguments: TransportKind.allCases) func featuresAboveBit63AreNegotiated(_ kind: TransportKind) throws {
        let transport = try make(kind)
        let wanted: FeatureSet = [.version1, RecordingDevice.high, RecordingDevice.highest]
        transport.bringUp(wanted)
        #expect(transport.status == 15)
        #expect(try #require(device.activation).features == wanted)
    }

    /// Packed queues are there for drivers that want them, if the machine offers them.
    @Test(arguments: TransportKind.allCases) func packedQueues(_ kind: TransportKind) throws {
        var ring = queue0
        (ring.size, ring.availableRing, ring.usedRing) = (
            3, ring.descriptorTable &+ 0x100, ring.descriptorTable &+ 0x104
        )
        let without = try make(kind)
        #expect(without.deviceFeatures(word: 1) & 4 == 0)
        #expect(without.negotiate([.version1, .packedRing]) == 3, "not offered")

        let transport = try kind.make(device, guest.memory, queues: .packed)
        #expect(transport.deviceFeatures(word: 1) & 4 != 0)
        transport.bringUp([.version1, .packedRing], ring)
        #expect(transport.isReady(queue: 0), "a size that is no power of two")
        let packed = try #require(device.activation)
        #expect(packed.features == [.version1, .packedRing])
        #expect(try packed.makeQueue(0)?.size == 3)

        transport.bringUp(.version1, ring)
        #expect(!transport.isReady(queue: 0), "not a split queue")
        transport.bringUp(.version1, queue0)
        #expect(transport.isReady(queue: 0))
        #expect(try #require(device.activation).features == .version1)
    }

    @Test(arguments: TransportKind.allCases) func featuresAboveBit127AreRefused(_ kind: TransportKind) throws {
        let transport = try make(kind)
        transport.status = 1
        transport.status = 3
        transport.setDriverFeatures(word: 1, to: 1)
        transport.setDriverFeatures(word: 4, to: 0)
        transport.setDriverFeatures(word: .max, to: 1)
        transport.status = 11
        #expect(transport.status == 3)
        #expect(transport.negotiate(.version1) == 11, "a reset forgets it")
    }

    @Test(arguments: TransportKind.allCases) func featuresAreFrozenByFeaturesOK(_ kind: TransportKind) throws {
        let transport = try make(kind)
        transport.negotiate(.version1)
        transport.setDriverFeatures(word: 0, to: 1 << 3)
        transport.status = 15
        #expect(device.events.last == .activate(.version1, ready: [false, false]))
    }

    @Test(arguments: TransportKind.allCases) func featuresBeforeDriverAreNotTaken(_ kind: TransportKind) throws {
        let transport = try make(kind)
        transport.setDriverFeatures(word: 1, to: 1)
        transport.status = 1
        transport.setDriverFeatures(word: 1, to: 1)
        transport.status = 3
        transport.status = 11
        #expect(transport.status == 3)
    }

    @Test(arguments: TransportKind.allCases) func theDeviceKnowsTheFeaturesFromFeaturesOKOn(
        _ kind: TransportKind
    ) throws {
        let transport = try make(kind)
        #expect(device.negotiatedFeatures == nil)
        transport.negotiate([.version1, RecordingDevice.disliked])
        #expect(device.negotiatedFeatures == nil, "refused")
        transport.negotiate([.version1, RecordingDevice.wanted])
        #expect(device.negotiatedFeatures == [.version1, RecordingDevice.wanted])
        #expect(device.activation == nil)
    }

    @Test(arguments: TransportKind.allCases) func failedAllowsNothingButReset(_ kind: TransportKind) throws {
        let transport = try make(kind)
        transport.negotiate(.version1)
        transport.status = 0x80
        #expect(transport.status == 0x8b)
        transport.setUp(queue0)
        #expect(!transport.isReady(queue: 0))
        transport.status = 15
        #expect(transport.status == 0x8b)
        #expect(device.events == [.reset])
        transport.bringUp(.version1, queue0)
        #expect(transport.status == 15)
    }

    // MARK: Queues

    @Test(arguments: TransportKind.allCases) func queuesAreSetUpBetweenFeaturesOKAndDriverOK(
        _ kind: TransportKind
    ) throws {
        let transport = try make(kind)
        transport.setUp(queue0)
        #expect(!transport.isReady(queue: 0))
        transport.status = 1
        transport.status = 3
        transport.setUp(queue0)
        #expect(!transport.isReady(queue: 0))
        transport.bringUp(.version1, queue0)
        transport.setUp(queue1)
        #expect(!transport.isReady(queue: 1), "a queue set up after DRIVER_OK without VIRTIO_F_RING_RESET")
    }

    @Test(arguments: TransportKind.allCases) func aReadyQueueIgnoresChanges(_ kind: TransportKind) throws {
        let transport = try make(kind)
        transport.negotiate(.version1)
        transport.setUp(queue0)
        var other = queue0
        other.size = 4
        other.descriptorTable = GuestAddress(0xdead_0000_dead_0000)
        (other.availableRing, other.usedRing) = (other.descriptorTable, other.descriptorTable)
        transport.configure(queue: 0, as: other)
        transport.status = 15
        #expect(try #require(device.activation).queues[0] == queue0)
    }

    @Test(arguments: TransportKind.allCases) func aQueueThatIsOnlyConfiguredIsNotReady(_ kind: TransportKind) throws {
        let transport = try make(kind)
        transport.negotiate(.version1)
        transport.configure(queue: 0, as: queue0)
        #expect(!transport.isReady(queue: 0))
        transport.status = 15
        #expect(device.events.last == .activate(.version1, ready: [false, false]))
    }

    @Test(arguments: TransportKind.allCases) func queuesThatAreNotThere(_ kind: TransportKind) throws {
        let transport = try make(kind)
        transport.negotiate([.version1, .ringReset])
        for queue in [2, 3, 0x8000_0000, .max] as [UInt32] {
            transport.configure(queue: queue, as: queue0)
            transport.enable(queue: queue)
            _ = transport.disable(queue: queue)
            transport.reset(queue: queue)
            transport.kick(queue: queue)
            #expect(!transport.isReady(queue: queue))
        }
        #expect(!transport.isReady(queue: 0) && !transport.isReady(queue: 1))
        #expect(device.events == [.reset] && transport.function.counters.exitKicks.value == 0)
    }

    @Test(
        "Queues that are refused", arguments: TransportKind.allCases,
        [
            { $0.size = 0 }, { $0.size = 3 }, { $0.size = 16 }, { $0.size = 0x8000 },
            { $0.descriptorTable = GuestAddress(0x1008) }, { $0.availableRing = GuestAddress(0x2001) },
            { $0.usedRing = GuestAddress(0x2002) }, { $0.descriptorTable = GuestAddress(3 << 30) },
            { $0.availableRing = GuestAddress(TestGuest.lowSize - 8) }, { $0.usedRing = GuestAddress(.max - 15) },
            { $0.usedRing = GuestAddress(TestGuest.highStart + TestGuest.highSize) },
        ] as [@Sendable (inout QueueConfiguration) -> Void])
    func refusedQueues(_ kind: TransportKind, mistake: @Sendable (inout QueueConfiguration) -> Void) throws {
        let transport = try make(kind)
        var queue = queue0
        mistake(&queue)
        transport.negotiate([.version1, .ringReset])
        transport.setUp(queue)
        #expect(!transport.isReady(queue: 0))
        #expect(transport.function.counters.errors.value == 1)
        // The driver may correct it.
        transport.setUp(queue0)
        #expect(transport.isReady(queue: 0))
    }

    @Test(arguments: TransportKind.allCases) func aDisabledQueueIsStoppedAndKeepsItsConfiguration(
        _ kind: TransportKind
    ) throws {
        let transport = try make(kind)
        transport.negotiate([.version1, .ringReset])
        transport.setUp(queue0)
        guard transport.disable(queue: 0) else { return }
        #expect(!transport.isReady(queue: 0))
        #expect(device.events == [.reset], "a queue was stopped that had not been started")
        transport.enable(queue: 0)
        transport.status = 15
        _ = transport.disable(queue: 0)
        #expect(!transport.isReady(queue: 0))
        #expect(device.events.last == .stop(0))
        _ = transport.disable(queue: 0)
        #expect(device.events.filter { $0 == .stop(0) }.count == 1)
        transport.enable(queue: 0)
        #expect(device.events.last == .start(queue0))
    }

    @Test(arguments: TransportKind.allCases) func queueResetAndBack(_ kind: TransportKind) throws {
        let transport = try make(kind)
        transport.bringUp([.version1, .ringReset], queue0, queue1)
        transport.reset(queue: 1)
        #expect(!transport.isReady(queue: 1))
        #expect(device.events.last == .stop(1))
        transport.reset(queue: 1)
        #expect(device.events.filter { $0 == .stop(1) }.count == 1)

        var smaller = queue1
        smaller.size = 16
        transport.setUp(smaller)
        #expect(transport.isReady(queue: 1))
        #expect(device.events.last == .start(smaller.with(maximumSize: 256)))
        #expect(transport.isReady(queue: 0), "the other queue went on")
    }

    @Test(arguments: TransportKind.allCases) func aQueueResetForgetsItsConfiguration(_ kind: TransportKind) throws {
        let transport = try make(kind)
        transport.bringUp([.version1, .ringReset], queue0)
        transport.reset(queue: 0)
        #expect(try #require(transport.function.queue(0)) == QueueConfiguration(index: 0, maximumSize: 8))
    }

    /// §4.2.2.1: after a reset of the queue QueueReady reads 0, in whatever state the device is.
    @Test(arguments: TransportKind.allCases) func aQueueResetBeforeDriverOKLeavesNoReadyQueue(
        _ kind: TransportKind
    ) throws {
        let transport = try make(kind)
        transport.negotiate([.version1, .ringReset])
        transport.setUp(queue0)
        transport.setUp(queue1)
        transport.reset(queue: 1)
        #expect(!transport.isReady(queue: 1) && transport.isReady(queue: 0))
        // There is nothing yet that the device would have to stop, and the queue can be set up anew.
        #expect(device.events == [.reset])
        transport.setUp(queue1)
        #expect(transport.isReady(queue: 1))
        transport.reset(queue: 1)
        transport.status = 15
        #expect(device.events.last == .activate([.version1, .ringReset], ready: [true, false]))
    }

    @Test(arguments: TransportKind.allCases) func queueResetThatWasNotNegotiated(_ kind: TransportKind) throws {
        let transport = try make(kind)
        transport.negotiate(.version1)
        transport.setUp(queue0)
        transport.reset(queue: 0)
        #expect(transport.isReady(queue: 0), "before DRIVER_OK")
        transport.status = 15
        transport.reset(queue: 0)
        #expect(transport.isReady(queue: 0))
        #expect(device.events.last == .activate(.version1, ready: [true, false]))
    }

    // MARK: Kicks and interrupts

    @Test(arguments: TransportKind.allCases) func kicksSignalTheQueuesDoorbell(_ kind: TransportKind) throws {
        let transport = try make(kind), doorbells = transport.function.doorbells
        for _ in 0..<3 { transport.kick(queue: 1) }
        transport.kick(queue: 0)
        #expect(doorbells[1].event.drain() == 3 && doorbells[0].event.drain() == 1)
        #expect(transport.function.counters.exitKicks.value == 4)
    }

    @Test(arguments: TransportKind.allCases) func aResetForgetsKicks(_ kind: TransportKind) throws {
        let transport = try make(kind)
        transport.kick(queue: 0)
        transport.status = 0
        #expect(transport.function.doorbells[0].event.drain() == 0)
    }

    @Test(arguments: TransportKind.allCases) func interruptsOfQueuesAndConfigurationArrive(_ kind: TransportKind) throws
    {
        let transport = try make(kind)
        transport.bringUp(.version1, queue0, queue1)
        let interrupts = try #require(device.activation).interrupts
        #expect(
            !transport.takeInterrupt(ofQueue: 0) && !transport.takeInterrupt(ofQueue: 1)
                && !transport.takeConfigurationInterrupt())
        for queue in 0..<2 {
            interrupts.queues[queue].signal()
            interrupts.queues[queue].signal()
            #expect(!transport.takeConfigurationInterrupt())
            #expect(transport.takeInterrupt(ofQueue: queue))
            #expect(!transport.takeInterrupt(ofQueue: queue), "taken twice")
        }
        interrupts.configuration.signal()
        interrupts.queues[1].signal()
        #expect(transport.takeConfigurationInterrupt() && transport.takeInterrupt(ofQueue: 1))
        #expect(!transport.takeConfigurationInterrupt() && !transport.takeInterrupt(ofQueue: 1))
        #expect(transport.function.counters.interrupts.value == 6)
    }

    @Test(arguments: TransportKind.allCases) func needsResetIsSeenAndEndsWithTheReset(_ kind: TransportKind) throws {
        let transport = try make(kind)
        transport.bringUp(.version1, queue0)
        try #require(device.activation).interrupts.configuration.markNeedsReset()
        #expect(transport.status == 0x4f)
        #expect(transport.takeConfigurationInterrupt())
        transport.status = 0x0f
        #expect(transport.status == 0x4f, "a driver cannot clear it")
        transport.status = 0
        #expect(transport.status == 0)
        transport.bringUp(.version1, queue0)
        #expect(transport.status == 0x0f)
    }

    /// A driver that polls the status for the end of its reset finds everything set back.
    @Test func theTransportIsResetWhileTheDeviceIsQuietAndBeforeTheStatusSaysSo() throws {
        let counters = DeviceCounters(), irqfd = try IRQFD(), seen = Guarded<[[RecordingDevice.Event]]>([])
        let function = try VirtioFunction(
            device, memory: guest.memory,
            interrupts: DeviceInterrupts(
                configuration: ConfigurationInterrupt(irqfd, counters: counters),
                queues: [QueueInterrupt(irqfd, counters: counters), QueueInterrupt(irqfd, counters: counters)]),
            counters: counters, queues: .split,
            resetTransport: { [device] in seen.withLock { $0.append(device.events) } })
        function.writeStatus(1)
        #expect(seen.withLock { $0 }.isEmpty)
        function.writeStatus(0)
        #expect(seen.withLock { $0 } == [[.reset]])
        #expect(function.status == [])
    }
}
