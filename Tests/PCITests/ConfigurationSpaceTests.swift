// SPDX-License-Identifier: Apache-2.0

import PCI
import TestSupport
import Testing

extension PCIConfigurationSpace {
    static var example: PCIConfigurationSpace {
        PCIConfigurationSpace(
            Identity(
                vendor: 0x1234, device: 0x5678, revision: 9, classCode: 0xab_cdef, subsystemVendor: 0x1111,
                subsystem: 0x2222))
    }
}

@Suite(.timed) struct ConfigurationSpaceTests {
    @Test func identity() {
        var space = PCIConfigurationSpace.example
        for offset in stride(from: 0, to: 0x40, by: 4) where offset != 4 && offset != 0x0c && offset != 0x3c {
            let before = space.read(at: offset, size: 4)
            space.write(~before, at: offset, size: 4)
            #expect(space.read(at: offset, size: 4) == before, "\(offset)")
        }
        #expect(space.read(at: 0, size: 4) == 0x5678_1234 && space.read(at: 8, size: 4) == 0xabcd_ef09)
        #expect(space.read(at: 0x2c, size: 4) == 0x2222_1111)
        #expect(space.read(at: 0x0b, size: 1) == 0xab && space.read(at: 0x0a, size: 2) == 0xabcd)
    }

    @Test func commandBits() {
        var space = PCIConfigurationSpace.example
        space.write(.max, at: 4, size: 4)
        #expect(space.read(at: 4, size: 4) == 0x0546)
        #expect(space.command.contains([.memory, .busMaster, .interruptDisable]))
        space.write(0, at: 4, size: 1)
        #expect(space.read(at: 4, size: 2) == 0x0500)
        space.write(0x5a, at: 0x3c, size: 1)
        #expect(space.read(at: 0x3c, size: 1) == 0x5a)
    }

    @Test func accessesThatAreNone() {
        var space = PCIConfigurationSpace.example
        for (offset, size) in [
            (1, 2), (2, 4), (3, 2), (0, 3), (0, 8), (0, 0), (-4, 4), (4096, 1), (4096, 4), (Int.max, 1), (Int.min, 4),
        ] {
            #expect(space.read(at: offset, size: size) == (size >= 4 ? .max : UInt32(1 << (8 * size)) - 1))
            space.write(0, at: offset, size: size)
        }
        #expect(space.read(at: 0, size: 4) == 0x5678_1234)
        // No extended capabilities.
        space.write(.max, at: 0x100, size: 4)
        for offset in [0x100, 0xffc] { #expect(space.read(at: offset, size: 4) == 0) }
    }

    @Test func sizesOfBARs() {
        var space = PCIConfigurationSpace.example
        space.addBAR(0, size: 16, is64Bit: false)
        space.addBAR(1, size: 1 << 31, is64Bit: false)
        space.addBAR(2, size: 0x8000, is64Bit: true, address: 0x12_3456_8000)
        space.addBAR(4, size: 1 << 34, is64Bit: true)
        let before = (0x10..<0x28).filter { $0 % 4 == 0 }.map { space.read(at: $0, size: 4) }
        #expect(before == [0, 0, 0x3456_8004, 0x12, 4, 0])
        for offset in stride(from: 0x10, to: 0x28, by: 4) { space.write(.max, at: offset, size: 4) }
        let sizes = (0x10..<0x28).filter { $0 % 4 == 0 }.map { space.read(at: $0, size: 4) }
        #expect(sizes == [0xffff_fff0, 0x8000_0000, 0xffff_8004, 0xffff_ffff, 4, 0xffff_fffc])
        // By bytes, too.
        space.write(0, at: 0x10, size: 4)
        space.write(0xff, at: 0x12, size: 1)
        #expect(space.read(at: 0x10, size: 4) == 0x00ff_0000)
    }

    @Test func placementsNeedTheCommandBit() {
        var space = PCIConfigurationSpace.example
        space.addBAR(0, size: 0x1000, is64Bit: false, address: 0xc000_0000)
        space.addBAR(2, size: 0x8000, is64Bit: true, address: 0x10_0000_0000)
        #expect(space.placements.isEmpty)
        space.write(2, at: 4, size: 2)
        #expect(space.placements.map(\.bar) == [0, 2])
        #expect(space.placements.map(\.range) == [0xc000_0000..<0xc000_1000, 0x10_0000_0000..<0x10_0000_8000])
        // While it is sized with its decoder on, it is at an end of the address space, and nowhere where that
        // overflows.
        space.write(.max, at: 0x18, size: 4)
        space.write(.max, at: 0x1c, size: 4)
        #expect(space.placements.map(\.bar) == [0])
    }

    @Test func capabilities() {
        var space = PCIConfigurationSpace.example
        let first = space.addCapability(0x09, [3, 0xaa, 0xbb], writable: [0, 0x0f])
        let second = space.addCapability(0x11, [1, 2, 3, 4])
        #expect(space.read(at: 6, size: 2) & 0x10 != 0)
        #expect(space.read(at: 0x34, size: 1) == UInt32(first) && first % 4 == 0 && second % 4 == 0)
        #expect(space.read(at: first, size: 2) == UInt32(second) << 8 | 0x09)
        #expect(space.read(at: second, size: 4) == 0x0201_0011)
        space.write(.max, at: first, size: 4)
        #expect(space.read(at: first, size: 4) == 0xaf03_0009 | UInt32(second) << 8)
    }
}
