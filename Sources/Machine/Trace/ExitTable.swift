// SPDX-License-Identifier: Apache-2.0

internal import KVM
internal import Linux

/// What an exit to user space is counted by.
struct ExitKey: Hashable, Comparable, Sendable {
    /// `KVM_EXIT_*`.
    let reason: UInt32
    /// The port, the guest-physical address or the MSR; 0 where there is none.
    let address: UInt64
    /// Bytes; 0 where there is no access.
    let size: UInt8
    let isWrite: Bool

    /// The same without its address, for the addresses that have no line of their own.
    var withoutAddress: ExitKey { ExitKey(reason: reason, address: 0, size: size, isWrite: isWrite) }

    static func < (left: ExitKey, right: ExitKey) -> Bool {
        (left.reason, left.address, left.size, left.isWrite ? 1 : 0) < (
            right.reason, right.address, right.size, right.isWrite ? 1 : 0
        )
    }
}

extension ExitKey {
    init(_ exit: Exit) {
        switch exit {
        case .port(let access):
            self.init(
                reason: exit.reason, address: UInt64(access.port), size: UInt8(truncatingIfNeeded: access.size),
                isWrite: access.isWrite)
        case .mmio(let access):
            self.init(
                reason: exit.reason, address: access.address, size: UInt8(truncatingIfNeeded: access.size),
                isWrite: access.isWrite)
        case .readMSR(let index): self.init(reason: exit.reason, address: UInt64(index), size: 8, isWrite: false)
        case .writeMSR(let index, _): self.init(reason: exit.reason, address: UInt64(index), size: 8, isWrite: true)
        default: self.init(reason: exit.reason, address: 0, size: 0, isWrite: false)
        }
    }
}

/// How often one vCPU has left the guest for user space, by ``ExitKey``.
///
/// Its size is fixed: the guest chooses the addresses, and may choose more than there is room for. Those beyond are
/// counted together.
struct ExitTable: Sendable {
    /// Addresses with a line of their own; a power of two is filled to three quarters, so that probing stays short.
    static let capacity = 768
    private static let slots = 1024

    private var keys = [ExitKey?](repeating: nil, count: slots)
    private var counts = [UInt64](repeating: 0, count: slots)
    private var used = 0
    /// By reason, width and direction, of which there are few.
    private(set) var others: [ExitKey: UInt64] = [:]

    mutating func count(_ key: ExitKey) {
        var slot = Int(truncatingIfNeeded: hash(key)) & (Self.slots - 1)
        while let found = keys[slot] {
            if found == key {
                counts[slot] &+= 1
                return
            }
            slot = (slot + 1) & (Self.slots - 1)
        }
        guard used < Self.capacity else { return others[key.withoutAddress, default: 0] &+= 1 }
        used += 1
        keys[slot] = key
        counts[slot] = 1
    }

    /// The lines that have one of their own.
    var entries: [(key: ExitKey, count: UInt64)] {
        zip(keys, counts).compactMap { key, count in key.map { ($0, count) } }
    }

    /// Spreads neighbouring addresses: the golden ratio's multiple, of which the upper bits are the best mixed.
    private func hash(_ key: ExitKey) -> UInt64 {
        let mixed = key.address ^ UInt64(key.reason) << 48 ^ UInt64(key.size) << 40 ^ (key.isWrite ? 1 << 56 : 0)
        return (mixed &* 0x9e37_79b9_7f4a_7c15) >> 40
    }
}

/// A vCPU's table. Its thread counts; the thread that prints reads it. No other thread takes the lock while the guest
/// runs.
final class ExitCounter: Sendable {
    private let content = Guarded(ExitTable())

    func count(_ exit: Exit) {
        let key = ExitKey(exit)
        content.withLock { $0.count(key) }
    }

    var table: ExitTable { content.withLock { $0 } }
}
