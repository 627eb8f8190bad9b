// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Linux

/// One interrupt line of a machine, for a device whose registers are accessed by vCPU threads.
///
/// The interrupt is there when ``pulse()`` returns, so a guest sees it where the register's documentation has it; an
/// irqfd hands interrupts of an IOAPIC's pin to a kernel thread first.
public final class InterruptLine: Sendable {
    private let machine: FileDescriptor
    private let gsi: UInt32

    init(_ machine: consuming FileDescriptor, gsi: UInt32) {
        self.machine = machine
        self.gsi = gsi
    }

    /// Raises and lowers the line: one edge.
    public func pulse() {
        set(true)
        set(false)
    }

    /// Raises or lowers the line, for a pin that is level-triggered.
    public func set(_ isRaised: Bool) {
        var line = kvm_irq_level()
        line.irq = gsi
        line.level = isRaised ? 1 : 0
        // The machine and its interrupt controllers exist, so there is nothing to refuse.
        _ = try? machine.ioctl(CLINUX_KVM_IRQ_LINE, &line, named: "KVM_IRQ_LINE")
    }
}
