// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// Requests that change an image whose clusters are allocated as they are written: new clusters, and copies of what a
/// request covers in part.
extension RequestPipeline {
    /// Sets the next piece of a write, a discard or zeroes going, of an image whose clusters are allocated as they are
    /// written.
    mutating func change(_ index: Int32) -> Bool {
        let operation = requests[index].operation
        let position = requests[index].position
        let left = encryption.limited(requests[index].length - requests[index].mapped, operation, at: position)
        // Clusters are freed only when nothing writes to them any more: not even, at the other end of a cluster with
        // subclusters, the request itself.
        if operation != .write, shared.claims.isClaimed(position..<position + left) {
            attachment.wait(index)
            return false
        }
        do throws(MetadataError) {
            try image.prepareChange(shared.calls)
        } catch {
            return stop(index, error.lookup)
        }
        switch image.target(operation, position, left, sequence: shared.sequence, shared.calls, &requests[index].search)
        {
        case .inPlace(_, let length) where encryption.encryptsWrites && operation == .discard:
            // A hole would read as noise.
            requests[index].consume(length)
        case .inPlace(let place, let length):
            begin(encryption.encryptsWrites ? .write : operations.kind(for: operation), index, at: place, length)
        case .done(let length):
            operations.spend(metadataOf: length)
            requests[index].consume(length)
        case .clusters(let count):
            return writeClusters(index, position, count * copies.clusterSize, nil)
        case .part(let part):
            return writeClusters(
                index, position, min(left, part.range.upperBound - position % copies.clusterSize), part)
        case .unresolved(let lookup):
            return stop(index, lookup)
        }
        return true
    }

    private func owner(_ request: Int32) -> ClaimTable.Owner {
        ClaimTable.Owner(engine: attachment.number, request: request)
    }

    /// Writes into clusters that the mapping does not have yet: whole ones straight from the request's memory, and a
    /// part of one after the rest of the part has been read.
    private mutating func writeClusters(
        _ index: Int32, _ position: UInt64, _ length: UInt64, _ part: WriteTarget.Part?
    ) -> Bool {
        let cluster = position & ~(copies.clusterSize - 1)
        let end = (position + length + copies.clusterSize - 1) & ~(copies.clusterSize - 1)
        let isWrite = requests[index].operation == .write
        // What a request zeroes has no memory of its own.
        let isWhole =
            isWrite
            && part.map { position - cluster == $0.range.lowerBound && length == UInt64($0.range.count) } != false
        // With subclusters a request may come to one cluster twice (zeroes, at both ends): never with two new clusters
        // for it.
        let own = part?.place == nil ? nil : owner(index)
        guard !shared.claims.isClaimed(cluster..<end, besides: own), isWhole || copies.hasFree else {
            attachment.wait(index)
            return false
        }
        let run: ClusterRun
        do throws(MetadataError) {
            run = try image.allocate((end - cluster) / copies.clusterSize, at: cluster, for: part, shared.calls)
        } catch {
            return stop(index, error.lookup)
        }
        let covered = part == nil ? run.count * copies.clusterSize : length
        shared.claims.insert(cluster..<cluster + run.count * copies.clusterSize, of: owner(index))
        let start = requests[index].mapped, file = requests[index].search.file
        // What was never written in the file reads as the zeroes that the rest of the cluster is to be.
        if let part, !isWhole, !(isWrite && part.isZero && run.isPristine && !encryption.encryptsWrites) {
            requests[index].consume(covered)
            beginCopy(
                CopyTable.Copy(
                    owner: index, start: start, length: covered, guestOffset: cluster,
                    base: cluster + part.range.lowerBound, size: UInt64(part.range.count),
                    run: run, file: file))
        } else {
            begin(.write, index, at: image.place(of: run, file) + (position - cluster), covered, run, cluster)
        }
        return true
    }

    /// Reads the old contents of a cluster.
    private mutating func beginCopy(_ copy: CopyTable.Copy) {
        let index = copies.begin(copy)
        // One for the copy, and one that keeps the request from ending under our hands.
        requests[copy.owner].pending += 2
        let reader = Int32(requests.depth) + index
        let readable = min(copy.size, image.size - copy.base)
        requests[reader] = DiskRequest(
            .read, segments: copies.segments(index, length: readable), offset: copy.base, length: readable)
        advance(reader)
        requests[copy.owner].pending -= 1
    }

    /// The old contents of a cluster are there: once the new ones have come over them, all of it goes to the file.
    mutating func completeReading(copy index: Int32) {
        let reader = Int32(requests.depth) + index
        // A cancelled write is not made, though the old contents have arrived.
        let error = operations.isCancelling ? ECANCELED : requests[reader].error
        guard error != 0 || operations.hasFree else { return requests.stall(reader) }
        let copy = copies.endReading(index)
        let operation = IOOperation(
            kind: .write, request: copy.owner, layer: copy.file,
            fileOffset: image.place(of: copy.run, copy.file) + (copy.base - copy.guestOffset),
            start: copy.start, length: copy.size, memory: .piece(copies.buffer(index)), run: copy.run,
            guestOffset: copy.guestOffset, copy: index)
        if error == 0 {
            begin(operation)
        } else {
            // Without the rest of the cluster nothing can be written.
            completeClusters(operation, error)
        }
        // The request counted the copy, and counts its operation now.
        if error != 0 { requests[copy.owner].fail(error, requests[reader].failed) }
        endOperation(of: copy.owner)
        if error != 0 { retryWaiting() }
    }

    /// New clusters have been written, or could not be.
    mutating func completeClusters(_ ended: IOOperation, _ error: Int32) {
        if error == 0 {
            image.link(ended.run, at: ended.guestOffset, sequence: shared.sequence)
        } else {
            image.abandon(ended.run, at: ended.guestOffset, sequence: shared.sequence)
        }
        if ended.copy >= 0 { copies.end(ended.copy) }
        shared.claims.remove(ended.guestOffset, of: owner(ended.request))
    }
}
