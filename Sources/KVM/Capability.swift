// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// A `KVM_CAP_*` number with its name (Documentation/virt/kvm/api.rst).
public struct Capability: Sendable, Hashable {
    /// The argument of `KVM_CHECK_EXTENSION`.
    public let number: Int32
    /// The constant's name, as the kernel's documentation has it.
    public let name: String

    public static let userMemory = Capability(number: KVM_CAP_USER_MEMORY, name: "KVM_CAP_USER_MEMORY")
    public static let irqchip = Capability(number: KVM_CAP_IRQCHIP, name: "KVM_CAP_IRQCHIP")
    /// Its value is the number of GSIs that a routing table may name.
    public static let interruptRouting = Capability(number: KVM_CAP_IRQ_ROUTING, name: "KVM_CAP_IRQ_ROUTING")
    public static let irqfd = Capability(number: KVM_CAP_IRQFD, name: "KVM_CAP_IRQFD")
    public static let ioEventFD = Capability(number: KVM_CAP_IOEVENTFD, name: "KVM_CAP_IOEVENTFD")
    /// ioeventfds for writes of any width, which KVM recognizes without decoding the instruction where the hardware
    /// allows it.
    public static let ioEventAnyLength = Capability(
        number: KVM_CAP_IOEVENTFD_ANY_LENGTH, name: "KVM_CAP_IOEVENTFD_ANY_LENGTH")
    public static let pit2 = Capability(number: KVM_CAP_PIT2, name: "KVM_CAP_PIT2")
    public static let tssAddress = Capability(number: KVM_CAP_SET_TSS_ADDR, name: "KVM_CAP_SET_TSS_ADDR")
    public static let identityMapAddress = Capability(
        number: KVM_CAP_SET_IDENTITY_MAP_ADDR, name: "KVM_CAP_SET_IDENTITY_MAP_ADDR")
    public static let extendedCPUID = Capability(number: KVM_CAP_EXT_CPUID, name: "KVM_CAP_EXT_CPUID")
    public static let mpState = Capability(number: KVM_CAP_MP_STATE, name: "KVM_CAP_MP_STATE")
    public static let immediateExit = Capability(number: KVM_CAP_IMMEDIATE_EXIT, name: "KVM_CAP_IMMEDIATE_EXIT")
    public static let tscDeadlineTimer = Capability(
        number: KVM_CAP_TSC_DEADLINE_TIMER, name: "KVM_CAP_TSC_DEADLINE_TIMER")
    public static let getTSCFrequency = Capability(number: KVM_CAP_GET_TSC_KHZ, name: "KVM_CAP_GET_TSC_KHZ")
    public static let guestDebug = Capability(number: KVM_CAP_SET_GUEST_DEBUG, name: "KVM_CAP_SET_GUEST_DEBUG")
    /// The mask of the `KVM_GUESTDBG_*` flags that this host's KVM supports.
    public static let guestDebugFlags = Capability(number: KVM_CAP_SET_GUEST_DEBUG2, name: "KVM_CAP_SET_GUEST_DEBUG2")
    public static let binaryStatistics = Capability(number: KVM_CAP_BINARY_STATS_FD, name: "KVM_CAP_BINARY_STATS_FD")
    public static let recommendedCPUs = Capability(number: KVM_CAP_NR_VCPUS, name: "KVM_CAP_NR_VCPUS")
    public static let maximumCPUs = Capability(number: KVM_CAP_MAX_VCPUS, name: "KVM_CAP_MAX_VCPUS")

    /// The capabilities that every swkvm machine requires.
    public static let required: [Capability] = [
        userMemory, irqchip, irqfd, ioEventFD, pit2, tssAddress, identityMapAddress, extendedCPUID, mpState,
        immediateExit,
    ]

    /// The capabilities that machines use if they are present.
    public static let optional: [Capability] = [tscDeadlineTimer, getTSCFrequency, guestDebug, binaryStatistics]
}
