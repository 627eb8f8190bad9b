// SPDX-License-Identifier: Apache-2.0

import Linux
import PCI
import TestSupport
import Testing

/// A function with two BARs that notes what reaches it.
private final class NotingFunction: PCIFunction {
    let name: String
    private let space: Guarded<PCIConfigurationSpace>
    private let notes = Guarded<[String]>([])
    private let places = Guarded<[PCIConfigurationSpace.Placement]>([])

    init(_ name: String, address: UInt64 = 0) {
        self.name = name
        var space = PCIConfigurationSpace.example
        space.addBAR(0, size: 0x1000, is64Bit: false, address: address)
        space.addBAR(2, size: 0x8000, is64Bit: true)
        self.space = Guarded(space)
    }

    var placed: [Range<UInt64>] { places.withLock { $0.map(\.range) } }
    func takeNotes() -> [String] {
        notes.withLock { notes in
            defer { notes = [] }
            return notes
        }
    }

    func readConfiguration(at offset: Int, size: Int) -> UInt32 { space.withLock { $0.read(at: offset, size: size) } }
    func writeConfiguration(_ value: UInt32, at offset: Int, size: Int) {
        space.withLock { $0.write(value, at: offset, size: size) }
    }
    var placements: [PCIConfigurationSpace.Placement] { space.withLock { $0.placements } }
    func place(_ placements: [PCIConfigurationSpace.Placement]) { places.withLock { $0 = placements } }
    func readBAR(_ bar: Int, at offset: UInt64, size: Int) -> UInt64 {
        notes.withLock { $0.append("read \(bar) \(offset) \(size)") }
        return 0x5a
    }
    func writeBAR(_ bar: Int, _ value: UInt64, at offset: UInt64, size: Int) {
        notes.withLock { $0.append("write \(bar) \(offset) \(size) \(value)") }
    }
}

@Suite(.timed) struct HostBridgeTests {
    private let bridge = PCIHostBridge(windows: [0xc000_0000..<0xd000_0000, 0x10_0000_0000..<0x20_0000_0000])
    private let first = NotingFunction("first"), second = NotingFunction("second")

    init() {
        bridge.insert(first, at: PCIAddress(device: 1))
        bridge.insert(second, at: PCIAddress(device: 2))
    }

    private func set(_ device: UInt8, _ offset: Int, _ value: UInt32, size: Int = 4) {
        bridge.writeConfiguration(value, of: PCIAddress(device: device), at: offset, size: size)
    }

    // MARK: Configuration accesses

    @Test func addresses() {
        #expect(PCIAddress(bus: 1, device: 31, function: 7).description == "01:1f.7")
        #expect(PCIAddress(device: 33, function: 9) == PCIAddress(device: 1, function: 1))
        #expect(
            PCIAddress(device: 1) < PCIAddress(device: 1, function: 1)
                && PCIAddress(device: 31) < PCIAddress(bus: 1, device: 0))
    }

    @Test func enhancedConfigurationAccess() {
        #expect(bridge.readECAM(at: 0, size: 4) == 0x0008_1b36)
        #expect(bridge.readECAM(at: 0x8, size: 4) == 0x0600_0000)
        #expect(bridge.readECAM(at: 0x8000, size: 4) == 0x5678_1234)
        #expect(bridge.readECAM(at: 0x8002, size: 2) == 0x5678 && bridge.readECAM(at: 0x8001, size: 1) == 0x12)
        bridge.writeECAM(0xffff_ff77, at: 0x803c, size: 1)
        #expect(bridge.readECAM(at: 0x803c, size: 4) == 0x77)
        // No function, no bus, no such access.
        for (offset, size, ones) in [
            (0x1_8000, 4, 0xffff_ffff), (0x9000, 2, 0xffff), (0x10_0000, 4, 0xffff_ffff), (0x1000_0000, 4, 0xffff_ffff),
            (.max, 1, 0xff), (0x8001, 2, 0xffff), (0x8002, 4, 0xffff_ffff), (0x8000, 8, .max), (0x8ffe, 4, 0xffff_ffff),
            (0x8000, 3, 0xff_ffff),
        ] as [(UInt64, Int, UInt64)] {
            #expect(bridge.readECAM(at: offset, size: size) == ones, "\(offset)")
            bridge.writeECAM(0, at: offset, size: size)
        }
    }

    @Test func configurationMechanismOne() {
        #expect(bridge.readPort(0, size: 4) == 0 && bridge.readPort(4, size: 4) == .max, "not enabled")
        bridge.writePort(.max, 0, size: 4)
        #expect(bridge.readPort(0, size: 4) == 0x80ff_fffc)
        #expect(bridge.readPort(4, size: 4) == .max)
        bridge.writePort(0x8000_0800, 0, size: 4)
        #expect(bridge.readPort(4, size: 4) == 0x5678_1234)
        #expect(bridge.readPort(6, size: 2) == 0x5678 && bridge.readPort(5, size: 1) == 0x12)
        for (offset, size, ones) in [
            (5, 2, 0xffff), (6, 4, .max), (7, 2, 0xffff), (0, 1, 0xff), (1, 1, 0xff), (2, 2, 0xffff), (8, 4, .max),
        ]
            as [(UInt16, Int, UInt32)]
        {
            #expect(bridge.readPort(offset, size: size) == ones)
            bridge.writePort(0, offset, size: size)
        }
        #expect(bridge.readPort(0, size: 4) == 0x8000_0800)
        bridge.writePort(0x8000_083c, 0, size: 4)
        bridge.writePort(0x66, 4, size: 1)
        #expect(bridge.readPort(4, size: 4) == 0x66 && bridge.readECAM(at: 0x803c, size: 1) == 0x66)
    }

    @Test func severalFunctionsOfADevice() {
        #expect(bridge.readConfiguration(of: PCIAddress(device: 1), at: 0x0e, size: 1) == 0)
        bridge.insert(NotingFunction("third"), at: PCIAddress(device: 1, function: 3))
        for (offset, size, value) in [
            (0x0e, 1, 0x80), (0x0c, 4, 0x80_0000), (0x0e, 2, 0x80), (0x0f, 1, 0), (0x0c, 2, 0),
        ] as [(Int, Int, UInt32)] {
            #expect(bridge.readConfiguration(of: PCIAddress(device: 1), at: offset, size: size) == value)
        }
        #expect(bridge.readConfiguration(of: PCIAddress(device: 1, function: 3), at: 0, size: 4) == 0x5678_1234)
        #expect(bridge.readConfiguration(of: PCIAddress(device: 1, function: 2), at: 0, size: 4) == .max)
        bridge.remove(at: PCIAddress(device: 1, function: 3))
        #expect(bridge.readConfiguration(of: PCIAddress(device: 1), at: 0x0e, size: 1) == 0)
    }

    // MARK: BARs

    @Test func aBARMovesAndIsDisabled() {
        set(1, 0x10, 0xc123_4000)
        #expect(bridge.read(at: 0xc123_4000, size: 4) == 0xffff_ffff && first.placed.isEmpty)
        set(1, 4, 2)
        // The other BAR is at 0, which is in no window.
        #expect(first.placed == [0xc123_4000..<0xc123_5000])
        #expect(bridge.read(at: 0xc123_4010, size: 4) == 0x5a)
        bridge.write(0xffff_1234, at: 0xc123_4ffe, size: 2)
        #expect(first.takeNotes() == ["read 0 16 4", "write 0 4094 2 4660"])
        #expect(bridge.name(at: 0xc123_4010) == "first+0x10" && bridge.name(at: 0xc123_5000) == nil)
        #expect(bridge.name(at: 0x8004, isConfiguration: true) == "first configuration+0x4")
        set(1, 0x10, 0xcfff_f000)
        #expect(first.placed == [0xcfff_f000..<0xd000_0000])
        #expect(bridge.read(at: 0xc123_4010, size: 4) == 0xffff_ffff)
        set(1, 0x18, 0x0000_8000)
        set(1, 0x1c, 0x1f)
        #expect(first.placed == [0xcfff_f000..<0xd000_0000, 0x1f_0000_8000..<0x1f_0001_0000])
        #expect(bridge.read(at: 0x1f_0000_8001, size: 1) == 0x5a)
        #expect(first.takeNotes() == ["read 2 1 1"])
        set(1, 4, 0)
        #expect(first.placed.isEmpty && bridge.read(at: 0xcfff_f000, size: 1) == 0xff)
    }

    /// RAM, interrupt controllers and ECAM are not in the windows, so no BAR is over them.
    @Test(arguments: [0, 0x10_0000, 0xbfff_f000, 0xd000_0000, 0xfec0_0000, 0xfee0_0000, 0xffff_f000] as [UInt32])
    func aBAROutsideOfTheWindowsIsNotDecoded(address: UInt32) {
        set(1, 4, 2)
        set(1, 0x10, address)
        #expect(first.placed.isEmpty && bridge.read(at: UInt64(address), size: 4) == 0xffff_ffff)
    }

    @Test func sizingWithTheDecoderOn() {
        set(1, 0x10, 0xc000_0000)
        set(1, 4, 2)
        set(1, 0x10, .max)
        #expect(first.placed.isEmpty)
        #expect(bridge.readConfiguration(of: PCIAddress(device: 1), at: 0x10, size: 4) == 0xffff_f000)
        set(1, 0x10, 0xc000_0000)
        #expect(first.placed == [0xc000_0000..<0xc000_1000])
    }

    @Test func theFirstOfOverlappingBARsAnswers() {
        for device in [2, 1] as [UInt8] {
            set(device, 0x10, 0xc000_0000)
            set(device, 4, 2)
        }
        _ = bridge.read(at: 0xc000_0000, size: 4)
        #expect(first.takeNotes() == ["read 0 0 4"] && second.takeNotes() == [])
        set(1, 4, 0)
        _ = bridge.read(at: 0xc000_0000, size: 4)
        #expect(first.takeNotes() == [] && second.takeNotes() == ["read 0 0 4"])
    }

    @Test func accessesAcrossTheEndOfABAR() {
        set(1, 0x10, 0xc000_0000)
        set(1, 4, 2)
        for (offset, size) in [(0xffe, 4), (0xfff, 2), (0xff9, 8)] as [(UInt64, Int)] {
            #expect(bridge.read(at: 0xc000_0000 + offset, size: size) == UInt64.max >> UInt64(64 - 8 * size))
            bridge.write(0, at: 0xc000_0000 + offset, size: size)
        }
        #expect(bridge.read(at: 0xc000_0000, size: 0) == 0 && bridge.read(at: .max, size: 1) == 0xff)
        #expect(first.takeNotes() == [])
    }

    @Test func aFunctionThatIsRemoved() {
        set(1, 0x10, 0xc000_0000)
        set(1, 4, 2)
        bridge.remove(at: PCIAddress(device: 1))
        #expect(first.placed.isEmpty && bridge.read(at: 0xc000_0000, size: 4) == 0xffff_ffff)
        #expect(bridge.readConfiguration(of: PCIAddress(device: 1), at: 0, size: 4) == .max)
        bridge.remove(at: PCIAddress(device: 1))
        // One that comes with its decoder on is decoded.
        bridge.insert(first, at: PCIAddress(device: 3))
        #expect(first.placed == [0xc000_0000..<0xc000_1000])
    }

    /// Whatever two CPUs do at once, the function ends up where its registers say.
    @Test func twoCPUsMoveABAR() throws {
        let move: @Sendable (UInt32) -> Void = { [bridge] number in
            for round in 0..<2000 as Range<UInt32> {
                bridge.writeConfiguration(
                    0xc000_0000 + (round % 7 + number) << 12, of: PCIAddress(device: 1), at: 0x10, size: 4)
                bridge.writeConfiguration(round % 3 == 0 ? 0 : 2, of: PCIAddress(device: 1), at: 4, size: 2)
                _ = bridge.read(at: 0xc000_1000, size: 4)
            }
        }
        let other = try Thread.start(name: "cpu1") { move(1) }
        move(0)
        other.join()
        #expect(first.placed == first.placements.filter { $0.bar == 0 }.map(\.range))
    }
}
