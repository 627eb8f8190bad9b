// SPDX-License-Identifier: Apache-2.0

internal import Linux
internal import Synchronization
internal import Virtio

/// Figures of a balloon at one moment. What the guest says is not verified.
public struct BalloonStatistics: Sendable, Equatable {
    /// Bytes that the guest is to give up.
    public var target: UInt64 = 0
    /// Bytes that the driver says it has given up.
    public var actual: UInt64 = 0
    /// Bytes that were returned to the host since the machine was started: those of the balloon, those that were
    /// reported as free, and those that hints were about.
    public var inflated: UInt64 = 0
    public var reported: UInt64 = 0
    public var hinted: UInt64 = 0
    /// All of them.
    public var returned: UInt64 { inflated &+ reported &+ hinted }
    /// Pages that are not RAM, and that the driver has put into the balloon or reported.
    public var refusedPages: UInt64 = 0
    /// The command of free page hinting that the guest can read: 0 for none, 1 at the end of a run, or the run's
    /// number.
    public var hintCommand: UInt32 = 0
    /// The command that the guest answered last, 0 at the end of its hints; nil before the first one.
    public var guestHintCommand: UInt32?
    /// Seconds from one request for ``guest`` to the next; 0 for none.
    public var interval: UInt32 = 0
    /// What the guest has said about its memory; nil for what it has not said.
    public var guest = Guest()

    /// The figures of a guest's statistics (virtio 1.2 §5.5.6.3): bytes, or numbers since its start.
    public struct Guest: Sendable, Equatable {
        /// Memory swapped in and out, bytes.
        public var swapIn: UInt64?
        public var swapOut: UInt64?
        /// Page faults.
        public var majorFaults: UInt64?
        public var minorFaults: UInt64?
        /// Memory that is not used for anything, bytes.
        public var free: UInt64?
        /// All of it, bytes.
        public var total: UInt64?
        /// What new programs could have without swapping, bytes.
        public var available: UInt64?
        /// What can be reclaimed without I/O, bytes.
        public var caches: UInt64?
        /// Huge pages that were allocated, and that could not be.
        public var hugePageAllocations: UInt64?
        public var hugePageFailures: UInt64?
        /// Kills for lack of memory.
        public var oomKills: UInt64?
        /// Allocations that had to wait.
        public var allocationStalls: UInt64?
        /// Pages that were scanned, and reclaimed, in the background and by those who needed them.
        public var scannedAsynchronously: UInt64?
        public var scannedDirectly: UInt64?
        public var reclaimedAsynchronously: UInt64?
        public var reclaimedDirectly: UInt64?

        public init() {}

        /// Stores a figure by its tag (§5.5.6.3; from 10 on, those of virtio 1.4). Others are ignored.
        private mutating func store(_ value: UInt64, tag: UInt16) {
            switch tag {
            case 0: swapIn = value
            case 1: swapOut = value
            case 2: majorFaults = value
            case 3: minorFaults = value
            case 4: free = value
            case 5: total = value
            case 6: available = value
            case 7: caches = value
            case 8: hugePageAllocations = value
            case 9: hugePageFailures = value
            case 10: oomKills = value
            case 11: allocationStalls = value
            case 12: scannedAsynchronously = value
            case 13: scannedDirectly = value
            case 14: reclaimedAsynchronously = value
            case 15: reclaimedDirectly = value
            default: break
            }
        }

        /// Bytes of an entry: a tag and a value.
        static let entrySize: UInt64 = 10
        /// As many entries are read of a buffer: more than there are tags.
        static let maximumEntries = 64

        /// Takes over what a driver's buffer has. Unknown tags are ignored, figures that it lacks stay.
        mutating func update(_ buffer: IOVectors) {
            for entry in 0..<UInt64(Self.maximumEntries) {
                guard let tag = buffer.load(UInt16.self, at: entry * Self.entrySize),
                    let value = buffer.load(UInt64.self, at: entry * Self.entrySize + 2)
                else { return }
                store(value, tag: tag)
            }
        }
    }

    public init() {}
}

/// What the device, its engine and the driver know of a balloon. Any thread may use it.
final class BalloonState: Sendable {
    let target: Atomic<UInt32>
    let actual = Atomic<UInt32>(0)
    /// What the driver fills free pages with.
    let poison = Atomic<UInt32>(0)
    let hintCommand = Atomic<UInt32>(BalloonHintCommand.stop)
    let interval: Atomic<UInt32>
    let inflated = DeviceCounters.Counter()
    let reported = DeviceCounters.Counter()
    let hinted = DeviceCounters.Counter()
    let refused = DeviceCounters.Counter()
    let guest = Guarded(BalloonStatistics.Guest())
    let guestHintCommand = Guarded<UInt32?>(nil)

    init(_ settings: BalloonSettings) {
        target = Atomic(UInt32(clamping: settings.target / BalloonSettings.pageSize))
        interval = Atomic(settings.statisticsInterval)
    }

    var statistics: BalloonStatistics {
        var statistics = BalloonStatistics()
        statistics.target = UInt64(target.load(ordering: .relaxed)) * BalloonSettings.pageSize
        statistics.actual = UInt64(actual.load(ordering: .relaxed)) * BalloonSettings.pageSize
        statistics.inflated = inflated.value
        statistics.reported = reported.value
        statistics.hinted = hinted.value
        statistics.refusedPages = refused.value
        statistics.hintCommand = hintCommand.load(ordering: .relaxed)
        statistics.guestHintCommand = guestHintCommand.withLock { $0 }
        statistics.interval = interval.load(ordering: .relaxed)
        statistics.guest = guest.withLock { $0 }
        return statistics
    }
}
