// SPDX-License-Identifier: Apache-2.0

/// Ends the machine with a status of the guest's choice, at port 0x501 (docs/platform.md, "Ports").
public final class ExitDevice: PortDevice {
    /// The exit status's upper end; the codes beyond are swkvm's own.
    public static let maximumStatus: UInt8 = 63

    private let request: @Sendable (MachineRequest) -> Void

    /// - Parameter request: called by the vCPU thread that writes.
    public init(request: @escaping @Sendable (MachineRequest) -> Void) { self.request = request }

    public func read(_ offset: UInt16, size: Int) -> UInt32 { .max }

    /// The register is a byte; wider writes carry it in their low byte.
    public func write(_ offset: UInt16, size: Int, value: UInt32) {
        guard offset == 0 else { return }
        request(.exit(status: min(UInt8(truncatingIfNeeded: value), Self.maximumStatus)))
    }
}
