// SPDX-License-Identifier: Apache-2.0

/// A function as its bridge sees it. All but ``name`` is called on vCPU threads, several at a time, without the
/// bridge's lock but for ``place(_:)`` and ``placements``.
public protocol PCIFunction: AnyObject, Sendable {
    /// For tables: `blk0`.
    var name: String { get }

    /// Reads 1, 2 or 4 bytes of configuration space, at a multiple of their number below 4096.
    func readConfiguration(at offset: Int, size: Int) -> UInt32
    /// Writes as many.
    func writeConfiguration(_ value: UInt32, at offset: Int, size: Int)

    /// The BARs that the function decodes, as its registers say.
    var placements: [PCIConfigurationSpace.Placement] { get }
    /// Sets the placements at which the function is accessible from now on.
    func place(_ placements: [PCIConfigurationSpace.Placement])

    /// Reads 1 to 8 bytes that are in a BAR. Bits above `size` bytes are zero.
    func readBAR(_ bar: Int, at offset: UInt64, size: Int) -> UInt64
    /// Writes as many.
    func writeBAR(_ bar: Int, _ value: UInt64, at offset: UInt64, size: Int)
}

/// The host bridge's own function, 00:00.0, for guests that look for one.
final class HostBridgeFunction: PCIFunction {
    let name = "host bridge"
    private let identity: PCIConfigurationSpace

    /// - Parameter isForFirmware: firmware for virtual machines knows by the bridge where BARs may be. It is then that
    ///   of an Intel 440FX, as in QEMU's machine `pc`; nothing else of this chipset is there. Otherwise it is the
    ///   generic one that QEMU has an identifier for: no operating system has a driver, or a quirk.
    init(isForFirmware: Bool) {
        identity = PCIConfigurationSpace(
            PCIConfigurationSpace.Identity(
                vendor: isForFirmware ? 0x8086 : 0x1b36, device: isForFirmware ? 0x1237 : 0x0008,
                revision: isForFirmware ? 2 : 0, classCode: 0x06_0000, subsystemVendor: 0x1af4, subsystem: 0x1100))
    }

    func readConfiguration(at offset: Int, size: Int) -> UInt32 { identity.read(at: offset, size: size) }
    func writeConfiguration(_ value: UInt32, at offset: Int, size: Int) {}
    var placements: [PCIConfigurationSpace.Placement] { [] }
    func place(_ placements: [PCIConfigurationSpace.Placement]) {}
    func readBAR(_ bar: Int, at offset: UInt64, size: Int) -> UInt64 { allOnes(size: size) }
    func writeBAR(_ bar: Int, _ value: UInt64, at offset: UInt64, size: Int) {}
}
