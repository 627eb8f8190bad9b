// SPDX-License-Identifier: Apache-2.0

/// Processing of data, which takes long and is done without the image's lock: other engines continue meanwhile.
///
/// Work that must precede an operation's submission is deferred when the operation begins, which happens under the
/// lock, and done by ``RequestPipeline/work()`` once the lock has been released. Work that follows an operation, before
/// its request may complete, is done where the completion is taken from the queue (``RequestPipeline/complete(_:)``),
/// where no state is half changed.
enum BulkWork: CaseIterable, Sendable {
    case encryption, decryption, decompression
    /// The new bytes of a cluster that is covered in part go over the old ones.
    case merging
    /// Zeroes for a reader of what is nowhere.
    case zeroes
}
