// SPDX-License-Identifier: Apache-2.0

internal import Virtio

/// What a ``BalloonDevice`` offers, and the size it begins with.
public struct BalloonSettings: Sendable, Equatable {
    /// Bytes of memory that the guest is to give up, a multiple of ``pageSize``.
    public var target: UInt64
    /// Indicates whether a guest may take memory back by itself when it has none left
    /// (VIRTIO_BALLOON_F_DEFLATE_ON_OOM).
    public var deflatesOnOOM: Bool
    /// Seconds from one request for the guest's statistics to the next; 0 for none (VIRTIO_BALLOON_F_STATS_VQ).
    public var statisticsInterval: UInt32
    /// Indicates whether the guest continuously reports what it does not use (VIRTIO_BALLOON_F_PAGE_REPORTING).
    public var reportsFreePages: Bool
    /// Indicates whether the guest can be asked for hints what it does not use (VIRTIO_BALLOON_F_FREE_PAGE_HINT).
    public var hintsFreePages: Bool

    public init(
        target: UInt64 = 0, deflatesOnOOM: Bool = false, statisticsInterval: UInt32 = 0,
        reportsFreePages: Bool = false, hintsFreePages: Bool = false
    ) {
        self.target = target
        self.deflatesOnOOM = deflatesOnOOM
        self.statisticsInterval = statisticsInterval
        self.reportsFreePages = reportsFreePages
        self.hintsFreePages = hintsFreePages
    }

    /// Bytes in a page of a balloon, whatever the pages of the host are (virtio 1.2 §5.5.6).
    public static let pageSize: UInt64 = 4096
    /// The largest ``target``: the number of its pages has 32 bits.
    public static let maximumTarget = UInt64(UInt32.max) * pageSize
    /// Seconds, the largest ``statisticsInterval``.
    public static let maximumInterval: UInt32 = 86_400

    var features: FeatureSet {
        var features: FeatureSet = .balloonMustTellHost
        if statisticsInterval > 0 { features.insert(.balloonStatistics) }
        if deflatesOnOOM { features.insert(.balloonDeflateOnOOM) }
        if hintsFreePages { features.insert(.balloonHints) }
        if reportsFreePages { features.insert(.balloonReports) }
        if hintsFreePages || reportsFreePages { features.insert(.balloonPoison) }
        return features
    }
}

extension FeatureSet {
    // Feature bits of balloons (virtio 1.2 §5.5.3).
    static let balloonMustTellHost = FeatureSet(bit: 0)
    static let balloonStatistics = FeatureSet(bit: 1)
    static let balloonDeflateOnOOM = FeatureSet(bit: 2)
    static let balloonHints = FeatureSet(bit: 3)
    static let balloonPoison = FeatureSet(bit: 4)
    static let balloonReports = FeatureSet(bit: 5)
}

/// The configuration space of a balloon (§5.5.4): four little-endian words.
enum BalloonField: Int {
    /// What the device wants, in pages.
    case target = 0
    /// What the driver says it has, in pages.
    case actual = 4
    /// The command of free page hinting.
    case hintCommand = 8
    /// What the driver fills free pages with.
    case poison = 12

    static let bytes = 16

    func store(_ value: UInt32, in bytes: inout [UInt8]) {
        for index in 0..<4 { bytes[rawValue + index] = UInt8(truncatingIfNeeded: value >> UInt32(8 * index)) }
    }
}

/// Values of ``BalloonField/hintCommand``; others are the numbers of runs (§5.5.6.5).
enum BalloonHintCommand {
    /// The device makes no use of hints.
    static let stop: UInt32 = 0
    /// The driver may use again what it gave hints about.
    static let done: UInt32 = 1
    static let firstRun: UInt32 = 2
}

/// A balloon's queues; their numbers are those of §5.5.2.
enum BalloonQueue: Int, CaseIterable {
    case inflate, deflate, statistics, hints, reports

    /// The queues in the order of their numbers.
    ///
    /// In the specification a number belongs to a queue, whether those before it exist or not. Linux' driver counts
    /// the queues that it has negotiated instead, as QEMU's device does. A driver that has made a queue ready which
    /// does not exist when they are counted has the specification's numbers.
    /// - Parameter ready: the numbers of the queues that the driver has made ready.
    static func order(_ features: FeatureSet, ready: some Sequence<Int>) -> [BalloonQueue] {
        let counted = allCases.filter { queue in
            switch queue {
            case .inflate, .deflate: true
            case .statistics: features.contains(.balloonStatistics)
            case .hints: features.contains(.balloonHints)
            case .reports: features.contains(.balloonReports)
            }
        }
        return (ready.max() ?? 0) < counted.count ? counted : allCases
    }
}
