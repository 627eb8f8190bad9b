// SPDX-License-Identifier: Apache-2.0

/// Work on bytes, which takes long and is done without the image's lock: other engines go on meanwhile.
///
/// What an operation needs *before* the queue can have it is put off where the operation begins, which is under the
/// lock and in the middle of something, and done by ``RequestPipeline/work()`` once the lock has been given back. What
/// is needed *after* it, before its request may end, is done where it was taken from the queue
/// (``RequestPipeline/complete(_:)``), where nothing is half done.
enum BulkWork: CaseIterable, Sendable {
    case encryption, decryption, decompression
    /// The new bytes of a cluster that is covered in part go over the old ones.
    case merging
    /// Zeroes for a reader of what is nowhere.
    case zeroes
}
