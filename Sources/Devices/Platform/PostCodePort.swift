// SPDX-License-Identifier: Apache-2.0

/// Port 0x80: firmware writes its progress codes to it, and kernels use a write as a delay of a microsecond. Neither
/// has a reader.
public final class PostCodePort: PortDevice {
    public init() {}

    public func read(_ offset: UInt16, size: Int) -> UInt32 { .max }

    public func write(_ offset: UInt16, size: Int, value: UInt32) {}
}
