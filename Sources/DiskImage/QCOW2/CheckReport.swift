// SPDX-License-Identifier: Apache-2.0

/// The result of a check of an image's metadata, like that of `qemu-img check`.
public struct CheckReport: Equatable, Sendable {
    /// The kinds of problems to repair.
    public enum Repair: String, Sendable, CaseIterable {
        /// Clusters with a refcount that are not used are freed.
        case leaks
        /// Leaks and everything else. Entries that cannot be right become zeroes.
        case all
    }

    /// Something that is not as it has to be.
    public struct Finding: Equatable, Sendable, CustomStringConvertible {
        /// Space that is lost; every other finding is an error.
        public let isLeak: Bool
        public let description: String
    }

    /// Errors left, each of which may have cost data or may cost some with the next write.
    public internal(set) var errors = 0
    /// Clusters left that are counted more often than they are used.
    public internal(set) var leaks = 0
    public internal(set) var errorsFixed = 0
    public internal(set) var leaksFixed = 0
    /// The first of what was found, fixed or not.
    public internal(set) var findings: [Finding] = []
    /// Clusters of the disk.
    public internal(set) var totalClusters: UInt64 = 0
    /// The number of allocated clusters.
    public internal(set) var allocatedClusters: UInt64 = 0
    public internal(set) var compressedClusters: UInt64 = 0
    /// The number of clusters that do not follow the previous one in the file.
    public internal(set) var fragmentedClusters: UInt64 = 0
    /// The end of the last used cluster, in bytes.
    public internal(set) var imageEnd: UInt64 = 0

    /// Findings that are described; more are only counted.
    static let maximumFindings = 1000

    public var isSound: Bool { errors == 0 && leaks == 0 }

    mutating func error(_ description: @autoclosure () -> String) {
        errors += 1
        if findings.count < Self.maximumFindings { findings.append(Finding(isLeak: false, description: description())) }
    }

    mutating func leak(_ description: @autoclosure () -> String) {
        leaks += 1
        if findings.count < Self.maximumFindings { findings.append(Finding(isLeak: true, description: description())) }
    }
}
