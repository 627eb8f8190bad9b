// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Linux

/// One of KVM's own counters, of a machine or of a vCPU (Documentation/virt/kvm/api.rst, `KVM_GET_STATS_FD`).
public struct KVMCounter: Sendable, Equatable {
    /// The kernel's name of the counter: `exits`, `halt_exits`, `irq_injections`, …
    public let name: String
    public let value: UInt64
}

extension VirtualMachine {
    /// Reads the cumulative counters of the machine, in the kernel's order.
    /// - Throws: where the host has none (``Capability/binaryStatistics``).
    public func counters() throws(KVMError) -> [KVMCounter] {
        try refusing("read the machine's statistics") { () throws(SystemCallError) in try readCounters(of: descriptor) }
    }
}

extension VirtualCPU {
    /// Reads the cumulative counters of the vCPU, in the kernel's order. Any thread may call it, and waits until the
    /// vCPU has left the guest.
    public func counters() throws(KVMError) -> [KVMCounter] {
        try refusing("read the statistics of vCPU \(id)") { () throws(SystemCallError) in
            try readCounters(of: descriptor)
        }
    }

    /// Opens the file with these counters, before the vCPU runs.
    public func counterFile() throws(KVMError) -> CounterFile {
        try refusing("open the statistics of vCPU \(id)") { () throws(SystemCallError) in
            try CounterFile(of: descriptor)
        }
    }
}

/// An open file with KVM's counters. Reading it waits for no vCPU, as an ioctl would.
public final class CounterFile: Sendable {
    private let file: FileDescriptor

    fileprivate init(of descriptor: borrowing FileDescriptor) throws(SystemCallError) {
        file = FileDescriptor(owning: try descriptor.ioctl(CLINUX_KVM_GET_STATS_FD, named: "KVM_GET_STATS_FD"))
    }

    /// The counters of now, in the kernel's order.
    public func counters() throws(KVMError) -> [KVMCounter] {
        try refusing("read statistics") { () throws(SystemCallError) in try read() }
    }

    fileprivate func read() throws(SystemCallError) -> [KVMCounter] {
        var contents: [UInt8] = []
        var room = 32 << 10
        // The file's size is unknown: it is read until a read returns less than there is room for.
        repeat {
            room *= 2
            contents = [UInt8](repeating: 0, count: room)
            // The kernel writes within the array.
            let failure: SystemCallError? = unsafe contents.withUnsafeMutableBytes { buffer in
                do throws(SystemCallError) { room = try unsafe file.read(into: buffer, at: 0) } catch { return error }
                return nil
            }
            if let failure { throw failure }
        } while room == contents.count && room < 1 << 20
        return StatisticsFile(contents.prefix(room)).counters
    }
}

private func readCounters(of descriptor: borrowing FileDescriptor) throws(SystemCallError) -> [KVMCounter] {
    try CounterFile(of: descriptor).read()
}

/// The layout of such a file: a header, an identifier, descriptors with a name each, values.
struct StatisticsFile {
    private let bytes: [UInt8]

    init(_ bytes: some Sequence<UInt8>) { self.bytes = Array(bytes) }

    /// The cumulative ones of a single value; what lies outside the file is left out.
    var counters: [KVMCounter] {
        // flags, exponent, size, offset, bucket_size: the part of struct kvm_stats_desc before its name.
        let descriptorSize = 16
        guard let nameSize = number(4, 4), let count = number(8, 4), let descriptors = number(16, 4),
            let data = number(20, 4)
        else { return [] }
        var counters: [KVMCounter] = []
        for index in 0..<min(count, 4096) {
            let place = descriptors + index * (descriptorSize + nameSize)
            guard let flags = number(place, 4), let items = number(place + 6, 2), let offset = number(place + 8, 4),
                let value = number64(data + offset), place + descriptorSize + nameSize <= bytes.count
            else { continue }
            guard items == 1, flags & 0xf == 0 else { continue }  // KVM_STATS_TYPE_CUMULATIVE
            let name = bytes[(place + descriptorSize)..<(place + descriptorSize + nameSize)].prefix { $0 != 0 }
            counters.append(KVMCounter(name: String(decoding: name, as: UTF8.self), value: value))
        }
        return counters
    }

    /// A little-endian number of up to 4 bytes, which cannot overflow an Int however it is added up here.
    private func number(_ offset: Int, _ size: Int) -> Int? {
        guard offset >= 0, offset <= bytes.count - size else { return nil }
        return bytes[offset..<offset + size].reversed().reduce(0) { $0 << 8 | Int($1) }
    }

    private func number64(_ offset: Int) -> UInt64? {
        guard offset >= 0, offset <= bytes.count - 8 else { return nil }
        return bytes[offset..<offset + 8].reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }
}
