// SPDX-License-Identifier: Apache-2.0

/// A virtio device behind the MMIO transport, version 2 (virtio 1.2 §4.2.2), or behind PCI, with registers that look
/// the same.
struct VirtioMMIO {
    /// Register offsets.
    enum Register {
        static let magic: UInt64 = 0x000
        static let version: UInt64 = 0x004
        static let deviceID: UInt64 = 0x008
        static let deviceFeatures: UInt64 = 0x010
        static let deviceFeaturesSelect: UInt64 = 0x014
        static let driverFeatures: UInt64 = 0x020
        static let driverFeaturesSelect: UInt64 = 0x024
        static let queueSelect: UInt64 = 0x030
        static let queueSizeMax: UInt64 = 0x034
        static let queueSize: UInt64 = 0x038
        static let queueReady: UInt64 = 0x044
        static let queueNotify: UInt64 = 0x050
        static let interruptStatus: UInt64 = 0x060
        static let interruptAcknowledge: UInt64 = 0x064
        static let status: UInt64 = 0x070
        static let queueDescriptors: UInt64 = 0x080
        static let queueDriver: UInt64 = 0x090
        static let queueDevice: UInt64 = 0x0a0
        static let configGeneration: UInt64 = 0x0fc
        static let config: UInt64 = 0x100
    }

    enum Status {
        static let acknowledge: UInt32 = 1
        static let driver: UInt32 = 2
        static let driverOK: UInt32 = 4
        static let featuresOK: UInt32 = 8
        static let needsReset: UInt32 = 64
        static let failed: UInt32 = 128
    }

    enum Kind: UInt32 {
        case network = 1
        case block = 2
        case entropy = 4
    }

    let registers: VirtioRegisters
    private let gsi: UInt32
    /// nil behind MMIO.
    private let function: VirtioPCI?

    /// The device's kind; nil for none, or one without a driver in this kernel.
    private(set) var kind: Kind?

    /// Identifies the device at `registers`.
    init(registers: Address, gsi: UInt32) throws(Failure) {
        self.registers = VirtioRegisters(registers)
        self.gsi = gsi
        function = nil
        guard registers.load(Register.magic) as UInt32 == 0x7472_6976 else {
            throw Failure("no virtio device at 0x\(hex: registers.value)")
        }
        let version: UInt32 = registers.load(Register.version)
        let identifier: UInt32 = registers.load(Register.deviceID)
        guard identifier != 0 else { return }
        guard version == 2 else {
            throw Failure(
                "the device at 0x\(hex: registers.value) has version \(version), expected 2 (QEMU: -global virtio-mmio.force-legacy=false)"
            )
        }
        kind = Kind(rawValue: identifier)
    }

    init(_ function: VirtioPCI) {
        registers = VirtioRegisters(function)
        gsi = 0
        self.function = function
        kind = Kind(rawValue: function.deviceID)
    }

    /// Calls `handler` for the device's interrupts.
    func handleInterrupts(_ handler: @escaping () -> Void) {
        if let function { function.handleInterrupts(handler) } else { interrupts.handle(gsi: gsi, handler) }
    }

    var status: UInt32 {
        get { registers.load(Register.status) }
        nonmutating set { registers.store(newValue, Register.status) }
    }

    var needsReset: Bool { status & Status.needsReset != 0 }

    /// Resets the device and waits for the end of the reset.
    func reset() throws(Failure) {
        status = 0
        let end = clock.now + 2 * seconds
        while status != 0 {
            guard clock.now < end else {
                throw Failure("the device at 0x\(hex: registers.value) does not complete its reset")
            }
        }
    }

    /// The features that the device offers.
    var offeredFeatures: UInt64 {
        registers.store(UInt32(0), Register.deviceFeaturesSelect)
        let low: UInt32 = registers.load(Register.deviceFeatures)
        registers.store(UInt32(1), Register.deviceFeaturesSelect)
        return UInt64(low) | UInt64(registers.load(Register.deviceFeatures) as UInt32) << 32
    }

    func acceptFeatures(_ features: UInt64) {
        for half in UInt32(0)..<2 {
            registers.store(half, Register.driverFeaturesSelect)
            registers.store(UInt32(truncatingIfNeeded: features >> (UInt64(half) * 32)), Register.driverFeatures)
        }
    }

    /// Reset, ACKNOWLEDGE, DRIVER and the features (virtio 1.2 §3.1.1): those of `wanted` that are offered.
    func negotiate(_ wanted: Features) throws(Failure) -> Features {
        try reset()
        status = Status.acknowledge
        status = Status.acknowledge | Status.driver
        let features = Features(rawValue: offeredFeatures & wanted.rawValue)
        guard features.contains(.version1) else {
            throw Failure("the device at 0x\(hex: registers.value) does not offer VERSION_1")
        }
        acceptFeatures(features.rawValue)
        status = Status.acknowledge | Status.driver | Status.featuresOK
        guard status & Status.featuresOK != 0 else {
            throw Failure("the device at 0x\(hex: registers.value) refuses the features that it offers")
        }
        function?.assignMessages()
        return features
    }

    func setDriverOK() { status = Status.acknowledge | Status.driver | Status.featuresOK | Status.driverOK }

    func notify(queue: UInt32) { registers.store(queue, Register.queueNotify) }

    func storeAddress(_ address: UInt64, _ register: UInt64) {
        registers.store(UInt32(truncatingIfNeeded: address), register)
        registers.store(UInt32(truncatingIfNeeded: address >> 32), register + 4)
    }

    /// Acknowledges the device's interrupt. Bit 0: used buffers, bit 1: the configuration changed.
    func acknowledgeInterrupt() -> UInt32 {
        let status: UInt32 = registers.load(Register.interruptStatus)
        if status != 0 { registers.store(status, Register.interruptAcknowledge) }
        return status
    }

    /// Reads a 64-bit field of the configuration space consistently (§4.2.2.2).
    func config64(_ offset: UInt64) -> UInt64 {
        while true {
            let before: UInt32 = registers.load(Register.configGeneration)
            let low: UInt32 = registers.load(Register.config + offset)
            let high: UInt32 = registers.load(Register.config + offset + 4)
            if registers.load(Register.configGeneration) as UInt32 == before { return UInt64(low) | UInt64(high) << 32 }
        }
    }

    func config32(_ offset: UInt64) -> UInt32 { registers.load(Register.config + offset) }
    func config16(_ offset: UInt64) -> UInt16 { registers.load(Register.config + offset) }
    func config8(_ offset: UInt64) -> UInt8 { registers.load(Register.config + offset) }
}

/// Feature bits.
struct Features: OptionSet {
    let rawValue: UInt64

    // Of block devices (§5.2.3).
    static let sizeMaximum = Features(rawValue: 1 << 1)
    static let segmentMaximum = Features(rawValue: 1 << 2)
    static let readOnly = Features(rawValue: 1 << 5)
    static let blockSize = Features(rawValue: 1 << 6)
    static let flush = Features(rawValue: 1 << 9)
    static let topology = Features(rawValue: 1 << 10)
    static let multiqueue = Features(rawValue: 1 << 12)
    static let discard = Features(rawValue: 1 << 13)
    static let writeZeroes = Features(rawValue: 1 << 14)

    // Of network devices (§5.1.3).
    static let checksum = Features(rawValue: 1 << 0)
    static let mtu = Features(rawValue: 1 << 3)
    static let macAddress = Features(rawValue: 1 << 5)
    static let mergeableBuffers = Features(rawValue: 1 << 15)
    static let linkStatus = Features(rawValue: 1 << 16)
    static let controlQueue = Features(rawValue: 1 << 17)
    static let queuePairs = Features(rawValue: 1 << 22)

    // Of every device (§6).
    static let indirectDescriptors = Features(rawValue: 1 << 28)
    static let eventIndex = Features(rawValue: 1 << 29)
    static let version1 = Features(rawValue: 1 << 32)

    static let ring: Features = [.indirectDescriptors, .eventIndex, .version1]
}

/// The virtio devices: virtio-mmio ones that the command line names, `virtio_mmio.device=SIZE@ADDRESS:GSI[:ID]`, then
/// those that only the DSDT has, then PCI functions.
func virtioDevices(_ boot: BootInformation) -> [VirtioMMIO] {
    var places: [(address: UInt64, gsi: UInt32)] = []
    for word in boot.words where word.starts(with: "virtio_mmio.device=") {
        if let place = parse(word.dropFirst(19)) {
            places.append(place)
        } else {
            Console.print("\(word): expected SIZE@ADDRESS:GSI")
        }
    }
    for place in acpi.virtioDevices where !places.contains(where: { $0.address == place.address }) {
        places.append(place)
    }

    var devices: [VirtioMMIO] = []
    for place in places {
        do throws(Failure) {
            let device = try VirtioMMIO(registers: Address(place.address), gsi: place.gsi)
            if device.kind != nil { devices.append(device) }
        } catch {
            Console.print(error.reason)
        }
    }
    for function in VirtioPCI.find() {
        let device = VirtioMMIO(function)
        if device.kind != nil { devices.append(device) }
    }
    return devices
}

private func parse(_ text: Text) -> (address: UInt64, gsi: UInt32)? {
    guard let (size, place) = text.cut(UInt8(ascii: "@")), size.size != nil,
        let (address, rest) = place.cut(UInt8(ascii: ":")),
        let base = address.number, base % 4 == 0, base < 1 << 32,
        let gsi = (rest.cut(UInt8(ascii: ":"))?.before ?? rest).number, gsi < 256
    else { return nil }
    return (base, UInt32(gsi))
}
