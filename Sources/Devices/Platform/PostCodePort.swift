// SPDX-License-Identifier: Apache-2.0

internal import Synchronization

/// Port 0x80: firmware writes its progress codes to it, and kernels use a write as a delay of a microsecond.
public final class PostCodePort: PortDevice {
    private let code = Atomic<UInt8>(0)

    /// The last value written, for the report on a crashed machine.
    public var lastCode: UInt8 { code.load(ordering: .relaxed) }

    public init() {}

    public func read(_ offset: UInt16, size: Int) -> UInt32 { .max }

    public func write(_ offset: UInt16, size: Int, value: UInt32) {
        code.store(UInt8(truncatingIfNeeded: value), ordering: .relaxed)
    }
}
