// SPDX-License-Identifier: Apache-2.0

internal import GDBRemote
internal import KVM

/// The four debug registers of x86 (Intel SDM volume 3, §18.2), shared out among a debugger's breakpoints and
/// watchpoints.
///
/// All vCPUs get the same ones. A watchpoint of more bytes than one register covers takes as many as it needs.
struct DebugRegisterSet {
    private struct Entry: Equatable {
        let breakpoint: Breakpoint
        let address: UInt64
        /// 1, 2, 4 or 8 bytes from an address that is a multiple of it.
        let size: UInt64
    }

    private var entries: [Entry?] = [nil, nil, nil, nil]

    /// Takes registers for a breakpoint; one that is there already stays as it is.
    mutating func insert(_ breakpoint: Breakpoint) throws(DebugTargetError) {
        // x86 has no register that watches reads alone; the debugger makes do with one for both.
        guard breakpoint.kind != .readWatch, breakpoint.kind != .software else { throw .unsupported }
        if entries.contains(where: { $0?.breakpoint == breakpoint }) { return }
        let pieces = try Self.pieces(of: breakpoint)
        let free = entries.indices.filter { entries[$0] == nil }
        guard pieces.count <= free.count else { throw .noRoom }
        for (index, piece) in zip(free, pieces) {
            entries[index] = Entry(breakpoint: breakpoint, address: piece.address, size: piece.size)
        }
    }

    mutating func remove(_ breakpoint: Breakpoint) {
        for index in entries.indices where entries[index]?.breakpoint == breakpoint { entries[index] = nil }
    }

    /// What a register that matched stands for.
    func breakpoint(at index: Int) -> Breakpoint? { entries.indices.contains(index) ? entries[index]?.breakpoint : nil }

    /// DR0 to DR3 and DR7, or nil when none is in use.
    var value: GuestDebug.DebugRegisters? {
        guard entries.contains(where: { $0 != nil }) else { return nil }
        func address(_ index: Int) -> UInt64 { entries[index]?.address ?? 0 }
        var control: UInt64 = 0x400  // bit 10 is always 1
        for (index, entry) in entries.enumerated() {
            guard let entry else { continue }
            control |= 2 << (2 * UInt64(index))  // Gn: enabled for every task
            let condition: UInt64 =
                switch entry.breakpoint.kind {
                case .writeWatch: 1
                case .accessWatch, .readWatch: 3
                case .hardware, .software: 0
                }
            let length: UInt64 = [1: 0, 2: 1, 8: 2, 4: 3][entry.size] ?? 0
            control |= (condition | length << 2) << (16 + 4 * UInt64(index))
        }
        return GuestDebug.DebugRegisters(addresses: (address(0), address(1), address(2), address(3)), control: control)
    }

    /// The aligned stretches that cover a breakpoint's bytes.
    private static func pieces(of breakpoint: Breakpoint) throws(DebugTargetError) -> [(address: UInt64, size: UInt64)]
    {
        if breakpoint.kind == .hardware { return [(breakpoint.address, 1)] }
        guard breakpoint.size > 0 else { throw .refused }
        // Four registers cover 32 bytes at most.
        guard breakpoint.size <= 32 else { throw .noRoom }
        var pieces: [(UInt64, UInt64)] = []
        var address = breakpoint.address
        var rest = UInt64(breakpoint.size)
        while rest > 0 {
            let size: UInt64 = [8, 4, 2, 1].first { address % $0 == 0 && $0 <= rest } ?? 1
            pieces.append((address, size))
            address &+= size
            rest -= size
        }
        return pieces
    }
}
