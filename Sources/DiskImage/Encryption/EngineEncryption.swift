// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// What an engine has for an image whose data is encrypted: buffers in which what is written is encrypted, and what is
/// read decrypted. The memory of requests is the guest's: a vCPU can change it meanwhile, so that what was read there
/// would be decrypted in part from what the guest has put in its place. It gets plaintext alone, and of a read that
/// fails nothing.
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
    private var free = InlineArray<32, Int32>(repeating: 0)
    private var freeCount = count

    private static let count = 32
    private static let preferredSize: UInt64 = 256 << 10

    init(_ image: DiskImage) throws(DiskImageError) {
        isUsed = image.encryptedCount > 0
        isSealed = image.sealedFile != nil
        encryptsWrites = image.managesClusters && image.isEncrypted(0)
        bufferSize = max(Self.preferredSize, image.clusterSize ?? 0)
        // The kernel gives memory as it is touched.
        buffers = try IOBuffer(count: isUsed ? Self.count * Int(bufferSize) : 0, image.path)
        // As guest RAM is: what the guest has encrypted is in no core file, and in no child process.
        buffers.memory.advise(MADV_DONTDUMP)
        buffers.memory.advise(MADV_DONTFORK)
        for index in 0..<Self.count { free[index] = Int32(index) }
    }

    /// Why a request cannot be; an errno value.
    func refusal(_ request: DiskRequest) -> Int32? {
        guard request.operation != .flush else { return nil }
        if isSealed { return ENOKEY }
        return (request.offset | request.length) % UInt64(SectorCipher.sectorSize) == 0 ? nil : EINVAL
    }

    /// Indicates whether a piece of a request can be begun.
    func hasRoom(_ operation: DiskOperation) -> Bool {
        switch operation {
        case .flush: true
        case .read: !isUsed || freeCount > 0
        default: !encryptsWrites || freeCount > 0
        }
    }

    /// The most bytes that one operation reads from a file of the image.
    @inline(__always) func limited(reading length: UInt64, of file: Int, _ image: DiskImage) -> UInt64 {
        isUsed && image.isEncrypted(file) ? min(length, bufferSize) : length
    }

    /// The most bytes that one operation changes: what a buffer holds, up to the end of a cluster.
    func limited(_ length: UInt64, _ operation: DiskOperation, at offset: UInt64) -> UInt64 {
        // Changes of the mapping alone are not limited; what they write is within a cluster.
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
}

extension EngineEncryption {
    /// Gives an operation that is going to write what a request has, or zeroes, a buffer.
    mutating func takeBuffer(for operation: inout IOOperation) {
        // There is one, or the request would not have been begun; no operation is longer.
        precondition(operation.length <= bufferSize)
        operation.cipherBuffer = take()
    }

    /// Gives an operation that is going to read encrypted data a buffer, in the place of the request's memory.
    mutating func takeBuffer(forReading operation: inout IOOperation) {
        takeBuffer(for: &operation)
        operation.memory = .piece(buffer(operation.cipherBuffer).prefix(Int(operation.length)))
    }

    /// Encrypts what an operation is going to write: the contents of its copy where they are, and what the request has
    /// in its memory, or zeroes, in the operation's buffer.
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

    /// An operation is over: its buffer is free.
    mutating func end(_ ended: IOOperation) {
        if ended.cipherBuffer >= 0 { release(ended.cipherBuffer) }
    }

    /// Decrypts what an operation has read, for its request.
    func decrypt(_ ended: IOOperation, _ image: DiskImage, for request: DiskRequest) {
        guard let segments = request.segments else { return }
        let bytes = buffer(ended.cipherBuffer).prefix(Int(ended.length))
        let size = SectorCipher.sectorSize
        func decrypt(_ start: Int, _ count: Int, into target: IOMemory) {
            image.decrypt(
                bytes.piece(start, count), into: target, file: ended.layer, place: ended.fileOffset + UInt64(start),
                offset: request.offset + ended.start + UInt64(start))
        }
        // Sectors whose memory is in one place are decrypted into it; of the others, all that is begun in the buffer.
        var done = 0, begun = 0
        segments.forEachPiece(from: ended.start, length: ended.length) { piece in
            var piece = piece
            if begun > 0 {
                let more = min(size - begun, piece.count)
                piece.prefix(more).copy(from: bytes.piece(done + begun, more))
                begun += more
                piece = piece.from(more)
                guard begun == size else { return }
                done += size
                begun = 0
            }
            let whole = piece.count / size * size
            if whole > 0 { decrypt(done, whole, into: piece.prefix(whole)) }
            done += whole
            begun = piece.count - whole
            guard begun > 0 else { return }
            // A disk's last sector, if it has fewer bytes: it is not encrypted as a whole.
            guard size <= bytes.count - done else { return piece.from(whole).clear() }
            decrypt(done, size, into: bytes.piece(done, size))
            piece.from(whole).copy(from: bytes.piece(done, begun))
        }
    }
}
