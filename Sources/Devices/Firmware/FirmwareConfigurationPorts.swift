// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
internal import Linux

/// QEMU's firmware configuration device (`docs/specs/fw_cfg.rst`) at ports 0x510 to 0x51b: a selector, a data port that
/// returns the selected item byte by byte, and a DMA interface that copies parts of an item to RAM.
///
/// All items are read-only. What a guest writes is untrusted: a transfer goes to RAM in one range or nowhere, and is
/// not longer than the item but for ``longestPadding`` bytes of zero.
public final class FirmwareConfigurationPorts: PortDevice {
    /// Zeros that one transfer may have behind the end of an item.
    static let longestPadding: UInt64 = 1 << 20

    private enum Register {
        static let selector: UInt16 = 0, data: UInt16 = 1
        /// The DMA address, most significant byte first; a write to the lower half starts a transfer.
        static let addressHigh: UInt16 = 4, addressLow: UInt16 = 8
    }
    private enum Control {
        static let error: UInt32 = 1, read: UInt32 = 2, skip: UInt32 = 4, select: UInt32 = 8, write: UInt32 = 16
    }

    private struct State {
        var selected: UInt16 = 0
        /// The next byte of the selected item.
        var offset: UInt64 = 0
        var addressHigh: UInt32 = 0
    }

    private let items: [UInt16: [UInt8]]
    private let ram: GuestRAM
    private let state = Guarded(State())

    /// - Parameter ram: lives as long as the device does.
    public init(_ configuration: FirmwareConfiguration, _ ram: GuestRAM) {
        items = configuration.items
        self.ram = ram
    }

    public func read(_ offset: UInt16, size: Int) -> UInt32 {
        switch (offset, size) {
        case (Register.selector, 1), (Register.data, 1): UInt32(nextByte())
        // The address register reads as "QEMU CFG".
        case (Register.addressHigh, 4): 0x554d_4551
        case (Register.addressLow, 4): 0x4746_4320
        default: .max
        }
    }

    public func write(_ offset: UInt16, size: Int, value: UInt32) {
        switch (offset, size) {
        case (Register.selector, 2):
            state.withLock { state in
                state.selected = UInt16(truncatingIfNeeded: value)
                state.offset = 0
            }
        case (Register.addressHigh, 4): state.withLock { $0.addressHigh = value.byteSwapped }
        case (Register.addressLow, 4):
            state.withLock { state in
                let address = UInt64(state.addressHigh) << 32 | UInt64(value.byteSwapped)
                state.addressHigh = 0
                transfer(GuestAddress(address), &state)
            }
        // Items are read-only.
        default: break
        }
    }

    private func nextByte() -> UInt8 {
        state.withLock { state in
            guard let item = items[state.selected], state.offset < UInt64(item.count) else { return 0 }
            defer { state.offset += 1 }
            return item[Int(state.offset)]
        }
    }

    /// Executes the command at an address in RAM: control, length and address, big-endian. Then control is 0, or has
    /// the error bit. A command that is not in RAM has no place for an answer.
    private func transfer(_ command: GuestAddress, _ state: inout State) {
        guard let slice = ram.slice(at: command, count: 16) else { return }
        let control = slice.load32(0).byteSwapped
        let length = UInt64(slice.load32(4).byteSwapped)
        let address = GuestAddress(slice.load64(8).byteSwapped)
        if control & Control.select != 0 {
            state.selected = UInt16(control >> 16)
            state.offset = 0
        }
        var succeeds = true
        if control & Control.read != 0 {
            succeeds = copy(length, to: address, &state)
        } else if control & Control.write != 0 {
            succeeds = false
        } else if control & Control.skip != 0 {
            // Two 32-bit numbers, again and again: 64 bits are not reached by a guest's life.
            state.offset &+= length
        }
        slice.store32((succeeds ? 0 : Control.error).byteSwapped, 0)
    }

    /// Copies the next bytes of the selected item, and zeros behind its end.
    private func copy(_ length: UInt64, to address: GuestAddress, _ state: inout State) -> Bool {
        let item = items[state.selected] ?? []
        let rest = UInt64(item.count) - min(state.offset, UInt64(item.count))
        let count = min(length, rest)
        guard length - count <= Self.longestPadding, ram.contains(address, count: length) else { return false }
        let first = Int(UInt64(item.count) - rest)
        do throws(GuestMemoryError) {
            // Bytes have no padding.
            unsafe try ram.write(item.span.extracting(first..<first + Int(count)).bytes, at: address)
            try ram.fill(at: address &+ count, count: length - count)
        } catch { return false }
        state.offset &+= length
        return true
    }
}
