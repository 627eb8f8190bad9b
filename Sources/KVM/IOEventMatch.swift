// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Linux

/// Which writes of a guest signal an ioeventfd (``VirtualMachine/assignIOEventFD(_:for:)``).
public struct IOEventMatch: Sendable, Equatable, CustomStringConvertible {
    /// Guest-physical, outside RAM.
    public let address: UInt64
    /// Width of the write in bytes, or 0 for any.
    public let length: UInt32
    /// The value that is written; nil for any, as it must be with a `length` of 0.
    public let value: UInt64?

    public init(address: UInt64, length: UInt32, value: UInt64? = nil) {
        self.address = address
        self.length = length
        self.value = value
    }

    public var description: String { "address 0x\(String(address, radix: 16))" }

    /// The argument of `KVM_IOEVENTFD` that assigns `event`.
    func kernelValue(_ event: borrowing EventFD) -> kvm_ioeventfd {
        var request = kvm_ioeventfd()
        request.addr = address
        request.len = length
        request.fd = event.rawValue
        if let value {
            request.datamatch = value
            request.flags |= 1 << UInt32(kvm_ioeventfd_flag_nr_datamatch)
        }
        return request
    }
}
