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
        buffers = try IOBuffer(
            count: (encryptsWrites ? Self.count * Int(bufferSize) : 0) + SectorCipher.sectorSize, image.path)
        for index in 0..<Self.count { free[index] = Int32(index) }
    }

    deinit {
        // What is there is encrypted, but for that sector.
        sector.erase()
    }

    /// Why a request cannot be; an errno value.
    func refusal(_ request: DiskRequest) -> Int32? {
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

    private func buffer(_ index: Int32) -> IOMemory { buffers.piece(Int(index) * Int(bufferSize), Int(bufferSize)) }

    private mutating func take() -> Int32 {
        freeCount -= 1
        return free[freeCount]
    }

    private mutating func release(_ index: Int32) {
        free[freeCount] = index
        freeCount += 1
    }

    /// Room for a sector whose bytes are in several places.
    private var sector: IOMemory {
        buffers.piece(encryptsWrites ? Self.count * Int(bufferSize) : 0, SectorCipher.sectorSize)
    }
}

extension EngineEncryption {
    /// Gives an operation that is going to write what a request has, or zeroes, a buffer.
    mutating func takeBuffer(for operation: inout IOOperation) {
        // There is one, or the request would not have been begun; no operation is longer.
        precondition(operation.length <= bufferSize)
        operation.cipherBuffer = take()
    }

    /// Encrypts what an operation is going to write: the contents of its copy where they are, and what the request has in its memory, or zeroes, in the
    /// operation's buffer.
    func encrypt(_ operation: inout IOOperation, _ image: DiskImage) {
        let length = Int(operation.length)
        let bytes: IOMemory
        switch operation.memory {
        case .piece(let memory):
            bytes = memory.prefix(length)
        case .segments(let segments, _):
            bytes = buffer(operation.cipherBuffer).prefix(length)
            segments.copyOut(from: operation.start, to: bytes)
        case .none:
            bytes = buffer(operation.cipherBuffer).prefix(length)
            bytes.clear()
        }
        operation.memory = .piece(bytes)
        // What legacy AES goes by, an offset on the disk, is for readers only.
        image.encrypt(bytes, file: operation.layer, place: operation.fileOffset, offset: 0)
    }

    /// An operation is over: its buffer is free, and if it was a read that failed, nobody sees what was not decrypted.
    mutating func end(_ ended: IOOperation, _ error: Int32, _ image: DiskImage) {
        if ended.cipherBuffer >= 0 { release(ended.cipherBuffer) }
        if error != 0, ended.kind == .read, image.isEncrypted(ended.layer) { ended.clear() }
    }

    /// Decrypts what an operation has read.
    /// - Parameter diskOffset: where on the disk its first byte is.
    func decrypt(_ ended: IOOperation, _ image: DiskImage, diskOffset: UInt64) {
        guard case .segments(let segments, _) = ended.memory else { return }
        let reading = Reading(image: image, file: ended.layer, place: ended.fileOffset, diskOffset: diskOffset)
        // Sectors that lie in one place are decrypted there, others by way of our own memory.
        let start = ended.start
        var done: UInt64 = 0, begun: UInt64 = 0
        let size = UInt64(SectorCipher.sectorSize)
        segments.forEachPiece(from: start, length: ended.length) { piece in
            var piece = piece
            if begun > 0 {
                let more = min(size - begun, UInt64(piece.count))
                begun += more
                piece = piece.from(Int(more))
                guard begun == size else { return }
                segments.copyOut(from: start + done, to: sector)
                reading.decrypt(sector, from: done)
                segments.copyIn(sector, at: start + done)
                done += size
                begun = 0
            }
            let whole = UInt64(piece.count) / size * size
            if whole > 0 { reading.decrypt(piece.prefix(Int(whole)), from: done) }
            done += whole
            begun = UInt64(piece.count) - whole
        }
    }

    /// Where an operation has read.
    private struct Reading {
        let image: DiskImage
        let file: Int
        let place: UInt64
        let diskOffset: UInt64

        /// Decrypts bytes that are `start` bytes behind the operation's first one.
        func decrypt(_ bytes: IOMemory, from start: UInt64) {
            image.decrypt(bytes, file: file, place: place + start, offset: diskOffset + start)
        }
    }
}
