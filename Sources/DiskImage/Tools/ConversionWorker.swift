// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// One thread of a conversion, with its own view of the source, so that mapping, reading and decompressing share
/// nothing.
final class ConversionWorker {
    private let work: ConversionWork
    private var reader: ImageReader
    /// Two pieces of the disk: the one that is dealt with and the one that is read ahead.
    private let buffers: TransferBuffer
    private var pieces: [ConversionWork.Piece?] = [nil, nil]
    /// What the source has for them, and whether that is being read already.
    private var extents: [[(extent: ImageExtent, isStarted: Bool)]] = [[], []]
    private var readAhead = ReadAhead(buffers: 2)
    /// The piece that is dealt with.
    private var memory: IOMemory
    /// Compressed clusters of a piece, one after the other; it takes no memory before it is touched.
    private let compressed: TransferBuffer
    /// The backing file of the new image.
    private var base: Base?
    private let compressor: Compressor?
    /// Where in the piece the source has data, in order.
    private var data: [Range<Int>] = []

    /// What of the buffers goes where in the file.
    private struct Write {
        var source: Source
        var start: Int
        var count: Int
        var place: UInt64
    }

    private enum Source { case buffer, compressed }

    init(_ work: ConversionWork) throws(DiskImageError) {
        // A remote disk's connection is for all of them: many a server serves one client at a time.
        let image = try DiskImage(path: work.conversion.source, options: work.sourceOptions, remote: work.remote)
        // Opened by name once more: it has to be the same file still.
        guard image.identities == work.identities, image.size == work.size else {
            throw .invalid(path: work.conversion.source, reason: "the file was replaced during the conversion")
        }
        let path = work.conversion.target
        let size = Int(work.pieceSize)
        buffers = try TransferBuffer(2 * size, path)
        memory = buffers.memory.prefix(size)
        let level = work.conversion.compressionLevel
        if work.isStream {
            compressed = try TransferBuffer(size / Int(work.unit) * VMDKGrain.room, path)
            compressor = try Compressor(grainsWithLevel: level, path)
        } else {
            compressed = try TransferBuffer(size, path)
            compressor =
                try work.conversion.compresses
                ? Compressor(work.conversion.options.compression, level: level, path) : nil
        }
        reader = ImageReader(image, calls: work.calls, salvage: work.salvage)
        base = try work.conversion.openBacking(work.remoteBase) { image throws(DiskImageError) in
            try Base(image, size, path)
        }
        self.work = work
    }

    deinit { readAhead.drain() }

    func run() throws(DiskImageError) {
        var current = 0
        try prepare(current)
        while let piece = pieces[current] {
            // What comes next is read while this is dealt with.
            try prepare(1 - current)
            try read(piece, current)
            memory = self.memory(current, 0, work.pieceSize)
            if let start = work.flatStart { try writeRaw(piece, start) } else { try writeClusters(piece) }
            current = 1 - current
        }
    }

    // MARK: - Reading

    /// Takes a piece into a buffer, and starts the reads that need no more than time.
    private func prepare(_ buffer: Int) throws(DiskImageError) {
        extents[buffer].removeAll(keepingCapacity: true)
        pieces[buffer] = try work.nextPiece()
        guard let piece = pieces[buffer], !piece.readsAsZeroes else { return }
        var done: UInt64 = 0
        while done < piece.length {
            let extent = try reader.extent(at: piece.offset + done, limit: piece.length - done)
            let start = done
            done += extent.length
            if extent.readsAsZeroes { continue }
            let memory = self.memory(buffer, start, extent.length)
            var isStarted = false
            if extent.kind == .data, let place = extent.fileOffset,
                let descriptor = reader.direct(memory, from: place, ofFile: extent.file)
            {
                isStarted = readAhead.start(
                    ReadAhead.Read(memory: memory, place: place, file: extent.file, buffer: buffer), descriptor)
            }
            extents[buffer].append((extent, isStarted))
        }
        readAhead.submit()
    }

    /// Brings all of a piece into its buffer.
    private func read(_ piece: ConversionWork.Piece, _ buffer: Int) throws(DiskImageError) {
        data.removeAll(keepingCapacity: true)
        for (extent, isStarted) in extents[buffer] {
            let start = Int(extent.offset - piece.offset), end = start + Int(extent.length)
            if let last = data.last, last.upperBound == start {
                data[data.count - 1] = last.lowerBound..<end
            } else {
                data.append(start..<end)
            }
            if isStarted { continue }
            let memory = self.memory(buffer, UInt64(start), extent.length)
            if let place = extent.fileOffset, extent.kind == .data {
                try reader.read(memory, from: place, ofFile: extent.file, diskOffset: extent.offset)
            } else {
                try reader.read(memory, at: extent.offset)
            }
        }
        let failed: [ReadAhead.Read]
        do throws(SystemCallError) { failed = try readAhead.wait(buffer) } catch {
            throw .request(path: work.conversion.source, error)
        }
        // What is encrypted is not among them.
        for read in failed {
            // In the buffer, at the place that it has in the piece.
            let start = read.memory.distance(from: buffers.memory) - buffer * Int(work.pieceSize)
            try reader.read(read.memory, from: read.place, ofFile: read.file, diskOffset: piece.offset + UInt64(start))
        }
    }

    /// A part of one of the buffers, each of which holds a piece.
    private func memory(_ buffer: Int, _ start: UInt64, _ count: UInt64) -> IOMemory {
        buffers.memory.piece(buffer * Int(work.pieceSize) + Int(start), Int(count))
    }

    // MARK: - The disk as it is

    /// - Parameter start: where the disk begins in its file.
    private func writeRaw(_ piece: ConversionWork.Piece, _ start: UInt64) throws(DiskImageError) {
        let place = start + piece.offset
        guard !work.coversZeroes else { return try writeRawWithZeroes(piece, place) }
        for range in data { try writeNonzero(range, at: place + UInt64(range.lowerBound)) }
    }

    /// Writes what of a range of the buffer is not zero, by pages.
    /// - Parameter place: of the range.
    private func writeNonzero(_ range: Range<Int>, at place: UInt64) throws(DiskImageError) {
        let page = 4096
        var start = range.lowerBound
        while start < range.upperBound {
            // Whole pages of zeroes are passed over, also that at the end which the range does not fill.
            let zeroes = memory.piece(start, range.upperBound - start).zeroPrefix
            if start + zeroes == range.upperBound { return }
            start += zeroes / page * page
            var end = min(start + page, range.upperBound)
            while end < range.upperBound, !memory.piece(end, min(page, range.upperBound - end)).isZero {
                end = min(end + page, range.upperBound)
            }
            try work.write(memory.piece(start, end - start), at: place + UInt64(start - range.lowerBound))
            start = end
        }
    }

    /// On a device, and where space is wanted for all: what the source has nothing for is made zero too.
    private func writeRawWithZeroes(_ piece: ConversionWork.Piece, _ place: UInt64) throws(DiskImageError) {
        var done = 0
        for range in data + [Int(piece.length)..<Int(piece.length)] {
            if done < range.lowerBound { try work.clear(place + UInt64(done), UInt64(range.lowerBound - done)) }
            try writeData(range, at: place + UInt64(range.lowerBound))
            done = range.upperBound
        }
    }

    /// Writes a range of data. Long runs of zeroes in it are made, which a device or a server does without their being
    /// sent.
    private func writeData(_ range: Range<Int>, at place: UInt64) throws(DiskImageError) {
        let page = 4096, shortest = 64 << 10
        func write(_ part: Range<Int>) throws(DiskImageError) {
            guard !part.isEmpty else { return }
            try work.write(
                memory.piece(part.lowerBound, part.count), at: place + UInt64(part.lowerBound - range.lowerBound))
        }
        var start = range.lowerBound, position = start
        while position < range.upperBound {
            let left = range.upperBound - position
            let zeroes = memory.piece(position, left).zeroPrefix
            // Whole pages, and the end of the range.
            let whole = zeroes == left ? zeroes : zeroes / page * page
            guard whole >= shortest else {
                position += min(whole + page, left)
                continue
            }
            try write(start..<position)
            try work.clear(place + UInt64(position - range.lowerBound), UInt64(whole))
            position += whole
            start = position
        }
        try write(start..<range.upperBound)
    }

    // MARK: - Clusters

    private func writeClusters(_ piece: ConversionWork.Piece) throws(DiskImageError) {
        let size = Int(work.unit)
        let count = (Int(piece.length) + size - 1) / size
        fillGaps(upTo: count * size)
        var kinds = [Cluster](repeating: .zero, count: count)
        try base?.read(piece)
        if base != nil { compareZeroes(piece, &kinds) }
        var compressedSize = 0
        for range in data {
            for index in range.lowerBound / size...(range.upperBound - 1) / size where kinds[index] == .zero {
                // A cluster of the buffer, then the room behind what has been compressed.
                let cluster = memory.piece(index * size, size)
                if base != nil {
                    kinds[index] = compare(cluster, piece, index)
                    if kinds[index] != .data { continue }
                } else if cluster.isZero {
                    continue
                }
                kinds[index] = .data
                if let length = compress(cluster, of: piece.offset + UInt64(index * size), at: compressedSize) {
                    kinds[index] = .compressed(start: compressedSize, length: length)
                    compressedSize += length
                }
            }
        }
        var writes: [Write] = []
        let first = piece.offset / work.unit
        let isPlaced = try work.place(piece) { builder, file throws(DiskImageError) in
            var index = 0
            while index < count {
                switch kinds[index] {
                case .zero where !work.coversZeroes:
                    index += 1
                case .cleared:
                    try builder.mapZeroes(first + UInt64(index), file)
                    index += 1
                case .compressed(let start, let length):
                    let cluster = first + UInt64(index)
                    if let place = try builder.mapCompressed(cluster, length: length, file) {
                        append(Write(source: .compressed, start: start, count: length, place: place), to: &writes)
                    } else {
                        try placeData(first, index..<index + 1, kinds, &builder, &writes, file)
                    }
                    index += 1
                case .zero, .data:
                    var end = index + 1
                    while end < count, kinds[end] == .data || (work.coversZeroes && kinds[end] == .zero) { end += 1 }
                    try placeData(first, index..<end, kinds, &builder, &writes, file)
                    index = end
                }
            }
        }
        guard isPlaced else { return }
        for write in writes {
            if work.keepsHoles, write.source == .buffer {
                try writeNonzero(write.start..<write.start + write.count, at: write.place)
                continue
            }
            let bytes = (write.source == .buffer ? memory : compressed.memory).piece(write.start, write.count)
            // The buffer is not read again before it is filled again.
            work.cipher?.encrypt(bytes, place: write.place, offset: 0)
            try work.write(bytes, at: write.place)
        }
    }

    /// Of the clusters without any data of the source: where the backing file has data, zeroes must be explicit.
    private func compareZeroes(_ piece: ConversionWork.Piece, _ kinds: inout [Cluster]) {
        let size = Int(work.unit)
        for index in kinds.indices {
            let range = index * size..<min((index + 1) * size, Int(piece.length))
            guard !data.contains(where: { $0.overlaps(range) }), base?.isZero(range) == false else { continue }
            kinds[index] = work.conversion.options.compatibility == .version2 ? .data : .cleared
            // A cluster of the buffer, which is written as it is.
            if kinds[index] == .data { memory.piece(range.lowerBound, size).clear() }
        }
    }

    /// What a cluster with data of the source is over the backing file.
    private func compare(_ cluster: IOMemory, _ piece: ConversionWork.Piece, _ index: Int) -> Cluster {
        let start = index * cluster.count, range = start..<min(start + cluster.count, Int(piece.length))
        if base?.isEqual(cluster, range) == true { return .zero }
        guard cluster.isZero else { return .data }
        return work.conversion.options.compatibility == .version2 ? .data : .cleared
    }

    /// Where a range of data ends or begins within a cluster, the rest of that cluster is zeroes.
    private func fillGaps(upTo end: Int) {
        let size = Int(work.unit)
        func clear(_ range: Range<Int>) {
            if !range.isEmpty { memory.piece(range.lowerBound, range.count).clear() }
        }
        var done = 0
        for range in data {
            // From the end of the last range to the end of its cluster, and from the start of the cluster of this one.
            let clusterEnd = min((done + size - 1) / size * size, range.lowerBound)
            clear(done..<clusterEnd)
            clear(max(clusterEnd, range.lowerBound / size * size)..<range.lowerBound)
            done = range.upperBound
        }
        clear(done..<min((done + size - 1) / size * size, end))
    }

    /// Compresses a cluster; nil when that is not wanted, or does not make it smaller where it could be stored as it
    /// is.
    /// - Parameter offset: of the disk.
    private func compress(_ cluster: IOMemory, of offset: UInt64, at start: Int) -> Int? {
        if work.isStream {
            // There is room for each grain of a piece.
            return compressor?.storeGrain(
                cluster, sector: offset >> 9, into: compressed.memory.piece(start, VMDKGrain.room))
        }
        // Each is smaller than its cluster, so all of them together are smaller than a piece.
        return compressor?.compress(cluster, into: compressed.memory.piece(start, cluster.count - 1))
    }

    /// Gives neighbouring clusters places as they are, and notes which of them are written there.
    private func placeData(
        _ first: UInt64, _ clusters: Range<Int>, _ kinds: [Cluster], _ builder: inout any ImageBuilder,
        _ writes: inout [Write], _ file: borrowing NewFile
    ) throws(DiskImageError) {
        let size = Int(work.unit)
        let cluster = first + UInt64(clusters.lowerBound)
        // The table first, so that it lies before what it maps.
        try builder.openTable(of: cluster, file)
        let place = builder.allocate(UInt64(clusters.count))
        let writesZeroes = work.conversion.preallocation == .full
        if work.conversion.options.extendedL2, !work.coversZeroes, base == nil {
            for index in clusters {
                let place = place + UInt64((index - clusters.lowerBound) * size)
                try builder.map(first + UInt64(index), count: 1, to: place, subclusters: subclusters(index), file)
            }
        } else {
            try builder.map(cluster, count: UInt64(clusters.count), to: place, subclusters: .max, file)
        }
        for index in clusters where kinds[index] != .zero || writesZeroes {
            if kinds[index] == .zero { memory.piece(index * size, size).clear() }
            append(
                Write(
                    source: .buffer, start: index * size, count: size,
                    place: place + UInt64((index - clusters.lowerBound) * size)), to: &writes)
        }
    }

    /// Which subclusters of a cluster hold anything.
    private func subclusters(_ index: Int) -> UInt32 {
        let size = Int(work.unit) / 32
        var bitmap: UInt32 = 0
        for bit in 0..<32 {
            if !memory.piece(index * Int(work.unit) + bit * size, size).isZero { bitmap |= 1 << UInt32(bit) }
        }
        return bitmap
    }

    /// Notes a write; one that continues where the last one ends becomes a part of it.
    private func append(_ write: Write, to writes: inout [Write]) {
        if let last = writes.last, last.source == write.source, last.start + last.count == write.start,
            last.place + UInt64(last.count) == write.place
        {
            writes[writes.count - 1].count += write.count
        } else {
            writes.append(write)
        }
    }

    private enum Cluster: Equatable {
        /// Nothing is needed.
        case zero
        /// Zeroes that the backing file does not have.
        case cleared
        case data
        case compressed(start: Int, length: Int)
    }
}
