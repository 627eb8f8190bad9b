// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory

/// Which pages of a balloon are in it, where the host's pages are larger: a huge page goes back when all of its pages
/// are in the balloon.
///
/// It holds as long as the driver tells of each page before it uses it again (VIRTIO_BALLOON_F_MUST_TELL_HOST).
struct HugePageLedger: ~Copyable {
    /// Bytes of a huge page.
    let hugePageSize: UInt64
    private let pagesOfOne: UInt32
    /// A bit for each page.
    private var bits: [UInt64]
    /// For each huge page, how many of its pages are in the balloon.
    private var counts: [UInt32]
    /// Huge pages that the host has got and not given back.
    private(set) var released = 0
    private var isReleased: [Bool]

    /// - Parameter size: bytes of memory, a multiple of `hugePageSize`.
    init(size: UInt64, hugePageSize: UInt64) {
        self.hugePageSize = hugePageSize
        pagesOfOne = UInt32(hugePageSize / BalloonSettings.pageSize)
        bits = [UInt64](repeating: 0, count: Int(size / BalloonSettings.pageSize / 64))
        counts = [UInt32](repeating: 0, count: Int(size / hugePageSize))
        isReleased = [Bool](repeating: false, count: counts.count)
    }

    private func hugePage(of page: Int) -> Int { page / Int(pagesOfOne) }

    /// Bytes before the huge page of a page.
    func offset(of page: Int) -> UInt64 { UInt64(hugePage(of: page)) * hugePageSize }

    /// Puts a page, by its number in the memory, into the balloon.
    /// - Returns: whether its huge page is in the balloon completely since now.
    mutating func insert(_ page: Int) -> Bool {
        let mask: UInt64 = 1 << UInt64(page % 64)
        guard bits[page / 64] & mask == 0 else { return false }
        bits[page / 64] |= mask
        counts[hugePage(of: page)] += 1
        return counts[hugePage(of: page)] == pagesOfOne
    }

    /// Takes a page out of the balloon.
    mutating func remove(_ page: Int) {
        let mask: UInt64 = 1 << UInt64(page % 64)
        guard bits[page / 64] & mask != 0 else { return }
        bits[page / 64] &= ~mask
        counts[hugePage(of: page)] -= 1
    }

    /// Indicates whether the host has the huge page of a page.
    func isReleased(_ page: Int) -> Bool { isReleased[hugePage(of: page)] }

    /// The host has got the huge page of a page, or has given it back.
    mutating func setReleased(_ page: Int, _ isTrue: Bool) {
        guard isReleased[hugePage(of: page)] != isTrue else { return }
        isReleased[hugePage(of: page)] = isTrue
        released += isTrue ? 1 : -1
    }
}
