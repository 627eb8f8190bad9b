// SPDX-License-Identifier: Apache-2.0

public import CLinux
internal import Linux

/// The KVM device, `/dev/kvm`: the host's capabilities, and the factory of virtual machines.
///
/// What the host can do is what ``check(_:)`` and the ioctls say; CPUID flags of the host are never asked, since KVM
/// runs on hosts that show neither `vmx` nor `svm`.
public struct System: ~Copyable, Sendable {
    private let descriptor: FileDescriptor
    /// Size in bytes of each vCPU's `kvm_run` mapping (`KVM_GET_VCPU_MMAP_SIZE`).
    let runSize: Int

    /// Opens the device and checks the interface's version.
    public init(path: String = "/dev/kvm") throws(KVMError) {
        let device = try Self.openDevice(path)
        let version = (try? device.ioctl(CLINUX_KVM_GET_API_VERSION, named: "KVM_GET_API_VERSION")) ?? -1
        guard version == KVM_API_VERSION else { throw .version(found: version) }
        runSize = Int(
            try refusing("report the size of the run page") { () throws(SystemCallError) in
                try device.ioctl(CLINUX_KVM_GET_VCPU_MMAP_SIZE, named: "KVM_GET_VCPU_MMAP_SIZE")
            })
        descriptor = device
    }

    private static func openDevice(_ path: String) throws(KVMError) -> FileDescriptor {
        do throws(SystemCallError) { return try FileDescriptor.open(path, O_RDWR) } catch {
            throw .unavailable(path: path, error)
        }
    }

    /// Returns the value of a capability: 0 if absent, 1 or a limit if present (`KVM_CHECK_EXTENSION`).
    public func check(_ capability: Capability) -> Int {
        Int(
            (try? descriptor.ioctl(
                CLINUX_KVM_CHECK_EXTENSION, UInt(UInt32(bitPattern: capability.number)), named: "KVM_CHECK_EXTENSION"))
                ?? 0)
    }

    /// Indicates whether ``GuestDebug/holdsInterrupts`` is supported; older kernels refuse it.
    public var canHoldInterrupts: Bool { check(.guestDebugFlags) & Int(KVM_GUESTDBG_BLOCKIRQ) != 0 }

    /// The maximum number of vCPUs in one machine.
    public var maximumCPUs: Int {
        let maximum = check(.maximumCPUs)
        // api.rst: without KVM_CAP_MAX_VCPUS the recommended number is the maximum, and without that 4.
        if maximum > 0 { return maximum }
        let recommended = check(.recommendedCPUs)
        return recommended > 0 ? recommended : 4
    }

    /// Throws if the host lacks one of ``Capability/required``.
    public func requireCapabilities() throws(KVMError) {
        for capability in Capability.required where check(capability) == 0 { throw .missing(capability) }
    }

    /// Returns the CPUID leaves that this host's KVM supports for guests (`KVM_GET_SUPPORTED_CPUID`).
    public func supportedCPUID() throws(KVMError) -> [kvm_cpuid_entry2] {
        // The kernel says E2BIG as long as the array is too short; 1024 leaves are more than any CPU has.
        var capacity = 128
        while true {
            let table = CountedArray<kvm_cpuid_entry2>(headerSize: MemoryLayout<kvm_cpuid2>.size, capacity: capacity)
            do throws(SystemCallError) {
                try unsafe descriptor.ioctl(
                    CLINUX_KVM_GET_SUPPORTED_CPUID, buffer: table.address, named: "KVM_GET_SUPPORTED_CPUID")
                return table.elements
            } catch {
                guard error.errno == E2BIG, capacity < 1024 else {
                    throw .refused(purpose: "list the CPUID leaves that it supports", error)
                }
                capacity *= 2
            }
        }
    }

    /// Creates an empty virtual machine.
    public func createVirtualMachine() throws(KVMError) -> VirtualMachine {
        let number = try refusing("create a virtual machine") { () throws(SystemCallError) in
            try descriptor.ioctl(CLINUX_KVM_CREATE_VM, named: "KVM_CREATE_VM")
        }
        return VirtualMachine(descriptor: FileDescriptor(owning: number), runSize: runSize)
    }
}
