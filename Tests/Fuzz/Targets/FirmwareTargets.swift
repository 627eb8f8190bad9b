// SPDX-License-Identifier: Apache-2.0

import Devices
import GuestMemory

extension FuzzTarget {
    /// Any sequence of accesses to the ports of the firmware's configuration device.
    ///
    /// An operation has 8 bytes: what it is, a size, a port or an address in RAM (2, little-endian), and a value (4),
    /// which is written to RAM as it is.
    static let firmwareConfiguration = FuzzTarget(
        name: "firmware-configuration", seeds: [transfer(control: 0x20 << 16 | 8 | 2), selectThenRead()]
    ) { bytes in
        guard let memory = try? GuestMemory(size: 1 << 20) else { fatalError("no memory for a guest") }
        var contents = FirmwareConfiguration()
        contents.add(UInt16(2), as: FirmwareConfiguration.Item.cpus)
        contents.add(file: "etc/first", [1, 2, 3, 4, 5])
        contents.add(file: "etc/second", [])
        let ports = FirmwareConfigurationPorts(contents, memory.ram)
        var high: UInt32 = 0
        var hasRead = false
        for start in stride(from: 0, to: min(bytes.count, 1024) - 7, by: 8) {
            let place = UInt16(bytes[start + 2]) | UInt16(bytes[start + 3]) << 8
            let value = bytes[start + 4..<start + 8].reversed().reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
            let size = [4, 1, 2, 4][Int(bytes[start + 1] & 3)]
            // The bus passes on accesses to the device's own ports.
            let port = place % 12
            switch bytes[start] & 3 {
            case 0:
                let address = GuestAddress(UInt64(high) << 32 | UInt64(value.byteSwapped))
                let command = port == 8 && size == 4 ? memory.ram.slice(at: address, count: 16) : nil
                let control = command?.load32(0).byteSwapped ?? 0
                ports.write(port, size: size, value: value)
                if port == 4, size == 4 { high = value.byteSwapped }
                if port == 8, size == 4 { high = 0 }
                guard let command else { continue }
                let result = command.load32(0).byteSwapped
                precondition(result <= 1, "a transfer did not end with success or an error")
                if control & 2 != 0, result == 0 { hasRead = true }
            case 1: _ = ports.read(port, size: size)
            default: try? memory.ram.write(value, at: GuestAddress(UInt64(place)))
            }
        }
        return hasRead
    }

    private static func operation(_ kind: UInt8, _ place: UInt16, size: UInt8 = 0, _ bytes: [UInt8]) -> [UInt8] {
        [kind, size, UInt8(truncatingIfNeeded: place), UInt8(place >> 8)] + bytes
    }

    /// Writes a command to 0x1000, and its address to the device.
    private static func transfer(control: UInt32, length: UInt32 = 5, to address: UInt32 = 0x2000) -> [UInt8] {
        var bytes: [UInt8] = []
        for (index, number) in [control, length, 0, address].enumerated() {
            var field = [UInt8](repeating: 0, count: 4)
            put(&field, 0, UInt64(number), 4, isBig: true)
            bytes += operation(2, 0x1000 + 4 * UInt16(index), field)
        }
        return bytes + operation(0, 4, [0, 0, 0, 0]) + operation(0, 8, [0, 0, 0x10, 0])
    }

    /// Selects the directory, and reads it by its port; then skips some of a file, and reads the rest and zeros.
    private static func selectThenRead() -> [UInt8] {
        operation(0, 0, size: 2, [0x19, 0, 0, 0]) + operation(1, 1, size: 1, [0, 0, 0, 0])
            + transfer(control: 0x20 << 16 | 8 | 4, length: 2) + transfer(control: 2, length: 64, to: 0x3000)
    }
}
