// SPDX-License-Identifier: Apache-2.0

internal import Virtio

/// What a block request asks for (virtio 1.2 §5.2.6).
enum BlockRequestType {
    static let read: UInt32 = 0
    static let write: UInt32 = 1
    static let flush: UInt32 = 4
    static let getID: UInt32 = 8
    static let discard: UInt32 = 11
    static let writeZeroes: UInt32 = 13
}

/// The byte that ends a request.
enum BlockStatus: UInt8 {
    case ok = 0
    case ioError = 1
    case unsupported = 2
}

/// The header of a request, copied out of guest RAM. How the driver cuts header and data into descriptors means
/// nothing.
struct BlockRequestHeader {
    static let size: UInt64 = 16

    let type: UInt32
    /// In units of 512 bytes, whatever block size the device reports.
    let sector: UInt64

    init?(_ readable: IOVectors) {
        guard let type = readable.load(UInt32.self, at: 0), let sector = readable.load(UInt64.self, at: 8) else {
            return nil
        }
        self.type = type
        self.sector = sector
    }
}

/// One range of a DISCARD or WRITE_ZEROES request, copied out of guest RAM.
struct BlockRange {
    static let size: UInt64 = 16
    static let unmap: UInt32 = 1

    let sector: UInt64
    let sectors: UInt32
    let flags: UInt32

    init?(_ readable: IOVectors, at offset: UInt64) {
        guard let sector = readable.load(UInt64.self, at: offset),
            let sectors = readable.load(UInt32.self, at: offset &+ 8),
            let flags = readable.load(UInt32.self, at: offset &+ 12)
        else { return nil }
        self.sector = sector
        self.sectors = sectors
        self.flags = flags
    }
}

/// A range in bytes for one in sectors, or nil when it is not inside a disk of `size` bytes.
func byteRange(sector: UInt64, count: UInt64, size: UInt64) -> (offset: UInt64, length: UInt64)? {
    // Nothing here can wrap: both are compared with what is left before they are multiplied.
    let sectors = size / 512
    guard sector <= sectors, count <= sectors - sector else { return nil }
    return (sector * 512, count * 512)
}

/// A request that was taken from the queue and is not completed.
struct PendingBlockRequest {
    let head: UInt16
    let status: GuestByte
    /// The device-readable part behind the header: the data of a write, or the ranges of a DISCARD or WRITE_ZEROES.
    let readable: IOVectors
    /// Where in `readable` the next range is.
    var nextRange: UInt64 = 0
    let type: UInt32
    /// The memory for data, which the status byte comes after.
    let writable: IOVectors
}
