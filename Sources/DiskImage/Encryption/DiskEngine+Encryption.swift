// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// What an engine has for an image whose data is encrypted: buffers in which what is written is encrypted. The memory of requests is the guest's,
/// where nothing is changed by a write; what is read is decrypted there.
@safe struct EngineEncryption: ~Copyable {
    /// Indicates whether the data of any image of the chain is encrypted.
    let isUsed: Bool
    /// Indicates whether what is written is encrypted.
    let encryptsWrites: Bool
    /// The data of an image has no key: nothing can be transferred.
    let isSealed: Bool
    /// Bytes of a buffer: whole clusters.
    let bufferSize: UInt64
    private let buffers: Mapping
    /// The first free buffer in the first place, and behind it the next free one of each.
    private let free: UnsafeMutablePointer<Int32>

    private static let count = 16
    private static let preferredSize: UInt64 = 256 << 10

    init(_ image: borrowing DiskImage) throws(DiskImageError) {
        isUsed = image.encryptedCount > 0
        isSealed = image.sealedFile != nil
        encryptsWrites = image.managesClusters && image.isEncrypted(0)
        bufferSize = max(Self.preferredSize, image.clusterSize ?? 0)
        // The kernel gives memory as it is touched. The last sector is for pieces.
        buffers = try memory((encryptsWrites ? Self.count * Int(bufferSize) : 0) + SectorCipher.sectorSize, image.path)
        unsafe free = .allocate(capacity: 1 + Self.count)
        for index in 0...Self.count { unsafe (free + index).initialize(to: index < Self.count ? Int32(index) : -1) }
    }

    deinit {
        // What is there is encrypted, but for that sector.
        unsafe explicit_bzero(sector, SectorCipher.sectorSize)
        unsafe free.deallocate()
    }

    /// Why a request cannot be; an errno value.
    func refusal(_ request: borrowing DiskEngine.Request) -> Int32? {
        guard request.operation != .flush else { return nil }
        if isSealed { return ENOKEY }
        return (request.offset | request.length) % UInt64(SectorCipher.sectorSize) == 0 ? nil : EINVAL
    }

    /// Indicates whether a piece of a request can be begun.
    func hasRoom(_ operation: DiskOperation) -> Bool {
        // The list's first place is always there.
        if !encryptsWrites || operation == .read || operation == .flush { return true }
        return unsafe free[0] >= 0
    }

    /// How much of a change is begun at once: what a buffer holds, up to the end of a cluster.
    func limited(_ length: UInt64, _ operation: DiskOperation, at offset: UInt64) -> UInt64 {
        // Of what only the mapping is changed for, there is no reason to take less; what is written of it is within a cluster.
        encryptsWrites && operation == .write ? min(length, bufferSize - offset % bufferSize) : length
    }

    // Numbers of buffers come from the list, so they are in bounds.

    func buffer(_ index: Int32) -> UnsafeMutableRawPointer { unsafe buffers.start + Int(index) * Int(bufferSize) }

    func take() -> Int32 {
        let index = unsafe free[0]
        unsafe free[0] = free[Int(index) + 1]
        return index
    }

    func release(_ index: Int32) {
        unsafe free[Int(index) + 1] = free[0]
        unsafe free[0] = index
    }

    /// Room for a sector whose bytes are in several places.
    var sector: UnsafeMutableRawPointer { unsafe buffers.start + (encryptsWrites ? Self.count * Int(bufferSize) : 0) }
}

extension DiskEngine {
    /// Gives an operation that is going to write what a request has, or zeroes, a buffer.
    func takeBuffer(_ operation: UnsafeMutablePointer<Operation>) {
        // There is one, or the request would not have been begun; no operation is longer.
        unsafe precondition(operation.pointee.length <= encryption.bufferSize)
        unsafe operation.pointee.cipherBuffer = encryption.take()
    }

    /// Encrypts what an operation is going to write, in the buffer of its copy, or in its own with what the request has in its memory.
    func encrypt(_ operation: UnsafeMutablePointer<Operation>) {
        let length = unsafe Int(operation.pointee.length)
        let bytes: UnsafeMutableRawPointer
        if unsafe operation.pointee.copy >= 0 {
            unsafe bytes = copies.buffer(operation.pointee.copy)
        } else {
            unsafe bytes = encryption.buffer(operation.pointee.cipherBuffer)
            let request = unsafe operation.pointee.request
            if unsafe requests[Int(request)].operation == .write {
                var target = unsafe bytes
                // Guest RAM: read once, through the helpers that the compiler does not look into.
                unsafe forEachPiece(request, from: operation.pointee.start, length: UInt64(length)) { base, count in
                    unsafe clinux_copy(target, base, count)
                    unsafe target += count
                }
            } else {
                unsafe bytes.initializeMemory(as: UInt8.self, repeating: 0, count: length)
            }
        }
        // What legacy AES goes by, an offset on the disk, is for readers only.
        unsafe image.encrypt(bytes, length, file: operation.pointee.layer, place: operation.pointee.fileOffset, offset: 0)
    }

    /// An operation is over: its buffer is free, and if it was a read that failed, nobody sees what was not decrypted.
    func endEncryption(_ ended: Operation, _ error: Int32) {
        if ended.cipherBuffer >= 0 { encryption.release(ended.cipherBuffer) }
        if error != 0, ended.kind == .read, image.isEncrypted(ended.layer) { fill(ended.request, from: ended.start, length: ended.length) }
    }

    /// Decrypts what an operation has read.
    func decrypt(_ ended: Operation) {
        // Sectors that lie in one place are decrypted there, others by way of our own memory.
        var done: UInt64 = 0, begun: UInt64 = 0
        let size = UInt64(SectorCipher.sectorSize)
        unsafe forEachPiece(ended.request, from: ended.start, length: ended.length) { base, count in
            var base = unsafe base, left = UInt64(count)
            if begun > 0 {
                let more = min(size - begun, left)
                begun += more
                left -= more
                unsafe base += Int(more)
                guard begun == size else { return }
                decryptScattered(ended, from: done)
                done += size
                begun = 0
            }
            let whole = left / size * size
            if whole > 0 { unsafe decrypt(ended, base, whole, from: done) }
            done += whole
            begun = left - whole
        }
    }

    /// Decrypts bytes that an operation has read, `start` bytes behind its first one.
    private func decrypt(_ ended: Operation, _ bytes: UnsafeMutableRawPointer, _ count: UInt64, from start: UInt64) {
        let offset = unsafe requests[Int(ended.request)].offset + ended.start + start
        // A piece of the request's memory, or our own sector.
        unsafe image.decrypt(bytes, Int(count), file: ended.layer, place: ended.fileOffset + start, offset: offset)
    }

    /// The same for a sector whose bytes are in several places.
    private func decryptScattered(_ ended: Operation, from start: UInt64) {
        let size = UInt64(SectorCipher.sectorSize)
        let sector = unsafe encryption.sector
        var filled = 0
        // Both times the same pieces, which have a sector's bytes together.
        unsafe forEachPiece(ended.request, from: ended.start + start, length: size) { base, count in
            unsafe clinux_copy(sector + filled, base, count)
            filled += count
        }
        unsafe decrypt(ended, sector, size, from: start)
        var taken = 0
        unsafe forEachPiece(ended.request, from: ended.start + start, length: size) { base, count in
            unsafe clinux_copy(base, sector + taken, count)
            taken += count
        }
    }
}
