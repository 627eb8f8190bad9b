// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// A piece of a disk that is processed as a unit.
struct DiskWindow {
    /// Bytes of a window at most. It has none from both sides of a multiple of that: no cluster of qcow2 is longer, and
    /// so none is in two windows.
    static let size: UInt64 = 2 << 20

    /// Which memory is its own.
    let number: Int
    /// Where on the disk it begins, and the next one does.
    let start: UInt64
    private(set) var end: UInt64
    /// What of it is read, in order and with gaps between.
    private(set) var parts: [Range<UInt64>] = []

    init(number: Int, start: UInt64, diskSize: UInt64) {
        self.number = number
        self.start = start
        end = min(diskSize, start - start % Self.size + Self.size)
    }

    /// Has a range be read, which is inside the window and behind what was added before.
    mutating func add(_ range: Range<UInt64>) {
        if let last = parts.last, last.upperBound == range.lowerBound {
            parts.removeLast(); return parts.append(last.lowerBound..<range.upperBound)
        }
        parts.append(range)
    }

    /// Has the next window begin at a place, if it does not begin behind it: nothing is to be read between.
    mutating func skip(to place: UInt64) { end = max(end, place) }
}

/// Reads a disk some windows ahead, each into memory of its own: what comes from the disk itself while others are
/// worked on, and what the page cache has, or has to be decrypted or decompressed, when it is wanted.
final class WindowReader {
    /// Windows that have memory.
    static let count = 8

    /// nil for a disk of zeroes.
    private var reader: ImageReader?
    /// Indicates whether one of the images is a VHD.
    let hasVHD: Bool
    private let buffers: TransferBuffer
    private var readAhead: ReadAhead
    /// What is read when it is wanted, for each window.
    private var later: [[ImageExtent]] = Array(repeating: [], count: count)

    /// - Parameters:
    ///   - path: for the error that there is no memory.
    ///   - calls: a test's system calls; nil for the host's.
    init(_ image: DiskImage?, _ path: String, calls: FileCalls?) throws(DiskImageError) {
        buffers = try TransferBuffer(Self.count * Int(DiskWindow.size), path)
        readAhead = ReadAhead(buffers: Self.count, usesRing: calls == nil)
        hasVHD = image?.hasVHD ?? false
        switch consume image {
        case .some(let image): reader = ImageReader(image, calls: calls ?? .host)
        case nil: reader = nil
        }
    }

    // The kernel may write to the memory until then.
    deinit { readAhead.drain() }

    /// Bytes of the disk. Beyond them it shows zeroes, here.
    var size: UInt64 { reader?.image.size ?? 0 }

    /// The image, of which nothing is being read any more; what remains shows zeroes.
    func takeImage() -> DiskImage? { reader.take()?.takeImage() }

    /// The remote disk below all, which can be read by others, too.
    var remote: NBDDisk? { reader?.image.remote }

    /// The path of the one file of the image's that has an identity.
    func path(of identity: ImageFile.Identity) -> String? {
        guard let index = reader?.image.identities.firstIndex(of: identity) else { return nil }
        return reader?.image.files[index]
    }

    /// As ``ImageReader/extent(at:limit:)``, at any place.
    func extent(at offset: UInt64, limit: UInt64) throws(DiskImageError) -> ImageExtent {
        let size = size
        guard offset < size, let extent = try reader?.extent(at: offset, limit: min(limit, size - offset)) else {
            return ImageExtent(kind: .unallocated, offset: offset, length: limit, depth: 0)
        }
        return extent
    }

    /// How far the disk has zeroes from a place on, as is known without reading them.
    func zeroes(at offset: UInt64, limit: UInt64) throws(DiskImageError) -> UInt64 {
        var done: UInt64 = 0
        while done < limit {
            let extent = try extent(at: offset + done, limit: limit - done)
            guard extent.readsAsZeroes else { break }
            done += extent.length
        }
        return done
    }

    /// The memory for a range of a window, up to whose end it goes at most.
    func memory(_ range: Range<UInt64>, ofWindow number: Int) -> IOMemory {
        // Each window has its part of the buffer, and each byte of the disk its place there: so it is as aligned as on
        // the disk.
        let window = buffers.memory.piece(number * Int(DiskWindow.size), Int(DiskWindow.size))
        return window.piece(Int(range.lowerBound % DiskWindow.size), range.count)
    }

    /// Begins to read the parts of a window, whose memory must not be in use.
    func begin(_ window: DiskWindow) throws(DiskImageError) {
        for part in window.parts {
            var position = part.lowerBound
            while position < part.upperBound {
                let extent = try extent(at: position, limit: part.upperBound - position)
                position += extent.length
                let memory = memory(extent.range, ofWindow: window.number)
                if extent.readsAsZeroes {
                    memory.clear()
                } else if !start(extent, memory, window.number) {
                    later[window.number].append(extent)
                }
            }
        }
        readAhead.submit()
    }

    /// Begins a read that needs no more than time. Returns false where it does.
    private func start(_ extent: ImageExtent, _ memory: IOMemory, _ number: Int) -> Bool {
        guard extent.kind == .data, let place = extent.fileOffset,
            let descriptor = reader?.direct(memory, from: place, ofFile: extent.file)
        else { return false }
        return readAhead.start(
            ReadAhead.Read(memory: memory, place: place, file: extent.file, buffer: number), descriptor)
    }

    /// Waits until a window has been read.
    func release(_ window: DiskWindow) throws(DiskImageError) {
        for extent in later[window.number] {
            // From `begin`, so inside the window.
            try reader?.read(memory(extent.range, ofWindow: window.number), at: extent.offset)
        }
        later[window.number].removeAll(keepingCapacity: true)
        let failed: [ReadAhead.Read]
        do throws(SystemCallError) { failed = try readAhead.wait(window.number) } catch {
            throw .request(path: reader?.image.path ?? "", error)
        }
        // What is encrypted is not among them.
        for read in failed { try reader?.read(read.memory, from: read.place, ofFile: read.file, diskOffset: 0) }
    }
}

extension ImageExtent {
    /// On the disk.
    fileprivate var range: Range<UInt64> { offset..<offset + length }
}
