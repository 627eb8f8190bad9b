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
    private func workBefore(_ operation: UnsafeMutablePointer<Operation>) -> (merging: Bool, encryption: Bool, zeroes: Bool) {
        // The caller's, of this engine.
        unsafe (operation.pointee.copy >= 0, encryption.encryptsWrites && operation.pointee.kind == .write, operation.pointee.kind == .zeroes)
    }

    /// Queues an operation that has begun, or puts that off if there is work to be done first.
    mutating func enqueueAfterWork(_ index: Int32) {
        // Indices of operations come from our own lists, so they are in bounds, here and below.
        let operation = unsafe operations + Int(index)
        guard unsafe workBefore(operation) != (false, false, false) else { return enqueue(index) }
        // While it waits, nobody else can take the buffer that it needs.
        if unsafe operation.pointee.copy < 0 && operation.pointee.kind == .write { unsafe takeBuffer(operation) }
        unsafe operation.pointee.next = -1
        if awaitingWork.first < 0 { awaitingWork.first = index } else { unsafe operations[Int(awaitingWork.last)].next = index }
        awaitingWork.last = index
    }

    /// Does what was put off, and queues its operations. Without the lock, whose holder may have put more off.
    mutating func work() {
        guard awaitingWork.first >= 0 else { return }
        shared.assertUnlocked()
        while awaitingWork.first >= 0 {
            let index = awaitingWork.first
            let operation = unsafe operations + Int(index)
            unsafe awaitingWork.first = operation.pointee.next
            // What it is about is the engine's own until it ends: the operation, its request, and the memory of both.
            let needs = unsafe workBefore(operation)
            if needs.merging {
                shared.calls.bulkWork?(.merging)
                unsafe merge(operation)
            }
            if needs.encryption {
                shared.calls.bulkWork?(.encryption)
                unsafe encrypt(operation)
            }
            if needs.zeroes {
                shared.calls.bulkWork?(.zeroes)
                unsafe fill(operation.pointee.request, from: operation.pointee.start, length: operation.pointee.length)
            }
            enqueue(index)
        }
    }

    /// A reader's zeroes, at once where nobody waits for the lock.
    mutating func readZeroes(_ index: Int32, length: UInt64) {
        let start = unsafe requests[Int(index)].mapped
        if shared.isExclusive { fill(index, from: start, length: length) } else { begin(Operation(kind: .zeroes, request: index, start: start, length: length)) }
    }

    /// The old contents of a cluster are in its copy's buffer: what the request has for it goes over them.
    private func merge(_ operation: UnsafeMutablePointer<Operation>) {
        let index = unsafe operation.pointee.copy
        let copy = copies[index]
        let owner = unsafe requests + Int(copy.owner)
        let buffer = unsafe copies.buffer(index)
        // The buffer has room for the cluster, whose part the request covers. Beyond the end of the disk there was nothing to be read.
        let readable = min(copy.size, image.size - copy.base)
        unsafe (buffer + Int(readable)).initializeMemory(as: UInt8.self, repeating: 0, count: Int(copy.size - readable))
        var target = unsafe buffer + Int(unsafe (owner.pointee.offset + copy.start) - copy.base)
        if unsafe owner.pointee.operation == .write {
            // Guest RAM: read through the helpers that the compiler does not look into.
            unsafe forEachPiece(copy.owner, from: copy.start, length: copy.length) { base, count in
                unsafe clinux_copy(target, base, count)
                unsafe target += count
            }
        } else {
            unsafe target.initializeMemory(as: UInt8.self, repeating: 0, count: Int(copy.length))
        }
    }

    // MARK: - After an operation, under the lock and where nothing is half done

    /// A read has brought its bytes, which may have to be decrypted.
    mutating func endRead(_ index: Int32) {
        let operation = unsafe operations[Int(index)]
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
        let operation = unsafe operations + Int(index)
        if var load = unsafe operation.pointee.load, load.kind == .compressedCluster {
            shared.unlock()
            shared.calls.bulkWork?(.decompression)
            unsafe image.decompress(&load, bytes: Int(operation.pointee.done))
            shared.lock()
            unsafe operation.pointee.load = load
        }
        end(index, error: 0)
    }
}
