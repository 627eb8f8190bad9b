// SPDX-License-Identifier: Apache-2.0

// Each structure field by field, in the order of DSP0134 §7. What a virtual machine does not have is "unknown" or
// "none" there.
extension SMBIOSDescription {
    private static let vendor = "swkvm"
    private static let product = "swkvm virtual machine"
    /// The version of docs/platform.md's contract. Guests may take a change of it for other hardware.
    private static let platformVersion = "1"

    /// All structures; a structure's handle is its number in the list.
    var structures: [SMBIOSStructure] {
        let fixed = [firmware, system, enclosure] + sockets.enumerated().map { socket($0.offset, cores: $0.element) }
        let array = UInt16(fixed.count)
        return fixed + [memoryArray, memoryDevice(of: array)] + memory.map { Self.mappedAddress($0, of: array) } + [
            bootInformation, end,
        ]
    }

    private static let none16: UInt16 = 0xffff
    private static let notProvided: UInt16 = 0xfffe
    private static let unknown: UInt8 = 2

    /// BIOS Information (type 0, §7.1).
    private var firmware: SMBIOSStructure {
        var structure = SMBIOSStructure(type: 0)
        structure.add(Self.vendor)
        structure.add(Self.platformVersion)
        structure.add(UInt16(0xf000))  // segment of its code
        structure.add("01/01/2026")
        structure.add(UInt8(0))  // 64 KiB of ROM
        structure.add(UInt64(1 << 3))  // characteristics are not supported
        structure.add(UInt8(1 << 0))  // ACPI
        structure.add(UInt8(1 << 4))  // the table describes a virtual machine
        structure.add(bytes: [1, 0])  // release 1.0
        structure.add(bytes: [0xff, 0xff])  // no embedded controller
        structure.add(UInt16(0))  // extended ROM size
        return structure
    }

    /// System Information (type 1, §7.2).
    private var system: SMBIOSStructure {
        var structure = SMBIOSStructure(type: 1)
        structure.add(Self.vendor)
        structure.add(Self.product)
        structure.add(Self.platformVersion)
        structure.add(name)
        // §7.2.1: the first three fields of a UUID are little-endian here.
        let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15]
        structure.add(bytes: order.map { uuid.indices.contains($0) ? uuid[$0] : 0 })
        structure.add(UInt8(6))  // woken by its power switch
        structure.add("")
        structure.add("")
        return structure
    }

    /// System Enclosure (type 3, §7.4).
    private var enclosure: SMBIOSStructure {
        var structure = SMBIOSStructure(type: 3)
        structure.add(Self.vendor)
        structure.add(UInt8(1))  // of another kind
        structure.add(Self.platformVersion)
        structure.add("")
        structure.add(name)
        structure.add(bytes: [3, 3, 3, Self.unknown])  // boot state, power and temperature are safe
        structure.add(UInt32(0))
        structure.add(bytes: [0, 0])  // height, power cords
        structure.add(bytes: [0, 0])  // nothing contained
        structure.add("")
        return structure
    }

    /// Processor Information (type 4, §7.5): a socket, each core with one thread.
    private func socket(_ number: Int, cores cpus: Int) -> SMBIOSStructure {
        var structure = SMBIOSStructure(type: 4)
        structure.add("CPU \(number)")
        structure.add(UInt8(3))  // a central processor
        structure.add(Self.unknown)  // family
        structure.add(processor.manufacturer)
        structure.add(processor.id)
        structure.add(processor.version)
        structure.add(UInt8(0))  // voltage
        for _ in 0..<3 { structure.add(UInt16(0)) }  // frequencies
        structure.add(UInt8(0x41))  // populated, enabled
        structure.add(Self.unknown)  // kind of socket
        for _ in 0..<3 { structure.add(Self.none16) }  // caches: CPUID tells
        for _ in 0..<3 { structure.add("") }
        let count = UInt8(clamping: cpus)
        structure.add(bytes: [count, count, count])
        let characteristics: UInt16 = 1 << 2 | (cpus > 1 ? 1 << 3 : 0)  // 64-bit, multi-core
        structure.add(characteristics)
        structure.add(UInt16(Self.unknown))
        for _ in 0..<3 { structure.add(UInt16(clamping: cpus)) }
        return structure
    }

    private var memorySize: UInt64 { memory.reduce(0) { $0 &+ UInt64($1.count) } }

    /// Physical Memory Array (type 16, §7.17).
    private var memoryArray: SMBIOSStructure {
        var structure = SMBIOSStructure(type: 16)
        structure.add(bytes: [1, 3, 3])  // elsewhere than on a board; system memory; no error correction
        structure.add(UInt32(0x8000_0000))  // the capacity is in the last field
        structure.add(Self.notProvided)
        structure.add(UInt16(1))
        structure.add(memorySize)
        return structure
    }

    /// Memory Device (type 17, §7.18).
    private func memoryDevice(of array: UInt16) -> SMBIOSStructure {
        let mebibytes = memorySize >> 20
        // The size has 15 bits, of MiB or of KiB; what does not fit there has a field of its own.
        let isExtended = mebibytes >= 0x7fff
        let inKibibytes = memorySize % (1 << 20) != 0 && memorySize >> 10 < 0x7fff
        var structure = SMBIOSStructure(type: 17)
        structure.add(array)
        structure.add(Self.notProvided)
        structure.add(Self.none16)  // widths
        structure.add(Self.none16)
        structure.add(isExtended ? 0x7fff : inKibibytes ? 0x8000 | UInt16(memorySize >> 10) : UInt16(mebibytes))
        structure.add(bytes: [1, 0])  // form factor, set
        structure.add("RAM 0")
        structure.add("")
        structure.add(UInt8(7))  // RAM
        structure.add(UInt16(1 << 1))  // of another kind
        structure.add(UInt16(0))  // speed
        structure.add(Self.vendor)
        for _ in 0..<3 { structure.add("") }
        structure.add(UInt8(0))
        structure.add(isExtended ? UInt32(clamping: mebibytes) : 0)
        for _ in 0..<4 { structure.add(UInt16(0)) }  // configured speed, voltages
        return structure
    }

    /// Memory Array Mapped Address (type 19, §7.20).
    private static func mappedAddress(_ range: Range<UInt64>, of array: UInt16) -> SMBIOSStructure {
        var structure = SMBIOSStructure(type: 19)
        let last = range.upperBound &- 1
        // Addresses in KiB have 32 bits; beyond, both are all ones.
        let isExtended = last >> 10 >= 0xffff_ffff
        structure.add(isExtended ? .max : UInt32(range.lowerBound >> 10))
        structure.add(isExtended ? .max : UInt32(last >> 10))
        structure.add(array)
        structure.add(UInt8(1))
        structure.add(isExtended ? range.lowerBound : 0)
        structure.add(isExtended ? last : 0)
        return structure
    }

    /// System Boot Information (type 32, §7.33): no errors.
    private var bootInformation: SMBIOSStructure {
        var structure = SMBIOSStructure(type: 32)
        structure.add(bytes: [UInt8](repeating: 0, count: 7))
        return structure
    }

    /// End-of-Table (type 127, §7.45).
    private var end: SMBIOSStructure { SMBIOSStructure(type: 127) }
}
