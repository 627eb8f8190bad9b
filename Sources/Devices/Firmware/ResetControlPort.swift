// SPDX-License-Identifier: Apache-2.0

/// The reset control register of PC chipsets at port 0xcf9, which firmware resets the machine by: setting bit 2 does it
/// (Intel ICH9 data sheet, §13.7.5).
public final class ResetControlPort: PortDevice {
    private static let resetCPU: UInt32 = 1 << 2

    private let request: @Sendable (MachineRequest) -> Void

    /// - Parameter request: called by the vCPU thread that writes.
    public init(request: @escaping @Sendable (MachineRequest) -> Void) { self.request = request }

    public func read(_ offset: UInt16, size: Int) -> UInt32 { size == 1 ? 0 : .max }

    public func write(_ offset: UInt16, size: Int, value: UInt32) {
        if offset == 0, size == 1, value & Self.resetCPU != 0 { request(.reset) }
    }
}
