// SPDX-License-Identifier: Apache-2.0

internal import Devices
internal import KVM
internal import Linux
internal import PCI
internal import Platform
internal import Virtio

/// What answers at which addresses, of ports or of guest-physical memory.
///
/// Changing the map makes another ``Table``. A vCPU's thread reads the table that it has, without a lock; a
/// change of the map has each thread take the new one afterwards (``PausePoint/requestReload()``). Then no thread uses
/// what was removed.
final class AddressMap<Target: Sendable>: Sendable {
    struct Entry: Sendable {
        let first: UInt64
        let count: UInt64
        let target: Target

        init(_ first: UInt64, count: UInt64, _ target: Target) {
            self.first = first
            self.count = count
            self.target = target
        }
    }

    /// One state of the map, which does not change.
    final class Table: Sendable {
        let entries: [Entry]

        init(_ entries: [Entry]) { self.entries = entries }

        /// The entry that has an address; nil where there is nothing.
        func index(of address: UInt64) -> Int? {
            // By index: an entry that is read is not copied, its target not retained.
            for index in entries.indices where address &- entries[index].first < entries[index].count { return index }
            return nil
        }
    }

    private let current: Guarded<Table>

    /// - Parameter entries: the busiest first; where two have an address, the earlier one answers.
    init(_ entries: [Entry] = []) { current = Guarded(Table(entries)) }

    var table: Table { current.withLock { $0 } }

    func insert(_ entry: Entry) { current.withLock { $0 = Table($0.entries + [entry]) } }

    /// Removes what begins at an address.
    func remove(at first: UInt64) {
        current.withLock { $0 = Table($0.entries.filter { entry in entry.first != first }) }
    }
}

/// What a vCPU's thread reads of both maps; none while it is stopped.
struct AddressTables {
    var ports: AddressMap<any PortDevice>.Table?
    var mmio: AddressMap<any MMIODevice>.Table?
}

/// What answers in a range of guest-physical memory. Called on vCPU threads.
protocol MMIODevice: AnyObject, Sendable {
    /// Reads 1 to 8 bytes at an offset from the range's begin. Bits above `size` bytes are zero.
    func read(at offset: UInt64, size: Int) -> UInt64
    func write(_ value: UInt64, at offset: UInt64, size: Int)
    /// What is at an offset, for tables; nil where nothing is.
    func name(at offset: UInt64) -> String?
}

extension MMIOTransport: MMIODevice {
    func name(at offset: UInt64) -> String? { "\(function.device.name)+0x\(String(offset, radix: 16))" }
}

extension AddressMap<any PortDevice>.Entry {
    init(_ ports: ClosedRange<UInt16>, _ device: any PortDevice) {
        self.init(UInt64(ports.lowerBound), count: UInt64(ports.count), device)
    }
}

extension AddressMap<any PortDevice>.Table {
    /// What answers at a port, by its type's name, for tables; nil where nothing does.
    func name(at port: UInt16) -> String? {
        index(of: UInt64(port)).map { String(describing: type(of: entries[$0].target)) }
    }

    /// Answers one port instruction. Where no device is, reads are all ones and writes are ignored.
    func handle(_ access: PortAccess) {
        guard let index = index(of: UInt64(access.port)) else {
            if !access.isWrite {
                for item in 0..<access.count { access[item] = .max }
            }
            return
        }
        let device = entries[index].target,
            offset = UInt16(truncatingIfNeeded: UInt64(access.port) &- entries[index].first)
        if !access.isWrite {
            for item in 0..<access.count { access[item] = device.read(offset, size: access.size) }
        } else if access.count == 1 {
            device.write(offset, size: access.size, value: access[0])
        } else {
            access.withBytes { device.write(offset, size: access.size, string: $0) }
        }
    }
}

extension AddressMap<any MMIODevice>.Table {
    /// The name of the device at an address and the register's offset, for tables; nil where none is.
    func name(at address: UInt64) -> String? {
        index(of: address).flatMap { entries[$0].target.name(at: address &- entries[$0].first) }
    }

    /// Answers one access. Where no device is, reads are all ones and writes are ignored.
    func handle(_ access: MMIOAccess) {
        guard let index = index(of: access.address) else {
            if !access.isWrite { access.value = .max }
            return
        }
        let register = access.address &- entries[index].first
        if access.isWrite {
            entries[index].target.write(access.value, at: register, size: access.size)
        } else {
            access.value = entries[index].target.read(at: register, size: access.size)
        }
    }
}
