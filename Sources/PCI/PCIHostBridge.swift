// SPDX-License-Identifier: Apache-2.0

internal import Linux
internal import Synchronization

/// The root of a PCI Express hierarchy: finds functions by configuration accesses, of ECAM and mechanism #1, and their
/// BARs by addresses in its windows.
///
/// Which functions there are, and where their BARs are, is behind one lock, which is held for a look-up and not for
/// what the function does. A BAR that is not completely in one window is not decoded; where several functions claim an
/// address, the lowest bus, device and function has it. Whatever is not there reads as all ones and takes no write.
public final class PCIHostBridge: Sendable {
    /// Bytes of ECAM for each bus.
    public static let busSpan: UInt64 = 1 << 20

    /// Guest-physical memory in which BARs are decoded.
    public let windows: [Range<UInt64>]

    private struct Decoded {
        let address: PCIAddress
        let function: any PCIFunction
        let placement: PCIConfigurationSpace.Placement
    }

    private struct State {
        var functions: [PCIAddress: any PCIFunction]
        /// In the order of ``Decoded/address``.
        var decoded: [Decoded] = []
    }

    private let state: Guarded<State>
    /// CONFIG_ADDRESS of mechanism #1.
    private let configurationAddress = Atomic<UInt32>(0)

    /// - Parameter isForFirmware: the bridge is one that firmware knows.
    public init(windows: [Range<UInt64>], isForFirmware: Bool = false) {
        self.windows = windows
        state = Guarded(
            State(functions: [PCIAddress(device: 0): HostBridgeFunction(isForFirmware: isForFirmware)]))
    }

    // MARK: Functions

    /// Adds a function. Its BARs are decoded as its registers say.
    public func insert(_ function: any PCIFunction, at address: PCIAddress) {
        state.withLock { $0.functions[address] = function }
        refresh(function, at: address)
    }

    /// Removes a function. A vCPU may still be in an access to it.
    public func remove(at address: PCIAddress) {
        state.withLock { state in
            guard let function = state.functions.removeValue(forKey: address) else { return }
            state.decoded.removeAll { $0.address == address }
            function.place([])
        }
    }

    /// Has the accesses to a function's BARs go where its registers say now.
    ///
    /// All callers read the registers and act on them under the lock, so the last one acts on the last state.
    private func refresh(_ function: any PCIFunction, at address: PCIAddress) {
        state.withLock { state in
            guard let present = state.functions[address], present === function else { return }
            let placements = function.placements.filter { placement in
                windows.contains {
                    $0.lowerBound <= placement.range.lowerBound && placement.range.upperBound <= $0.upperBound
                }
            }
            guard state.decoded.filter({ $0.address == address }).map(\.placement) != placements else { return }
            state.decoded.removeAll { $0.address == address }
            state.decoded += placements.map { Decoded(address: address, function: function, placement: $0) }
            state.decoded.sort { $0.address < $1.address }
            function.place(placements)
        }
    }

    // MARK: Configuration accesses

    /// Reads configuration space.
    public func readConfiguration(of address: PCIAddress, at offset: Int, size: Int) -> UInt32 {
        guard PCIConfigurationSpace.isAccess(offset, size), let (function, isOneOfSeveral) = find(address) else {
            return UInt32(truncatingIfNeeded: allOnes(size: size))
        }
        let value = function.readConfiguration(at: offset, size: size)
        let headerType = PCIConfigurationSpace.Register.headerType
        guard isOneOfSeveral, (offset..<offset + size).contains(headerType) else { return value }
        return value | 0x80 << UInt32(8 * (headerType - offset))
    }

    /// Writes configuration space.
    public func writeConfiguration(_ value: UInt32, of address: PCIAddress, at offset: Int, size: Int) {
        guard PCIConfigurationSpace.isAccess(offset, size), let (function, _) = find(address) else { return }
        function.writeConfiguration(value, at: offset, size: size)
        // The registers with the BARs' addresses are in the header.
        if offset < PCIConfigurationSpace.Register.bars.upperBound { refresh(function, at: address) }
    }

    /// A function, and whether its device has others.
    private func find(_ address: PCIAddress) -> (function: any PCIFunction, isOneOfSeveral: Bool)? {
        state.withLock { state in
            guard let function = state.functions[address] else { return nil }
            let others = (UInt8(0)..<8).contains { number in
                number != address.function
                    && state.functions[PCIAddress(bus: address.bus, device: address.device, function: number)] != nil
            }
            return (function, others)
        }
    }

    /// Reads ECAM (PCI Express 5.0 §7.2.2).
    /// - Parameter offset: bytes from its begin, at which bus 0 is.
    public func readECAM(at offset: UInt64, size: Int) -> UInt64 {
        guard let (address, register) = Self.ecam(offset) else { return allOnes(size: size) }
        guard size <= 4 else { return allOnes(size: size) }
        return UInt64(readConfiguration(of: address, at: register, size: size)) & allOnes(size: size)
    }

    /// Writes ECAM.
    public func writeECAM(_ value: UInt64, at offset: UInt64, size: Int) {
        guard size <= 4, let (address, register) = Self.ecam(offset) else { return }
        writeConfiguration(UInt32(truncatingIfNeeded: value), of: address, at: register, size: size)
    }

    private static func ecam(_ offset: UInt64) -> (PCIAddress, register: Int)? {
        guard offset < 256 * busSpan else { return nil }
        return (PCIAddress(number: UInt32(truncatingIfNeeded: offset >> 12)), Int(offset & 0xfff))
    }

    /// Reads a port of mechanism #1 (PCI Local Bus 3.0 §3.2.2.3.2).
    /// - Parameter offset: 0 for CONFIG_ADDRESS, which is only for accesses of 4 bytes; 4 to 7 for CONFIG_DATA.
    public func readPort(_ offset: UInt16, size: Int) -> UInt32 {
        if offset == 0, size == 4 { return configurationAddress.load(ordering: .relaxed) }
        guard let (address, register) = selected(offset) else { return UInt32(truncatingIfNeeded: allOnes(size: size)) }
        return readConfiguration(of: address, at: register, size: size)
    }

    /// Writes a port of mechanism #1.
    public func writePort(_ value: UInt32, _ offset: UInt16, size: Int) {
        if offset == 0, size == 4 { return configurationAddress.store(value & 0x80ff_fffc, ordering: .relaxed) }
        guard let (address, register) = selected(offset) else { return }
        writeConfiguration(value, of: address, at: register, size: size)
    }

    private func selected(_ offset: UInt16) -> (PCIAddress, register: Int)? {
        let selected = configurationAddress.load(ordering: .relaxed)
        guard offset >= 4, offset < 8, selected & 1 << 31 != 0 else { return nil }
        return (PCIAddress(number: selected >> 8 & 0xffff), Int(selected & 0xfc) + Int(offset - 4))
    }

    // MARK: Windows

    /// Reads what is at a guest-physical address in the windows.
    public func read(at address: UInt64, size: Int) -> UInt64 {
        guard let (function, bar, offset) = target(address, size) else { return allOnes(size: size) }
        return function.readBAR(bar, at: offset, size: size)
    }

    /// Writes there.
    public func write(_ value: UInt64, at address: UInt64, size: Int) {
        guard let (function, bar, offset) = target(address, size) else { return }
        function.writeBAR(bar, value & allOnes(size: size), at: offset, size: size)
    }

    private func target(_ address: UInt64, _ size: Int) -> (function: any PCIFunction, bar: Int, offset: UInt64)? {
        guard size >= 1, size <= 8 else { return nil }
        return state.withLock { state in
            for decoded in state.decoded {
                let range = decoded.placement.range
                guard range.contains(address) else { continue }
                guard UInt64(size) <= range.upperBound - address else { return nil }
                return (decoded.function, decoded.placement.bar, address - range.lowerBound)
            }
            return nil
        }
    }

    /// What is at an address in ECAM (`isConfiguration`) or in the windows, for tables; nil where nothing is.
    public func name(at address: UInt64, isConfiguration: Bool = false) -> String? {
        if isConfiguration {
            guard let (place, register) = Self.ecam(address), let (function, _) = find(place) else { return nil }
            return "\(function.name) configuration+0x\(String(register, radix: 16))"
        }
        guard let (function, _, offset) = target(address, 1) else { return nil }
        return "\(function.name)+0x\(String(offset, radix: 16))"
    }
}
