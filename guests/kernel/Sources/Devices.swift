// SPDX-License-Identifier: Apache-2.0

/// The machine's disks, network interfaces and source of random numbers.
final class Devices: @unchecked Sendable {
    private(set) var disks: [Disk] = []
    private(set) var interfaces: [NetworkInterface] = []
    /// The first, if there are several.
    private(set) var entropy: EntropySource?

    /// Initializes all devices. The `ip=` words of the command line belong to the interfaces in their order.
    func start(_ boot: BootInformation) {
        for device in virtioDevices(boot) {
            do {
                switch device.kind {
                case .block: disks.append(try Disk(device, index: disks.count))
                case .network: interfaces.append(NetworkInterface(try NetworkDevice(device, index: interfaces.count)))
                case .entropy: if entropy == nil { entropy = try EntropySource(device) }
                case nil: break
                }
            } catch {
                Console.print(error.reason)
            }
        }
        configureAddresses(boot)
    }

    private func configureAddresses(_ boot: BootInformation) {
        var remaining = interfaces[...]
        for word in boot.words where word.starts(with: "ip=") {
            guard let interface = remaining.popFirst() else { return }
            let value = word.dropFirst(3)
            if value == "dhcp" {
                if !interface.configureByDHCP() { Console.print("\(interface.name): no DHCP server answered") }
            } else if !interface.configure(value) {
                Console.print("\(word): expected ip=ADDRESS/PREFIX[,GATEWAY] or ip=dhcp")
            }
        }
    }

    func disk(_ name: Text) -> Disk? { disks.first { $0.name == name } }
}

let devices = Devices()

/// The host's request to power off (the event register, bit 0; its interrupt is ISA 9).
enum PowerButton {
    private static let register: UInt16 = 0x602

    static func start() {
        interrupts.handle(isa: 9) { look() }
        look()  // it may have been pressed before
    }

    private static func look() {
        let events = readPort8(register)
        guard events != 0xff, events & 1 != 0 else { return }  // all ones: there is no such register
        Console.print("\npower button: powering off")
        Power.off()
    }
}
