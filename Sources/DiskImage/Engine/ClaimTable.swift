// SPDX-License-Identifier: Apache-2.0

/// The clusters for which new ones are being written, each by one request: others that would change them wait.
///
/// Claims of different requests do not overlap, so in their order the one sought is found by halving. One request may
/// claim a cluster several times, for different parts of it.
struct ClaimTable {
    /// The owner of a claim: a request of an engine.
    struct Owner: Equatable {
        /// The engine's number at its image.
        let engine: Int
        let request: Int32
    }

    private struct Claim {
        let start: UInt64
        let end: UInt64
        let owner: Owner
    }

    /// In the order of the disk.
    private var claims: [Claim] = []

    var isEmpty: Bool { claims.isEmpty }

    /// Reserves memory, so that a claim allocates none.
    mutating func reserve(_ more: Int) { claims.reserveCapacity(claims.capacity + more) }

    /// Indicates whether anybody, or anybody else than `owner`, has claimed a part of a range of the disk, in bytes.
    func isClaimed(_ range: Range<UInt64>, besides owner: Owner? = nil) -> Bool {
        var index = firstIndex(endingAfter: range.lowerBound)
        while index < claims.count, claims[index].start < range.upperBound {
            if claims[index].owner != owner { return true }
            index += 1
        }
        return false
    }

    /// Claims whole clusters, nothing of which anybody else has claimed.
    mutating func insert(_ range: Range<UInt64>, of owner: Owner) {
        claims.insert(
            Claim(start: range.lowerBound, end: range.upperBound, owner: owner),
            at: firstIndex(endingAfter: range.lowerBound))
    }

    /// Ends one claim of the clusters that begin at `start`.
    mutating func remove(_ start: UInt64, of owner: Owner) {
        let index = firstIndex(endingAfter: start)
        // Others at this place there are none; that of another operation of the same request is as good.
        guard index < claims.count, claims[index].start == start, claims[index].owner == owner else { return }
        claims.remove(at: index)
    }

    /// Ends all claims of an engine.
    mutating func removeAll(ofEngine engine: Int) { claims.removeAll { $0.owner.engine == engine } }

    private func firstIndex(endingAfter offset: UInt64) -> Int {
        var low = 0, high = claims.count
        while low < high {
            let middle = (low + high) / 2
            if claims[middle].end <= offset { low = middle + 1 } else { high = middle }
        }
        return low
    }
}
