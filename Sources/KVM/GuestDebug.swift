// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Linux

/// The debugging features that KVM applies while a vCPU runs (`KVM_SET_GUEST_DEBUG`).
public struct GuestDebug: Sendable, Equatable {
    /// Stops after one instruction.
    public var isStepping = false
    /// Holds back interrupts while the vCPU steps, if KVM supports that.
    public var holdsInterrupts = false
    /// Stops the vCPU at `int3` instead of raising the guest's exception.
    public var takesBreakpointInstructions = false
    /// The debug registers that are active while the guest runs, instead of its own; nil keeps its own.
    public var debugRegisters: DebugRegisters?
    /// An exception to inject when the guest continues: one that was the guest's own, not the debugger's.
    public var injection: Injection?

    public init() {}

    public enum Injection: Sendable, Equatable {
        /// #DB, vector 1.
        case debug
        /// #BP, vector 3, as `int3` raises it.
        case breakpoint
    }

    /// DR0 to DR3 and DR7 (Intel SDM volume 3, §18.2).
    public struct DebugRegisters: Sendable, Equatable {
        public var addresses: (UInt64, UInt64, UInt64, UInt64)
        public var control: UInt64

        public init(addresses: (UInt64, UInt64, UInt64, UInt64), control: UInt64) {
            self.addresses = addresses
            self.control = control
        }

        public static func == (left: Self, right: Self) -> Bool {
            left.addresses == right.addresses && left.control == right.control
        }
    }

    /// Indicates that no feature is requested.
    public var isEmpty: Bool { self == GuestDebug() }

    /// The kernel's structure.
    var kernelValue: kvm_guest_debug {
        var value = kvm_guest_debug()
        guard !isEmpty else { return value }
        value.control = UInt32(KVM_GUESTDBG_ENABLE)
        if isStepping { value.control |= UInt32(KVM_GUESTDBG_SINGLESTEP) }
        if holdsInterrupts { value.control |= UInt32(KVM_GUESTDBG_BLOCKIRQ) }
        if takesBreakpointInstructions { value.control |= UInt32(KVM_GUESTDBG_USE_SW_BP) }
        switch injection {
        case .debug: value.control |= UInt32(KVM_GUESTDBG_INJECT_DB)
        case .breakpoint: value.control |= UInt32(KVM_GUESTDBG_INJECT_BP)
        case nil: break
        }
        if let debugRegisters {
            value.control |= UInt32(KVM_GUESTDBG_USE_HW_BP)
            let at = debugRegisters.addresses
            value.arch.debugreg = (at.0, at.1, at.2, at.3, 0, 0, 0, debugRegisters.control)
        }
        return value
    }
}

/// The reason why a vCPU under a debugger stopped (`KVM_EXIT_DEBUG`).
public struct DebugEvent: Sendable, Equatable {
    /// The exception vector: 1 is #DB, a step or a debug register; 3 is #BP, `int3`.
    public let exception: UInt32
    /// Linear address of the instruction: the `int3` itself, the one at a debug register's address, or the next one.
    public let instruction: UInt64
    /// DR6: bits 0 to 3 name the debug registers that matched, bit 14 is a step (Intel SDM volume 3, §18.2.3).
    public let status: UInt64

    public init(exception: UInt32, instruction: UInt64, status: UInt64) {
        self.exception = exception
        self.instruction = instruction
        self.status = status
    }

    init(_ event: kvm_debug_exit_arch) {
        self.init(exception: event.exception, instruction: event.pc, status: event.dr6)
    }
}

extension VirtualCPU {
    /// Sets the conditions that stop the vCPU from its next run on. Call it after setting the registers: a step starts
    /// at RIP.
    public func setDebug(_ debug: GuestDebug) throws(KVMError) {
        var value = debug.kernelValue
        do throws(SystemCallError) {
            try descriptor.ioctl(CLINUX_KVM_SET_GUEST_DEBUG, &value, named: "KVM_SET_GUEST_DEBUG")
        } catch {
            throw .refused(purpose: "set breakpoints of vCPU \(id)", error)
        }
    }

    /// The size of ``extendedState()`` in bytes.
    public static var extendedStateSize: Int { 4096 }

    /// The x87, SSE and AVX registers as `XSAVE` lays them out (Intel SDM volume 1, §13.4).
    public func extendedState() throws(KVMError) -> [UInt8] {
        var state = [UInt8](repeating: 0, count: Self.extendedStateSize)
        try callOnBuffer(&state, CLINUX_KVM_GET_XSAVE, "KVM_GET_XSAVE", "read the vector registers")
        return state
    }

    /// Sets the registers from a modified result of ``extendedState()``.
    public func setExtendedState(_ state: [UInt8]) throws(KVMError) {
        var state = state
        guard state.count == Self.extendedStateSize else {
            throw .refused(
                purpose: "set \(state.count) bytes of vector registers", SystemCallError("KVM_SET_XSAVE", errno: EINVAL)
            )
        }
        try callOnBuffer(&state, CLINUX_KVM_SET_XSAVE, "KVM_SET_XSAVE", "set the vector registers")
    }

    private func callOnBuffer(
        _ buffer: inout [UInt8], _ request: UInt, _ name: String, _ purpose: String
    ) throws(KVMError) {
        // 4096 bytes, which is what the kernel reads or writes.
        let failure: SystemCallError? = unsafe buffer.withUnsafeMutableBytes { bytes in
            guard let start = bytes.baseAddress else { return nil }
            do throws(SystemCallError) { try unsafe descriptor.ioctl(request, buffer: start, named: name) } catch {
                return error
            }
            return nil
        }
        if let failure { throw .refused(purpose: "\(purpose) of vCPU \(id)", failure) }
    }
}
