// SPDX-License-Identifier: Apache-2.0

internal import Platform

/// `hvm_start_info` version 1 with its module list and memory map (Xen's public `arch-x86/hvm/start_info.h`).
struct PVHStartInfo {
    var commandLine: UInt64 = 0
    /// Address and size of the initrd.
    var initrd: (address: UInt64, size: UInt64)?
    var rsdp: UInt64 = 0
    var memoryMap: [MemoryMapEntry] = []

    /// "xEn3" with the highest bit of the E set.
    static let magic: UInt32 = 0x336e_c578

    /// The structure, then at fixed distances from it the module list and the memory map: what goes to
    /// ``PhysicalLayout/startInfo``.
    func bytes() -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.append(littleEndian: Self.magic)
        bytes.append(littleEndian: UInt32(1))  // version
        bytes.append(littleEndian: UInt32(0))  // flags
        bytes.append(littleEndian: UInt32(initrd == nil ? 0 : 1))
        bytes.append(littleEndian: initrd == nil ? 0 : PhysicalLayout.modules)
        bytes.append(littleEndian: commandLine)
        bytes.append(littleEndian: rsdp)
        bytes.append(littleEndian: PhysicalLayout.memoryMap)
        bytes.append(littleEndian: UInt32(memoryMap.count))
        bytes.append(littleEndian: UInt32(0))

        pad(&bytes, to: PhysicalLayout.modules)
        if let initrd {
            bytes.append(littleEndian: initrd.address)
            bytes.append(littleEndian: initrd.size)
            bytes.append(littleEndian: UInt64(0))  // its own command line
            bytes.append(littleEndian: UInt64(0))
        }

        pad(&bytes, to: PhysicalLayout.memoryMap)
        for entry in memoryMap {
            bytes.append(littleEndian: entry.start)
            bytes.append(littleEndian: entry.size)
            bytes.append(littleEndian: entry.kind.rawValue)
            bytes.append(littleEndian: UInt32(0))
        }
        return bytes
    }

    private func pad(_ bytes: inout [UInt8], to address: UInt64) {
        let length = Int(address - PhysicalLayout.startInfo)
        bytes.append(contentsOf: repeatElement(0, count: length - bytes.count))
    }
}
