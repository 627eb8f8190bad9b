// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import CLinux
internal import KVM
internal import Linux

/// The CPUID leaves and MSRs that a guest's CPUs start with: what this host's KVM supports, made to fit the machine's
/// topology.
struct CPUModel {
    private let supported: [kvm_cpuid_entry2]
    private let layout: NodeLayout
    private let hasDeadlineTimer: Bool
    private let hasHypercalls: Bool

    /// - Parameter layout: which vCPUs are cores of one socket.
    init(_ system: borrowing System, _ layout: NodeLayout) throws(KVMError) {
        supported = try system.supportedCPUID()
        self.layout = layout
        hasDeadlineTimer = system.check(.tscDeadlineTimer) != 0
        hasHypercalls = Self.hostHasHypercalls
    }

    /// A hypercall wants a back-end that catches the instruction in ring 0; a software back-end that interprets ring 0
    /// loops on it. KVM offers the features on both, so only the back-end's name distinguishes them.
    ///
    /// Found once: a confined process, whose guest has reset itself, sees no files, and a guest's CPUs stay what they
    /// are.
    private static let hostHasHypercalls = ["kvm_intel", "kvm_amd"].contains {
        unsafe access("/sys/module/\($0)", F_OK) == 0
    }

    /// The leaves for one vCPU.
    /// - Parameters:
    ///   - id: its local APIC ID.
    ///   - frequency: of its time-stamp counter in kHz, if KVM reported it.
    func entries(id: UInt32, timeStampCounterFrequency frequency: Int?) -> [kvm_cpuid_entry2] {
        let cores = layout.cores(besides: id)
        var entries = supported.filter { !Leaf.topology.contains($0.function) }.map {
            adjusted($0, id: id, cores: cores)
        }
        entries += topology(id: id, cores: cores)
        if let frequency, !entries.contains(where: { $0.function == Leaf.timing }) {
            // The leaf that VMware introduced: frequencies of the TSC and of the local APIC's timer in kHz. KVM's APIC
            // ticks at 1 GHz.
            var timing = kvm_cpuid_entry2()
            timing.function = Leaf.timing
            timing.eax = UInt32(clamping: frequency)
            timing.ebx = 1_000_000
            entries.append(timing)
            for index in entries.indices where entries[index].function == Leaf.hypervisor {
                entries[index].eax = max(entries[index].eax, Leaf.timing)
            }
        }
        return entries
    }

    /// Bits of a guest-physical address; 36 where KVM does not say.
    var physicalAddressBits: Int {
        let bits = supported.first { $0.function == Leaf.amdSizes }.map { Int($0.eax & 0xff) } ?? 0
        return bits == 0 ? 36 : bits
    }

    /// What the processor is called, for the firmware's tables.
    var processor: SMBIOSDescription.Processor {
        func registers(_ leaf: UInt32) -> kvm_cpuid_entry2 {
            supported.first { $0.function == leaf } ?? kvm_cpuid_entry2()
        }
        func text(_ registers: [UInt32]) -> String {
            let bytes = registers.flatMap { register in (0..<4).map { UInt8(truncatingIfNeeded: register >> (8 * $0)) }
            }
            let end = bytes.firstIndex(of: 0) ?? bytes.endIndex
            return String(decoding: bytes[..<end].drop { $0 == UInt8(ascii: " ") }, as: UTF8.self)
        }
        let vendor = registers(0), features = registers(Leaf.features)
        return SMBIOSDescription.Processor(
            manufacturer: text([vendor.ebx, vendor.edx, vendor.ecx]),
            version: text((0x8000_0002...0x8000_0004).map(registers).flatMap { [$0.eax, $0.ebx, $0.ecx, $0.edx] }),
            id: UInt64(features.edx) << 32 | UInt64(features.eax))
    }

    /// MSRs as firmware would leave them: index and value. A host whose KVM does not know one goes without it.
    static let modelSpecificRegisters: [(index: UInt32, value: UInt64)] = [
        (0x1a0, 1),  // IA32_MISC_ENABLE: fast string operations
        (0x2ff, 1 << 11 | 6),  // IA32_MTRR_DEF_TYPE: MTRRs on, write-back by default (Intel SDM volume 3, §12.11.2.1)
    ]

    private enum Leaf {
        static let features: UInt32 = 1
        static let caches: UInt32 = 4
        static let topology: [UInt32] = [0xb, 0x1f]
        static let hypervisor: UInt32 = 0x4000_0000
        static let paravirtual: UInt32 = 0x4000_0001
        static let timing: UInt32 = 0x4000_0010
        static let amdCaches: UInt32 = 0x8000_001d
        static let amdTopology: UInt32 = 0x8000_001e
        static let amdSizes: UInt32 = 0x8000_0008
    }

    /// Bits of an APIC ID that distinguish the cores of a socket.
    private var coreBits: UInt32 { layout.coreBits }

    /// Leaf 0xb (Intel SDM volume 2, CPUID): one thread a core, and the cores of the socket. KVM leaves it to us.
    private func topology(id: UInt32, cores: Int) -> [kvm_cpuid_entry2] {
        guard supported.contains(where: { $0.function == 0 && $0.eax >= 0xb }) else { return [] }
        return (0..<UInt32(2)).map { level in
            var entry = kvm_cpuid_entry2()
            entry.function = 0xb
            entry.index = level
            entry.flags = UInt32(KVM_CPUID_FLAG_SIGNIFCANT_INDEX)
            entry.eax = level == 0 ? 0 : coreBits
            entry.ebx = level == 0 ? 1 : UInt32(cores)
            entry.ecx = level | (level + 1) << 8  // 1: threads of a core, 2: cores
            entry.edx = id
            return entry
        }
    }

    private func adjusted(_ entry: kvm_cpuid_entry2, id: UInt32, cores: Int) -> kvm_cpuid_entry2 {
        var entry = entry
        switch entry.function {
        case Leaf.features:
            let logical = UInt32(clamping: min(cores, 255))
            entry.ebx = entry.ebx & 0xffff | logical << 16 | (id & 0xff) << 24
            entry.ecx |= 1 << 31  // a hypervisor is present
            entry.ecx |= 1 << 21  // x2APIC, which the in-kernel local APIC has
            if hasDeadlineTimer { entry.ecx |= 1 << 24 }
            // HTT: EBX 23:16 counts logical processors.
            if cores > 1 { entry.edx |= 1 << 28 } else { entry.edx &= ~(1 << 28) }
        case Leaf.caches:
            // Each core has its first two levels to itself, the third is the socket's; the other fields stay the
            // host's.
            let level = entry.eax >> 5 & 7
            let sharing: UInt32 = level >= 3 ? (1 << coreBits) - 1 : 0
            entry.eax = entry.eax & 0x3fff | sharing << 14 | (entry.eax & 0x1f == 0 ? 0 : ((1 << coreBits) - 1) << 26)
        case Leaf.paravirtual:
            if !hasHypercalls {
                for feature in [KVM_FEATURE_PV_UNHALT, KVM_FEATURE_PV_SEND_IPI, KVM_FEATURE_PV_SCHED_YIELD] {
                    entry.eax &= ~(1 << UInt32(feature))
                }
            }
        case Leaf.amdCaches:
            let level = entry.eax >> 5 & 7
            entry.eax = entry.eax & 0x3fff | (level >= 3 ? (1 << coreBits) - 1 : 0) << 14
        case Leaf.amdTopology:
            entry.eax = id
            entry.ebx = entry.ebx & ~0xffff | id & 0xff
            entry.ecx = entry.ecx & ~0xffff | (id >> coreBits) & 0xff  // the socket, of one node
        case Leaf.amdSizes:
            entry.ecx = entry.ecx & ~0xf0ff | UInt32(clamping: cores - 1) & 0xff | coreBits << 12
        default:
            break
        }
        return entry
    }
}
