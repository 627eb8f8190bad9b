// SPDX-License-Identifier: Apache-2.0

/// Linux's `boot_params`, the "zero page" (Linux's `Documentation/arch/x86/zero-page.rst`).
struct LinuxBootParameters {
    /// The header of a bzImage; nil for an ELF vmlinux, which has none.
    var setupHeader: [UInt8]?
    /// Address of the NUL-terminated command line.
    var commandLine: UInt64 = 0
    /// Address and size of the initrd, below 4 GiB.
    var initrd: (address: UInt64, size: UInt64)?
    var rsdp: UInt64 = 0
    var memoryMap: [MemoryMapEntry] = []
    /// Address of the first `setup_data`, 0 for none.
    var setupData: UInt64 = 0

    /// The page holds so many ranges.
    static let maximumMapEntries = 128

    func bytes() -> [UInt8] {
        var page = [UInt8](repeating: 0, count: 4096)
        if let setupHeader {
            let start = LinuxImage.headerOffset
            page.replaceSubrange(start..<start + setupHeader.count, with: setupHeader)
        } else {
            page.store(UInt16(0xaa55), at: 0x1fe)
            page.store(UInt32(0x5372_6448), at: 0x202)  // "HdrS"
            page.store(LinuxImage.minimumVersion, at: 0x206)
            page.store(UInt8(1), at: 0x211)  // loaded high
        }
        page.store(rsdp, at: 0x70)
        page.store(UInt16(0xffff), at: 0x1fa)  // the video mode that is set
        page.store(UInt8(0xff), at: 0x210)  // a boot loader without a number
        page.store(UInt32(truncatingIfNeeded: commandLine), at: 0x228)
        page.store(setupData, at: 0x250)
        if let initrd {
            page.store(UInt32(truncatingIfNeeded: initrd.address), at: 0x218)
            page.store(UInt32(truncatingIfNeeded: initrd.size), at: 0x21c)
        }
        let map = memoryMap.prefix(Self.maximumMapEntries)
        page.store(UInt8(map.count), at: 0x1e8)
        for (index, entry) in map.enumerated() {
            let offset = 0x2d0 + 20 * index
            page.store(entry.start, at: offset)
            page.store(entry.size, at: offset + 8)
            page.store(entry.kind.rawValue, at: offset + 16)
        }
        return page
    }

    /// A `setup_data` with a seed for the kernel's random numbers (`SETUP_RNG_SEED`).
    static func randomSeed(_ seed: [UInt8]) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.append(littleEndian: UInt64(0))  // no further one
        bytes.append(littleEndian: UInt32(9))
        bytes.append(littleEndian: UInt32(seed.count))
        return bytes + seed
    }
}
