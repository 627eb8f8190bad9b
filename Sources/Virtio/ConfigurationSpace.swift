// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The device-specific configuration space (virtio 1.2 §2.5): its bytes, and the generation that changes with them.
///
/// The driver reads it on vCPU threads while the device may change it on its own.
public final class ConfigurationSpace: Sendable {
    private struct Contents {
        var bytes: [UInt8]
        var generation: UInt32 = 0
    }
    private let contents: Guarded<Contents>

    /// - Parameter bytes: the fields as the device's section of the specification lays them out, little-endian.
    public init(_ bytes: [UInt8]) { contents = Guarded(Contents(bytes: bytes)) }

    /// Changes fields as one: a driver that reads the generation before and after sees old or new ones, no mixture.
    ///
    /// The caller then notifies the driver (``ConfigurationInterrupt/signal()``) when the device is active.
    public func update(_ change: (inout [UInt8]) -> Void) {
        contents.withLock {
            let before = $0.bytes
            change(&$0.bytes)
            if $0.bytes != before { $0.generation &+= 1 }
        }
    }

    /// Bytes.
    public var count: Int { contents.withLock { $0.bytes.count } }

    /// ConfigGeneration.
    public var generation: UInt32 { contents.withLock { $0.generation } }

    /// Reads 1, 2, 4 or 8 bytes; all ones when not all of them exist.
    public func read(at offset: Int, size: Int) -> UInt64 {
        contents.withLock { contents in
            guard offset >= 0, size > 0, size <= 8, offset <= contents.bytes.count - size else {
                return allOnes(size: size)
            }
            return (0..<size).reversed().reduce(0) { $0 << 8 | UInt64(contents.bytes[offset + $1]) }
        }
    }
}

/// What a read of nothing gives: every bit of the access set.
func allOnes(size: Int) -> UInt64 {
    size >= 8 ? .max : (1 << UInt64(8 &* max(0, size))) &- 1
}
