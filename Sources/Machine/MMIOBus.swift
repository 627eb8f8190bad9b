// SPDX-License-Identifier: Apache-2.0

internal import KVM
internal import Platform
internal import Virtio

/// The virtio-mmio windows, one behind the other from ``PhysicalLayout/virtioMMIO`` on (docs/platform.md).
final class MMIOBus: Sendable {
    private let transports: [MMIOTransport]

    init(_ transports: [MMIOTransport]) { self.transports = transports }

    static func address(ofDevice index: Int) -> UInt64 {
        PhysicalLayout.virtioMMIO + UInt64(index) * PhysicalLayout.virtioMMIOSpan
    }

    /// The name of the device at an address and the register's offset, for tables; nil where none is.
    func name(at address: UInt64) -> String? {
        let index = (address &- PhysicalLayout.virtioMMIO) / PhysicalLayout.virtioMMIOSpan
        guard index < UInt64(transports.count) else { return nil }
        return "\(transports[Int(index)].function.device.name)+0x\(String((address &- PhysicalLayout.virtioMMIO) % PhysicalLayout.virtioMMIOSpan, radix: 16))"
    }

    /// Answers one access. Where no device is, reads are all ones and writes are ignored.
    func handle(_ access: MMIOAccess) {
        let offset = access.address &- PhysicalLayout.virtioMMIO
        let index = offset / PhysicalLayout.virtioMMIOSpan
        guard index < UInt64(transports.count) else {
            if !access.isWrite { access.value = .max }
            return
        }
        let transport = transports[Int(index)]
        let register = offset % PhysicalLayout.virtioMMIOSpan
        if access.isWrite {
            transport.write(access.value, at: register, size: access.size)
        } else {
            access.value = transport.read(at: register, size: access.size)
        }
    }
}
