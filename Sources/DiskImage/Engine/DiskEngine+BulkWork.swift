// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

/// Work on bytes, which takes long and is done without the image's lock: other engines go on meanwhile.
///
/// What an operation needs *before* the queue can have it is put off where the operation begins, which is under the lock and in the middle of something, and
/// done by ``work()`` once the lock has been given back. What is needed *after* it, before its request may end, is done where it was taken from the queue
/// (``endRead(_:)``), where nothing is half done.
enum BulkWork: CaseIterable, Sendable {
    case encryption, decryption, decompression
    /// The new bytes of a cluster that is covered in part go over the old ones.
    case merging
    /// Zeroes for a reader of what is nowhere.
    case zeroes
}

extension DiskEngine {
    /// Operations that have begun and wait for such work, first in, first out. An operation is in no other list meanwhile.
    struct WorkList {
        var first: Int32 = -1
        var last: Int32 = -1
    }

    /// What an operation needs before it can be queued.
    private func workBefore(_ index: Int32) -> (merging: Bool, encryption: Bool, zeroes: Bool) {
        (operations[index].copy >= 0, encryption.encryptsWrites && operations[index].kind == .write, operations[index].kind == .zeroes)
    }

    /// Queues an operation that has begun, or puts that off if there is work to be done first.
    mutating func enqueueAfterWork(_ index: Int32) {
        guard workBefore(index) != (false, false, false) else { return enqueue(index) }
        // While it waits, nobody else can take the buffer that it needs.
        if operations[index].copy < 0 && operations[index].kind == .write { takeBuffer(index) }
        operations[index].next = -1
        if awaitingWork.first < 0 { awaitingWork.first = index } else { operations[awaitingWork.last].next = index }
        awaitingWork.last = index
    }

    /// Does what was put off, and queues its operations. Without the lock, whose holder may have put more off.
    mutating func work() {
        guard awaitingWork.first >= 0 else { return }
        shared.assertUnlocked()
        while awaitingWork.first >= 0 {
            let index = awaitingWork.first
            awaitingWork.first = operations[index].next
            // What it is about is the engine's own until it ends: the operation, its request, and the memory of both.
            let needs = workBefore(index)
            if needs.merging {
                shared.calls.bulkWork?(.merging)
                merge(index)
            }
            if needs.encryption {
                shared.calls.bulkWork?(.encryption)
                encrypt(index)
            }
            if needs.zeroes {
                shared.calls.bulkWork?(.zeroes)
                fill(operations[index].request, from: operations[index].start, length: operations[index].length)
            }
            enqueue(index)
        }
    }

    /// A reader's zeroes, at once where nobody waits for the lock.
    mutating func readZeroes(_ index: Int32, length: UInt64) {
        let start = requests[index].mapped
        if shared.isExclusive { fill(index, from: start, length: length) } else { begin(Operation(kind: .zeroes, request: index, start: start, length: length)) }
    }

    /// The old contents of a cluster are in its copy's buffer: what the request has for it goes over them.
    private func merge(_ operation: Int32) {
        let index = operations[operation].copy
        let copy = copies[index]
        let buffer = copies.buffer(index)
        // Of the cluster the request covers a part. Beyond the end of the disk there was nothing to be read.
        let readable = min(copy.size, image.size - copy.base)
        buffer.piece(Int(readable), Int(copy.size - readable)).clear()
        let target = buffer.piece(Int((requests[copy.owner].offset + copy.start) - copy.base), Int(copy.length))
        if requests[copy.owner].operation == .write {
            requests[copy.owner].segments?.copyOut(from: copy.start, to: target)
        } else {
            target.clear()
        }
    }

    // MARK: - After an operation, under the lock and where nothing is half done

    /// A read has brought its bytes, which may have to be decrypted.
    mutating func endRead(_ index: Int32) {
        let operation = operations[index]
        if encryption.isUsed, image.isEncrypted(operation.layer) {
            shared.unlock()
            shared.calls.bulkWork?(.decryption)
            decrypt(operation)
            shared.lock()
        }
        end(index, error: 0)
    }

    /// Metadata has been read, which may be a compressed cluster.
    mutating func endLoad(_ index: Int32) {
        if var load = operations[index].load, load.kind == .compressedCluster {
            shared.unlock()
            shared.calls.bulkWork?(.decompression)
            image.decompress(&load, bytes: Int(operations[index].done))
            shared.lock()
            operations[index].load = load
        }
        end(index, error: 0)
    }
}
