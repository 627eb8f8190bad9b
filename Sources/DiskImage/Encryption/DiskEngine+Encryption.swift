// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// What an engine has for an image whose data is encrypted: buffers in which what is written is encrypted. The memory of requests is the guest's,
/// where nothing is changed by a write; what is read is decrypted there.
struct EngineEncryption: ~Copyable {
    /// Indicates whether the data of any image of the chain is encrypted.
    let isUsed: Bool
    /// Indicates whether what is written is encrypted.
    let encryptsWrites: Bool
    /// The data of an image has no key: nothing can be transferred.
    let isSealed: Bool
    /// Bytes of a buffer: whole clusters.
    let bufferSize: UInt64
    private let buffers: IOBuffer
    /// The numbers of free buffers; the first so many of these.
    private var free = InlineArray<16, Int32>(repeating: 0)
    private var freeCount = count

    private static let count = 16
    private static let preferredSize: UInt64 = 256 << 10

    init(_ image: DiskImage) throws(DiskImageError) {
        isUsed = image.encryptedCount > 0
        isSealed = image.sealedFile != nil
        encryptsWrites = image.managesClusters && image.isEncrypted(0)
        bufferSize = max(Self.preferredSize, image.clusterSize ?? 0)
        // The kernel gives memory as it is touched. The last sector is for pieces.
        buffers = try IOBuffer(count: (encryptsWrites ? Self.count * Int(bufferSize) : 0) + SectorCipher.sectorSize, image.path)
        for index in 0..<Self.count { free[index] = Int32(index) }
    }

    deinit {
        // What is there is encrypted, but for that sector.
        sector.erase()
    }

    /// Why a request cannot be; an errno value.
    func refusal(_ request: borrowing DiskEngine.Request) -> Int32? {
        guard request.operation != .flush else { return nil }
        if isSealed { return ENOKEY }
        return (request.offset | request.length) % UInt64(SectorCipher.sectorSize) == 0 ? nil : EINVAL
    }

    /// Indicates whether a piece of a request can be begun.
    func hasRoom(_ operation: DiskOperation) -> Bool {
        if !encryptsWrites || operation == .read || operation == .flush { return true }
        return freeCount > 0
    }

    /// How much of a change is begun at once: what a buffer holds, up to the end of a cluster.
    func limited(_ length: UInt64, _ operation: DiskOperation, at offset: UInt64) -> UInt64 {
        // Of what only the mapping is changed for, there is no reason to take less; what is written of it is within a cluster.
        encryptsWrites && operation == .write ? min(length, bufferSize - offset % bufferSize) : length
    }

    func buffer(_ index: Int32) -> IOMemory { buffers.piece(Int(index) * Int(bufferSize), Int(bufferSize)) }

    mutating func take() -> Int32 {
        freeCount -= 1
        return free[freeCount]
    }

    mutating func release(_ index: Int32) {
        free[freeCount] = index
        freeCount += 1
    }

    /// Room for a sector whose bytes are in several places.
    var sector: IOMemory { buffers.piece(encryptsWrites ? Self.count * Int(bufferSize) : 0, SectorCipher.sectorSize) }
}

extension DiskEngine {
    /// Gives an operation that is going to write what a request has, or zeroes, a buffer.
    mutating func takeBuffer(_ index: Int32) {
        // There is one, or the request would not have been begun; no operation is longer.
        precondition(operations[index].length <= encryption.bufferSize)
        operations[index].cipherBuffer = encryption.take()
    }

    /// Encrypts what an operation is going to write, in the buffer of its copy, or in its own with what the request has in its memory.
    func encrypt(_ index: Int32) {
        let length = Int(operations[index].length)
        let bytes: IOMemory
        if operations[index].copy >= 0 {
            bytes = copies.buffer(operations[index].copy).prefix(length)
        } else {
            bytes = encryption.buffer(operations[index].cipherBuffer).prefix(length)
            let request = operations[index].request
            if requests[request].operation == .write {
                requests[request].segments?.copyOut(from: operations[index].start, to: bytes)
            } else {
                bytes.clear()
            }
        }
        // What legacy AES goes by, an offset on the disk, is for readers only.
        image.encrypt(bytes, file: operations[index].layer, place: operations[index].fileOffset, offset: 0)
    }

    /// An operation is over: its buffer is free, and if it was a read that failed, nobody sees what was not decrypted.
    mutating func endEncryption(_ ended: Operation, _ error: Int32) {
        if ended.cipherBuffer >= 0 { encryption.release(ended.cipherBuffer) }
        if error != 0, ended.kind == .read, image.isEncrypted(ended.layer) { fill(ended.request, from: ended.start, length: ended.length) }
    }

    /// Decrypts what an operation has read.
    func decrypt(_ ended: Operation) {
        guard let segments = requests[ended.request].segments else { return }
        // Sectors that lie in one place are decrypted there, others by way of our own memory.
        var done: UInt64 = 0, begun: UInt64 = 0
        let size = UInt64(SectorCipher.sectorSize)
        segments.forEachPiece(from: ended.start, length: ended.length) { piece in
            var piece = piece
            if begun > 0 {
                let more = min(size - begun, UInt64(piece.count))
                begun += more
                piece = piece.from(Int(more))
                guard begun == size else { return }
                decryptScattered(ended, segments, from: done)
                done += size
                begun = 0
            }
            let whole = UInt64(piece.count) / size * size
            if whole > 0 { decrypt(ended, piece.prefix(Int(whole)), from: done) }
            done += whole
            begun = UInt64(piece.count) - whole
        }
    }

    /// Decrypts bytes that an operation has read, `start` bytes behind its first one.
    private func decrypt(_ ended: Operation, _ bytes: IOMemory, from start: UInt64) {
        let offset = requests[ended.request].offset + ended.start + start
        image.decrypt(bytes, file: ended.layer, place: ended.fileOffset + start, offset: offset)
    }

    /// The same for a sector whose bytes are in several places.
    private func decryptScattered(_ ended: Operation, _ segments: IOSegments, from start: UInt64) {
        let sector = encryption.sector
        segments.copyOut(from: ended.start + start, to: sector)
        decrypt(ended, sector, from: start)
        segments.copyIn(sector, at: ended.start + start)
    }
}
