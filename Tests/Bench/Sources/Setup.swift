// SPDX-License-Identifier: Apache-2.0

/// Paths, and how machines are started.
struct Setup {
    let swkvm: String
    let guest: String
    /// limit, exits.elf, init.
    let programs: String
    /// A directory for images.
    let work: String
    let linux: String?
    /// Counted runs of each measurement.
    let runs: Int

    static let memory = 256

    /// QEMU's fastest set-up: no option ROMs, no RTC, no default devices, no user configuration, no monitor, no
    /// display.
    func qemu(_ more: [String], acpi: Bool = false) -> [String] {
        [
            "qemu-system-x86_64", "-M",
            "microvm,x-option-roms=off,rtc=off,isa-serial=on,usb=off,graphics=off\(acpi ? "" : ",acpi=off")",
            "-accel", "kvm", "-cpu", "host,-arch-capabilities", "-m", String(Self.memory), "-no-user-config",
            "-nodefaults",
            "-display", "none", "-serial", "stdio", "-no-reboot",
        ] + more
    }

    func run(_ more: [String]) -> [String] { [swkvm, "run", "--mem", "\(Self.memory)M"] + more }

    func limit(_ more: [String]) -> [String] { ["\(programs)/limit"] + more }
}
