// SPDX-License-Identifier: Apache-2.0

/// Neighbouring clusters of a qcow2 file, or blocks of another format, by their numbers.
struct ClusterRun {
    var first: UInt64
    var count: UInt64
    /// Indicates whether nothing was ever written there, so that the file reads as zeroes.
    var isPristine = false
    /// Of extended L2 entries: the subclusters that are written.
    var units: Range<Int> = 0..<32
    /// The guest has the cluster already, and gets subclusters of it.
    var isLinked = false
}
