// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// The reason why `KVM_RUN` returned (Documentation/virt/kvm/api.rst, "The kvm_run structure").
///
/// The I/O cases point into the run page: a device reads and fills the bytes in place, and they are gone at the next
/// run.
public enum Exit {
    /// The guest used an I/O port, with one instruction, maybe a string instruction of many items.
    case port(PortAccess)
    /// The guest accessed an address that is not RAM.
    case mmio(MMIOAccess)
    /// `hlt`, seen only without an in-kernel local APIC.
    case halt
    /// The vCPU shut down: a triple fault.
    case shutdown
    /// A signal, or a request for an immediate exit.
    case interrupted
    /// KVM could not continue, mostly because it could not emulate an instruction.
    case internalError(InternalError)
    /// The hardware refused to enter the guest; the reason is the processor's own code.
    case failedEntry(reason: UInt64)
    /// An exit that the hardware reported and KVM did not understand.
    case unknown(reason: UInt64)
    /// The guest requested a reset or a shutdown through a paravirtual interface.
    case systemEvent(type: UInt32)
    /// A breakpoint or a single step (``VirtualCPU`` under a debugger).
    case debug(DebugEvent)
    /// A hypercall that KVM passes to user space.
    case hypercall
    /// An end of interrupt of the IOAPIC, with a split irqchip.
    case endOfInterrupt
    /// An access to an MSR that is filtered to user space.
    case readMSR(index: UInt32)
    case writeMSR(index: UInt32, value: UInt64)
    /// Any other reason, by its number in `<linux/kvm.h>`.
    case other(reason: UInt32)

    /// The number in `<linux/kvm.h>` (`KVM_EXIT_*`).
    public var reason: UInt32 {
        switch self {
        case .port: UInt32(KVM_EXIT_IO)
        case .mmio: UInt32(KVM_EXIT_MMIO)
        case .halt: UInt32(KVM_EXIT_HLT)
        case .shutdown: UInt32(KVM_EXIT_SHUTDOWN)
        case .interrupted: UInt32(KVM_EXIT_INTR)
        case .internalError: UInt32(KVM_EXIT_INTERNAL_ERROR)
        case .failedEntry: UInt32(KVM_EXIT_FAIL_ENTRY)
        case .unknown: UInt32(KVM_EXIT_UNKNOWN)
        case .systemEvent: UInt32(KVM_EXIT_SYSTEM_EVENT)
        case .debug: UInt32(KVM_EXIT_DEBUG)
        case .hypercall: UInt32(KVM_EXIT_HYPERCALL)
        case .endOfInterrupt: UInt32(KVM_EXIT_IOAPIC_EOI)
        case .readMSR: UInt32(KVM_EXIT_X86_RDMSR)
        case .writeMSR: UInt32(KVM_EXIT_X86_WRMSR)
        case .other(let reason): reason
        }
    }

    /// The constant in `<linux/kvm.h>` without its prefix, for messages and counters.
    public static func name(ofReason reason: UInt32) -> String {
        let names = [
            "UNKNOWN", "EXCEPTION", "IO", "HYPERCALL", "DEBUG", "HLT", "MMIO", "IRQ_WINDOW_OPEN", "SHUTDOWN",
            "FAIL_ENTRY", "INTR",
            "SET_TPR", "TPR_ACCESS", "S390_SIEIC", "S390_RESET", "DCR", "NMI", "INTERNAL_ERROR", "OSI", "PAPR_HCALL",
            "S390_UCONTROL",
            "WATCHDOG", "S390_TSCH", "EPR", "SYSTEM_EVENT", "S390_STSI", "IOAPIC_EOI", "HYPERV", "ARM_NISV",
            "X86_RDMSR", "X86_WRMSR",
            "DIRTY_RING_FULL", "AP_RESET_HOLD", "X86_BUS_LOCK", "XEN", "RISCV_SBI", "RISCV_CSR", "NOTIFY",
            "LOONGARCH_IOCSR",
            "MEMORY_FAULT", "TDX",
        ]
        return Int(reason) < names.count ? names[Int(reason)] : "reason \(reason)"
    }
}

/// One port instruction's data. Valid until the vCPU runs again.
@safe public struct PortAccess {
    public let port: UInt16
    /// The width of an item: 1, 2 or 4 bytes.
    public let size: Int
    /// The number of items; more than 1 for `rep ins` and `rep outs`.
    public let count: Int
    /// Indicates a write by the guest: `out`.
    public let isWrite: Bool
    // `count * size` bytes in the run page; the kernel keeps them inside it, and `item` checks the index.
    private let data: UnsafeMutableRawPointer

    init(_ io: clinux_kvm_io, run: UnsafeMutableRawPointer) {
        port = io.port
        size = Int(io.size)
        count = Int(io.count)
        isWrite = io.is_write != 0
        unsafe data = run + Int(io.data_offset)
    }

    /// Passes the bytes of all items to `body`, in the order of guest memory.
    public func withBytes(_ body: (Span<UInt8>) -> Void) {
        // The kernel keeps the items within the run page, which the vCPU that made this value maps.
        let bytes = unsafe UnsafeBufferPointer(start: data.assumingMemoryBound(to: UInt8.self), count: count * size)
        unsafe body(bytes.span)
    }

    /// Reads or fills an item; one beyond the last reads 0 and takes no value.
    public subscript(item: Int) -> UInt32 {
        get {
            guard (0..<count).contains(item) else { return 0 }
            return switch size {
            case 1: unsafe UInt32(data.load(fromByteOffset: item, as: UInt8.self))
            case 2: unsafe UInt32(data.loadUnaligned(fromByteOffset: item * 2, as: UInt16.self))
            default: unsafe data.loadUnaligned(fromByteOffset: item * 4, as: UInt32.self)
            }
        }
        nonmutating set {
            guard (0..<count).contains(item) else { return }
            switch size {
            case 1: unsafe data.storeBytes(of: UInt8(truncatingIfNeeded: newValue), toByteOffset: item, as: UInt8.self)
            case 2:
                unsafe data.storeBytes(
                    of: UInt16(truncatingIfNeeded: newValue), toByteOffset: item * 2, as: UInt16.self)
            default: unsafe data.storeBytes(of: newValue, toByteOffset: item * 4, as: UInt32.self)
            }
        }
    }
}

/// One access to an address that is not RAM. Valid until the vCPU runs again.
@safe public struct MMIOAccess {
    /// The guest-physical address.
    public let address: UInt64
    /// The width in bytes, 1 to 8.
    public let size: Int
    public let isWrite: Bool
    // The 8 bytes of kvm_run.mmio.data.
    private let data: UnsafeMutableRawPointer

    init(_ run: UnsafeMutablePointer<kvm_run>) {
        unsafe address = clinux_kvm_run_mmio_address(run)
        unsafe size = min(Int(clinux_kvm_run_mmio_length(run)), 8)
        unsafe isWrite = clinux_kvm_run_mmio_is_write(run) != 0
        unsafe data = UnsafeMutableRawPointer(clinux_kvm_run_mmio_data(run))
    }

    /// The bytes as a little-endian number; of a written value only the lowest `size` bytes count.
    public var value: UInt64 {
        get {
            let all = unsafe data.loadUnaligned(as: UInt64.self)
            return size >= 8 ? all : all & (1 << UInt64(size * 8) &- 1)
        }
        nonmutating set { unsafe data.storeBytes(of: newValue, as: UInt64.self) }
    }
}

/// Details of `KVM_EXIT_INTERNAL_ERROR`.
public struct InternalError: Sendable, Equatable {
    /// `KVM_INTERNAL_ERROR_*`; 1 is an instruction that KVM cannot emulate.
    public let suberror: UInt32
    /// Data that goes with the suberror, undocumented.
    public let data: [UInt64]
    /// The instruction's bytes, if KVM provides them.
    public let instruction: [UInt8]

    /// Indicates whether it is an instruction that KVM cannot emulate. The vCPU is still in front of it.
    public var isEmulation: Bool { suberror == UInt32(KVM_INTERNAL_ERROR_EMULATION) }

    public var reason: String {
        switch suberror {
        case UInt32(KVM_INTERNAL_ERROR_EMULATION): "it cannot emulate the instruction"
        case UInt32(KVM_INTERNAL_ERROR_SIMUL_EX): "an exception occurred during the delivery of another one"
        case UInt32(KVM_INTERNAL_ERROR_DELIVERY_EV): "an event could not be delivered"
        case UInt32(KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON): "the processor left the guest for an unexpected reason"
        default: "suberror \(suberror)"
        }
    }
}
