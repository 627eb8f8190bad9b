// SPDX-License-Identifier: Apache-2.0

internal import Devices
internal import KVM

/// Which device answers at which ports. Complete before the first vCPU runs, and unchanged from then on.
final class PortBus: Sendable {
    struct Entry: Sendable {
        let first: UInt16
        let count: UInt16
        let device: any PortDevice

        init(_ ports: ClosedRange<UInt16>, _ device: any PortDevice) {
            first = ports.lowerBound
            count = UInt16(ports.count)
            self.device = device
        }
    }

    private let entries: [Entry]

    /// - Parameter entries: the busiest first; where two have a port, the earlier one answers.
    init(_ entries: [Entry]) { self.entries = entries }

    /// What answers at a port, by its type's name, for tables; nil where nothing does.
    func name(at port: UInt16) -> String? {
        entries.first { port &- $0.first < $0.count }.map { String(describing: type(of: $0.device)) }
    }

    /// Answers one port instruction. Where no device is, reads are all ones and writes are ignored.
    func handle(_ access: PortAccess) {
        for entry in entries where access.port &- entry.first < entry.count {
            let offset = access.port &- entry.first
            if !access.isWrite {
                for item in 0..<access.count { access[item] = entry.device.read(offset, size: access.size) }
            } else if access.count == 1 {
                entry.device.write(offset, size: access.size, value: access[0])
            } else {
                access.withBytes { entry.device.write(offset, size: access.size, string: $0) }
            }
            return
        }
        if !access.isWrite {
            for item in 0..<access.count { access[item] = .max }
        }
    }
}
