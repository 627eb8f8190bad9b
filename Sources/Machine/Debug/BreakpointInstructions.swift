// SPDX-License-Identifier: Apache-2.0

internal import GDBRemote
internal import GuestMemory

/// The breakpoint instructions (`int3`) that a debugger has put into guest RAM, and the bytes that were there.
///
/// They are known by guest-physical address, since the same page may be mapped at several virtual ones. Used while all
/// vCPUs are stopped.
struct BreakpointInstructions {
    private static let instruction: UInt8 = 0xcc
    /// More than any debugger's user sets, and little enough for a debugger that is up to no good.
    private static let limit = 1024

    private let ram: GuestRAM
    /// The byte under each instruction.
    private var originals: [GuestAddress: UInt8] = [:]
    /// Where each breakpoint of the debugger is.
    private var places: [Breakpoint: GuestAddress] = [:]

    init(_ ram: GuestRAM) { self.ram = ram }

    var isEmpty: Bool { originals.isEmpty }

    /// Indicates whether an `int3` at this address is the debugger's.
    func contains(_ address: GuestAddress) -> Bool { originals[address] != nil }

    mutating func insert(_ breakpoint: Breakpoint, at address: GuestAddress) throws(DebugTargetError) {
        guard places[breakpoint] == nil else { return }
        guard places.count < Self.limit else { throw .noRoom }
        if originals[address] == nil {
            do throws(GuestMemoryError) {
                let original = try ram.readUInt8(at: address)
                try ram.write(Self.instruction, at: address)
                originals[address] = original
            } catch { throw .unmapped }
        }
        places[breakpoint] = address
    }

    mutating func remove(_ breakpoint: Breakpoint) {
        guard let address = places.removeValue(forKey: breakpoint), !places.values.contains(address) else { return }
        restore(address)
    }

    mutating func removeAll() {
        places.removeAll()
        for address in originals.keys { restore(address) }
    }

    private mutating func restore(_ address: GuestAddress) {
        guard let original = originals.removeValue(forKey: address) else { return }
        // What the guest has written there since is newer than what was found.
        if (try? ram.readUInt8(at: address)) == Self.instruction { try? ram.write(original, at: address) }
    }

    /// Guest RAM as it would be without them.
    func read(at address: GuestAddress, count: Int) throws(DebugTargetError) -> [UInt8] {
        var bytes: [UInt8]
        do throws(GuestMemoryError) { bytes = try ram.readBytes(at: address, count: count) } catch { throw .unmapped }
        for (place, original) in originals {
            let offset = place.rawValue &- address.rawValue
            if offset < UInt64(bytes.count), bytes[Int(offset)] == Self.instruction { bytes[Int(offset)] = original }
        }
        return bytes
    }

    /// Writes around them: they stay, and the byte goes under them.
    mutating func write(_ bytes: ArraySlice<UInt8>, at address: GuestAddress) throws(DebugTargetError) {
        var bytes = Array(bytes)
        guard ram.contains(address, count: UInt64(bytes.count)) else { throw .unmapped }
        for place in Array(originals.keys) {
            let offset = place.rawValue &- address.rawValue
            guard offset < UInt64(bytes.count) else { continue }
            originals[place] = bytes[Int(offset)]
            bytes[Int(offset)] = Self.instruction
        }
        do throws(GuestMemoryError) { try ram.write(bytes, at: address) } catch { throw .unmapped }
    }
}
