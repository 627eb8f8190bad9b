// SPDX-License-Identifier: Apache-2.0

/// The changes that wait in the log of a VHDX that was not closed, as a replay would make them (MS-VHDX, 2.3): kept in
/// memory and laid over what is read of tables, while the file stays as it is.
///
/// The log is a ring of sectors of 4 KiB with entries one behind the other. Those that count are the last unbroken
/// sequence of sound ones; each names sectors of the file, and has their contents, or says that they are zeroes.
struct VHDXLog {
    /// The most bytes of a log: others make 1 MiB.
    static let maximumSize: UInt64 = 16 << 20

    private static let sector = 4096
    private static let headerSize = 64
    private static let descriptorSize = 32

    /// A range of the file that is changed.
    private struct Change {
        let place: UInt64
        let length: UInt64
        /// Its bytes; nil for zeroes.
        let bytes: [UInt8]?
    }

    /// In their order: a later one is over those before it.
    private var changes: [Change] = []
    /// The file was to be at least this long.
    private(set) var fileSize: UInt64 = 0

    /// Nothing: a log that is empty.
    init() {}

    var isEmpty: Bool { changes.isEmpty }

    /// Reads the log of a file whose current header is `header`.
    init(_ file: borrowing ImageFile, header: [UInt8]) throws(DiskImageError) {
        let path = file.path, version = header.littleEndian16(at: 64)
        let size = UInt64(header.littleEndian32(at: 68)), place = header.littleEndian64(at: 72)
        guard version == 0 else { throw .unsupported(path: path, feature: "version \(version) of its log replayed") }
        guard place >= 1 << 20, place % (1 << 20) == 0, size > 0, size % (1 << 20) == 0 else {
            throw .invalid(path: path, reason: "a log of \(size) bytes at byte \(place)")
        }
        guard place <= file.size, size <= file.size - place else {
            throw .truncated(path: path, what: "the log", needed: place &+ size, size: file.size)
        }
        guard size <= Self.maximumSize else {
            throw .unsupported(path: path, feature: "a log of \(size) bytes replayed")
        }
        var ring = Ring(bytes: try file.read("the log", count: Int(size), at: place), id: Array(header[48..<64]))
        guard let sequence = ring.activeSequence() else {
            throw .invalid(path: path, reason: "its header refers to a log that has no complete sequence of entries")
        }
        guard let last = sequence.last, last.flushedSize <= file.size else {
            throw .truncated(
                path: path, what: "the file that its log describes", needed: sequence.last?.flushedSize ?? 0,
                size: file.size)
        }
        for entry in sequence where entry.lastSize > fileSize { fileSize = entry.lastSize }
        guard fileSize <= DiskImage.maximumSize else {
            throw .invalid(path: path, reason: "its log requires a file of \(fileSize) bytes")
        }
        for entry in sequence { collect(ring.bytes(of: entry)) }
    }

    /// Takes the changes of a sound entry.
    private mutating func collect(_ entry: [UInt8]) {
        var data = Ring.descriptorSectors(entry) * Self.sector
        for index in 0..<Int(entry.littleEndian32(at: 24)) {
            let descriptor = Self.headerSize + index * Self.descriptorSize
            let place = entry.littleEndian64(at: descriptor + 16)
            if entry[descriptor..<descriptor + 4].elementsEqual("zero".utf8) {
                changes.append(Change(place: place, length: entry.littleEndian64(at: descriptor + 8), bytes: nil))
                continue
            }
            // A sector of data has its first eight bytes and its last four in the descriptor, and a mark in their
            // place.
            var bytes = Array(entry[data..<data + Self.sector])
            bytes.replaceSubrange(0..<8, with: entry[descriptor + 8..<descriptor + 16])
            bytes.replaceSubrange(Self.sector - 4..<Self.sector, with: entry[descriptor + 4..<descriptor + 8])
            changes.append(Change(place: place, length: UInt64(Self.sector), bytes: bytes))
            data += Self.sector
        }
    }

    /// The first change that is in none of some ranges of the file.
    func change(outside ranges: [Range<UInt64>]) -> UInt64? {
        changes.first { change in
            !ranges.contains {
                $0.lowerBound <= change.place && change.length <= $0.upperBound - $0.lowerBound
                    && change.place - $0.lowerBound <= $0.upperBound - $0.lowerBound - change.length
            }
        }?.place
    }

    /// Makes the changes to what has been read of the file from `offset` on.
    func apply(to buffer: IOMemory, at offset: UInt64) {
        let end = offset &+ UInt64(buffer.count)
        for change in changes {
            let first = max(offset, change.place), last = min(end, change.place &+ change.length)
            guard first < last else { continue }
            let target = buffer.piece(Int(first - offset), Int(last - first))
            if let bytes = change.bytes {
                bytes.withReadableIOMemory { target.copy(from: $0.from(Int(first - change.place))) }
            } else {
                target.clear()
            }
        }
    }

    /// Reads a part of the file as it would be.
    func read(
        _ file: borrowing ImageFile, _ what: String, count: Int, at offset: UInt64
    ) throws(DiskImageError) -> [UInt8] {
        var bytes = try file.read(what, count: count, at: offset)
        bytes.withIOMemory { apply(to: $0, at: offset) }
        return bytes
    }

    /// The sectors of a log.
    private struct Ring {
        let bytes: [UInt8]
        /// The log's, which its entries have too.
        let id: [UInt8]
        /// Bytes that may still be summed: each belongs to one sound entry, and a few may be looked at in vain.
        private var budget: Int

        /// A sound entry.
        struct Entry {
            let place: Int
            let length: Int
            /// Where the first entry of its sequence was that still counts.
            let tail: Int
            let number: UInt64
            /// Bytes that the file had for certain, and those that it needs.
            let flushedSize: UInt64
            let lastSize: UInt64
        }

        init(bytes: [UInt8], id: [UInt8]) {
            self.bytes = bytes
            self.id = id
            budget = 8 * bytes.count
        }

        /// The entries of the last sequence, from its tail to its head (2.3.3).
        mutating func activeSequence() -> [Entry]? {
            var candidate: [Entry] = []
            var tail = 0
            while true {
                var sequence: [Entry] = [], head = tail, covered = 0
                while let entry = entry(at: head), sequence.last.map({ entry.number == $0.number &+ 1 }) ?? true {
                    // No further than once around.
                    guard covered + entry.length <= bytes.count else { break }
                    covered += entry.length
                    sequence.append(entry)
                    head = (head + entry.length) % bytes.count
                }
                var next = tail + VHDXLog.sector
                if let last = sequence.last, let first = sequence.firstIndex(where: { $0.place == last.tail }) {
                    next = tail + covered
                    if last.number > candidate.last?.number ?? 0 { candidate = Array(sequence[first...]) }
                }
                guard next < bytes.count else { break }
                tail = next
            }
            return candidate.isEmpty ? nil : candidate
        }

        /// The entry that begins at a sector, if there is a sound one.
        private mutating func entry(at place: Int) -> Entry? {
            let header = part(place, VHDXLog.headerSize)
            guard header.starts(with: "loge".utf8), header[32..<48].elementsEqual(id) else { return nil }
            let length = Int(header.littleEndian32(at: 8)), tail = Int(header.littleEndian32(at: 12)),
                number = header.littleEndian64(at: 16)
            guard length > 0, length % VHDXLog.sector == 0, length <= bytes.count, tail < bytes.count,
                tail % VHDXLog.sector == 0, number > 0, length <= budget
            else {
                return nil
            }
            budget -= length
            let entry = part(place, length)
            guard CRC32C.checksum(entry, zeroes: 4..<8) == header.littleEndian32(at: 4), Self.areSound(entry, number)
            else { return nil }
            return Entry(
                place: place, length: length, tail: tail, number: number, flushedSize: header.littleEndian64(at: 48),
                lastSize: header.littleEndian64(at: 56))
        }

        func bytes(of entry: Entry) -> [UInt8] { part(entry.place, entry.length) }

        /// Some bytes, which may continue at the ring's beginning.
        private func part(_ place: Int, _ length: Int) -> [UInt8] {
            let end = place + length
            return end <= bytes.count
                ? Array(bytes[place..<end]) : Array(bytes[place...] + bytes[..<(end - bytes.count)])
        }

        /// How many sectors the header and the descriptors of an entry take.
        static func descriptorSectors(_ entry: [UInt8]) -> Int {
            (VHDXLog.headerSize + Int(entry.littleEndian32(at: 24)) * VHDXLog.descriptorSize + VHDXLog.sector - 1)
                / VHDXLog.sector
        }

        /// Indicates whether an entry's descriptors, and the sectors that they describe, are what they should be
        /// (2.3.1.2 to 2.3.1.4).
        private static func areSound(_ entry: [UInt8], _ number: UInt64) -> Bool {
            var data = descriptorSectors(entry) * VHDXLog.sector
            guard data <= entry.count else { return false }
            for index in 0..<Int(entry.littleEndian32(at: 24)) {
                let descriptor = VHDXLog.headerSize + index * VHDXLog.descriptorSize
                let signature = entry[descriptor..<descriptor + 4], place = entry.littleEndian64(at: descriptor + 16)
                guard entry.littleEndian64(at: descriptor + 24) == number, place % UInt64(VHDXLog.sector) == 0,
                    place <= DiskImage.maximumSize
                else { return false }
                if signature.elementsEqual("zero".utf8) {
                    let length = entry.littleEndian64(at: descriptor + 8)
                    guard length % UInt64(VHDXLog.sector) == 0, length <= DiskImage.maximumSize else { return false }
                    continue
                }
                guard signature.elementsEqual("desc".utf8), data + VHDXLog.sector <= entry.count,
                    entry[data..<data + 4].elementsEqual("data".utf8)
                else { return false }
                let high = UInt64(entry.littleEndian32(at: data + 4)),
                    low = UInt64(entry.littleEndian32(at: data + VHDXLog.sector - 4))
                guard high << 32 | low == number else { return false }
                data += VHDXLog.sector
            }
            return true
        }
    }
}
