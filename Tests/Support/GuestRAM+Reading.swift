// SPDX-License-Identifier: Apache-2.0

public import GuestMemory

/// Values that a test reads where a driver or a device has written them; little-endian, at any alignment.
extension GuestRAM {
    public func readUInt16(at address: GuestAddress) throws(GuestMemoryError) -> UInt16 {
        try range(address, 2).load16(0)
    }

    public func readUInt32(at address: GuestAddress) throws(GuestMemoryError) -> UInt32 {
        try range(address, 4).load32(0)
    }

    public func readUInt64(at address: GuestAddress) throws(GuestMemoryError) -> UInt64 {
        try range(address, 8).load64(0)
    }

    private func range(_ address: GuestAddress, _ count: UInt64) throws(GuestMemoryError) -> GuestSlice {
        guard let slice = slice(at: address, count: count) else { throw .outOfRange(address, count: count) }
        return slice
    }
}
