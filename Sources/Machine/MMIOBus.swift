// SPDX-License-Identifier: Apache-2.0

internal import KVM
internal import Virtio

/// The virtio-mmio windows: device n is at `base + n · span` (docs/platform.md).
final class MMIOBus: Sendable {
    /// Guest-physical address of the first window.
    static let base: UInt64 = 0xd000_0000

    private let transports: [MMIOTransport]

    init(_ transports: [MMIOTransport]) { self.transports = transports }

    static func address(ofDevice index: Int) -> UInt64 { base + UInt64(index) * MMIOTransport.span }

    /// The name of the device at an address and the register's offset, for tables; nil where none is.
    func name(at address: UInt64) -> String? {
        let index = (address &- Self.base) / MMIOTransport.span
        guard index < UInt64(transports.count) else { return nil }
        return "\(transports[Int(index)].function.device.name)+0x\(String((address &- Self.base) % MMIOTransport.span, radix: 16))"
    }

    /// Answers one access. Where no device is, reads are all ones and writes are ignored.
    func handle(_ access: MMIOAccess) {
        let offset = access.address &- Self.base
        let index = offset / MMIOTransport.span
        guard index < UInt64(transports.count) else {
            if !access.isWrite { access.value = .max }
            return
        }
        let transport = transports[Int(index)]
        let register = offset % MMIOTransport.span
        if access.isWrite {
            transport.write(access.value, at: register, size: access.size)
        } else {
            access.value = transport.read(at: register, size: access.size)
        }
    }
}
