// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// What an engine does for an image whose clusters are allocated as they are written: new clusters, and copies of what a request
/// covers in part.
extension DiskEngine {
    /// Clusters that are being copied. Each has a buffer and a request, number `depth` + its own, which reads the old contents.
    struct Copies: ~Copyable {
        struct Copy {
            /// The request that writes into the cluster, and which of its bytes go there.
            var owner: Int32 = -1
            var start: UInt64 = 0
            var length: UInt64 = 0
            /// The cluster on the disk and in the file.
            var guestOffset: UInt64 = 0
            /// The bytes of the disk that the buffer has.
            var base: UInt64 = 0
            var size: UInt64 = 0
            var run = ClusterRun(first: 0, count: 0)
            var file = 0
            /// Indicates whether the old contents are being read; then an operation writes the new ones.
            var isReading = true
            /// The next free one.
            var next: Int32 = -1
        }

        static let maximum = 16

        let count: Int
        let clusterSize: UInt64
        private let buffers: IOBuffer
        private let copies: Slab<Copy>
        private var vectors: IOSegmentLists

        /// - Parameter clusterSize: 0 for an image that needs no copies.
        init(_ clusterSize: UInt64, _ path: String) throws(DiskImageError) {
            let count = clusterSize == 0 ? 0 : Self.maximum
            let buffers = try IOBuffer(count: count * Int(clusterSize), path)
            let vectors = try IOSegmentLists(count: Self.maximum, capacity: 1, path)
            self.buffers = buffers
            self.vectors = vectors
            self.count = count
            self.clusterSize = clusterSize
            copies = Slab(count: Self.maximum) { Copy(isReading: false, next: $0 + 1 < Self.maximum ? Int32($0 + 1) : -1) }
        }

        subscript(_ index: Int32) -> Copy {
            get { copies[index] }
            set { copies[index] = newValue }
        }

        /// A cluster's bytes.
        func buffer(_ index: Int32) -> IOMemory { buffers.piece(Int(index) * Int(clusterSize), Int(clusterSize)) }

        /// The segment with the first `length` bytes of a buffer; it stays until it is next asked for.
        mutating func segments(_ index: Int32, length: UInt64) -> IOSegments { vectors.list(Int(index), buffer(index).prefix(Int(length))) }
    }

    var metadataFile: MetadataFile { MetadataFile(calls: shared.calls, number: image.descriptor(0), failures: image.failures) }
    /// The file with the guest's data, which may be the same.
    var dataFile: MetadataFile { MetadataFile(calls: shared.calls, number: image.dataDescriptor(0)) }

    // MARK: - Changes

    /// Sets the next piece of a write, a discard or zeroes going. Returns false when the request has to wait.
    mutating func change(_ index: Int32) -> Bool {
        let operation = requests[index].operation
        let position = requests[index].offset + requests[index].mapped
        let left = encryption.limited(requests[index].length - requests[index].mapped, operation, at: position)
        // Clusters are given back only when nobody writes to them any more: not even, at the other end of a cluster with subclusters, the request itself.
        if operation != .write, shared.claims.isClaimed(position..<position + left) {
            wait(index)
            return false
        }
        do throws(MetadataError) {
            try image.prepareChange(shared.calls)
        } catch {
            return stop(index, error.lookup)
        }
        switch image.target(operation, position, left, sequence: shared.sequence, shared.calls, &requests[index].search) {
        case .inPlace(_, let length) where encryption.encryptsWrites && operation == .discard:
            // A hole would read as noise.
            requests[index].consume(length)
        case .inPlace(let place, let length):
            let kind: Operation.Kind =
                switch operation {
                case .write: .write
                case _ where encryption.encryptsWrites: .write
                case .discard, .writeZeroesUnmapping: .punch
                case .read, .flush, .writeZeroes: refusesZeroRange ? .writeZeroes : .zeroRange
                }
            begin(Operation(kind: kind, request: index, layer: requests[index].search.file, fileOffset: place, start: requests[index].mapped, length: length))
            requests[index].consume(length)
        case .done(let length):
            turnLeft -= Int(clamping: length >> Self.metadataShift)
            requests[index].consume(length)
        case .clusters(let count):
            return writeClusters(index, position, count * copies.clusterSize, nil)
        case .part(let part):
            let length = min(left, part.range.upperBound - position % copies.clusterSize)
            return writeClusters(index, position, length, part)
        case .unresolved(let lookup):
            return stop(index, lookup)
        }
        return true
    }

    /// A request cannot go on now. Returns whether it is to be looked at again at once, as it has failed.
    @discardableResult
    mutating func stop(_ index: Int32, _ lookup: RangeLookup) -> Bool {
        switch lookup {
        case .load(let load):
            wait(index)
            begin(load)
            return false
        case .commit:
            requests[index].awaitsCommit = true
            wait(index)
            startCommit()
            return false
        case .wait:
            wait(index)
            return false
        case .failed(let error):
            image.markDamage(shared.calls)
            requests[index].error = error
            requests[index].failed = image.refusedAccess(of: error)
            return true
        case .data, .zero, .unallocated, .memory:
            requests[index].error = EIO
            return true
        }
    }

    /// Writes into clusters that the mapping does not have yet: whole ones straight from the request's memory, and a part of one after the rest of
    /// the part has been read.
    private mutating func writeClusters(_ index: Int32, _ position: UInt64, _ length: UInt64, _ part: WriteTarget.Part?) -> Bool {
        let cluster = position & ~(copies.clusterSize - 1)
        let end = (position + length + copies.clusterSize - 1) & ~(copies.clusterSize - 1)
        let isWrite = requests[index].operation == .write
        // What a request zeroes has no memory of its own.
        let isWhole = isWrite && part.map { position - cluster == $0.range.lowerBound && length == UInt64($0.range.count) } != false
        // With subclusters a request may come to one cluster twice (zeroes, at both ends): never with two new clusters for it.
        let own = part?.place == nil ? nil : owner(index)
        guard !shared.claims.isClaimed(cluster..<end, besides: own), isWhole || freeCopy >= 0 else {
            wait(index)
            return false
        }
        let run: ClusterRun
        do throws(MetadataError) {
            run = try image.allocate((end - cluster) / copies.clusterSize, at: cluster, for: part, shared.calls)
        } catch {
            return stop(index, error.lookup)
        }
        let start = requests[index].mapped
        let file = requests[index].search.file
        let place = image.place(of: run, file)
        let covered = part == nil ? run.count * copies.clusterSize : length
        shared.claims.insert(cluster..<cluster + run.count * copies.clusterSize, of: owner(index))
        requests[index].consume(covered)
        // What was never written in the file reads as the zeroes that the rest of the cluster is to be.
        guard let part, !isWhole, !(isWrite && part.isZero && run.isPristine && !encryption.encryptsWrites) else {
            begin(Operation(
                kind: .write, request: index, layer: file, fileOffset: place + (position - cluster), start: start, length: covered, run: run, guestOffset: cluster))
            return true
        }
        let copy = freeCopy
        freeCopy = copies[copy].next
        let base = cluster + part.range.lowerBound, size = UInt64(part.range.count)
        copies[copy] = Copies.Copy(owner: index, start: start, length: covered, guestOffset: cluster, base: base, size: size, run: run, file: file)
        // One for the copy, and one that keeps the request from ending under our hands.
        requests[index].pending += 2
        let reader = Int32(depth) + copy
        let readable = min(size, image.size - base)
        requests[reader] = Request(operation: .read, segments: copies.segments(copy, length: readable), offset: base, length: readable)
        advance(reader)
        requests[index].pending -= 1
        return true
    }

    /// The old contents of a cluster are there: once the new ones have come over them, all of it goes to the file.
    mutating func completeReading(copy index: Int32) {
        let reader = Int32(depth) + index
        // What is given up is not written either, though its old contents have come.
        let error = isCancelling ? ECANCELED : requests[reader].error
        let copy = copies[index]
        let operation = Operation(
            kind: .write, request: copy.owner, layer: copy.file, fileOffset: image.place(of: copy.run, copy.file) + (copy.base - copy.guestOffset),
            start: copy.start, length: copy.size, run: copy.run, guestOffset: copy.guestOffset, copy: index)
        if error != 0 {
            // Without the rest of the cluster nothing can be written.
            copies[index].isReading = false
            completeClusters(operation, error)
            endCopy(copy.owner, error, requests[reader].failed)
            retryWaiting()
            return
        }
        guard freeOperation >= 0 else {
            requests[reader].isListed = true
            stalled.append(reader, requests)
            return
        }
        copies[index].isReading = false
        begin(operation)
        // The request counted the copy, and counts its operation now.
        endCopy(copy.owner, 0)
    }

    private mutating func endCopy(_ owner: Int32, _ error: Int32, _ failed: FailedAccess? = nil) {
        requests[owner].pending -= 1
        if error != 0, requests[owner].error == 0 {
            requests[owner].error = error
            requests[owner].failed = failed
        }
        if requests[owner].pending == 0, !requests[owner].isListed { complete(owner) }
    }

    // MARK: - New clusters

    private func owner(_ request: Int32) -> ClaimTable.Owner { ClaimTable.Owner(engine: attachment.number, request: request) }

    /// The mapping does not change while it is locked: what has been written waits. Returns whether it does.
    mutating func deferLinking(_ index: Int32, _ error: Int32) -> Bool {
        guard error == 0, image.isLocked else { return false }
        operations[index].next = attachment.deferredOperation
        attachment.deferredOperation = index
        return true
    }

    /// New clusters have been written, or could not be.
    mutating func completeClusters(_ ended: Operation, _ error: Int32) {
        if error == 0 {
            image.link(ended.run, at: ended.guestOffset, sequence: shared.sequence)
        } else {
            image.abandon(ended.run, at: ended.guestOffset, sequence: shared.sequence)
        }
        if ended.copy >= 0 {
            copies[ended.copy].next = freeCopy
            freeCopy = ended.copy
        }
        shared.claims.remove(ended.guestOffset, of: owner(ended.request))
    }

    /// Something has ended that requests may have waited for, here or at other engines.
    mutating func retryWaiting() {
        shared.wake(besides: attachment)
        retryOwn()
    }

    mutating func retryOwn() {
        let waiters = attachment.waiting
        attachment.waiting = IndexList()
        retry(waiters)
    }
}
