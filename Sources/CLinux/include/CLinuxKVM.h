// SPDX-License-Identifier: Apache-2.0
// /dev/kvm: the ioctl numbers (Linux, Documentation/virt/kvm/api.rst), and the parts of struct kvm_run
// that Swift's importer leaves out: its unions, and the data that an offset in it points to.
#ifndef CLINUX_KVM_H
#define CLINUX_KVM_H

static const unsigned long CLINUX_KVM_GET_API_VERSION = KVM_GET_API_VERSION;
static const unsigned long CLINUX_KVM_CREATE_VM = KVM_CREATE_VM;
static const unsigned long CLINUX_KVM_CHECK_EXTENSION = KVM_CHECK_EXTENSION;
static const unsigned long CLINUX_KVM_GET_VCPU_MMAP_SIZE = KVM_GET_VCPU_MMAP_SIZE;
static const unsigned long CLINUX_KVM_GET_SUPPORTED_CPUID = KVM_GET_SUPPORTED_CPUID;
static const unsigned long CLINUX_KVM_CREATE_VCPU = KVM_CREATE_VCPU;
static const unsigned long CLINUX_KVM_SET_USER_MEMORY_REGION = KVM_SET_USER_MEMORY_REGION;
static const unsigned long CLINUX_KVM_SET_TSS_ADDR = KVM_SET_TSS_ADDR;
static const unsigned long CLINUX_KVM_SET_IDENTITY_MAP_ADDR = KVM_SET_IDENTITY_MAP_ADDR;
static const unsigned long CLINUX_KVM_CREATE_IRQCHIP = KVM_CREATE_IRQCHIP;
static const unsigned long CLINUX_KVM_CREATE_PIT2 = KVM_CREATE_PIT2;
static const unsigned long CLINUX_KVM_GET_PIT2 = KVM_GET_PIT2;
static const unsigned long CLINUX_KVM_SET_PIT2 = KVM_SET_PIT2;
static const unsigned long CLINUX_KVM_SET_PMU_EVENT_FILTER = KVM_SET_PMU_EVENT_FILTER;
static const unsigned long CLINUX_KVM_IRQ_LINE = KVM_IRQ_LINE;
static const unsigned long CLINUX_KVM_SET_GSI_ROUTING = KVM_SET_GSI_ROUTING;
static const unsigned long CLINUX_KVM_IRQFD = KVM_IRQFD;
static const unsigned long CLINUX_KVM_IOEVENTFD = KVM_IOEVENTFD;
static const unsigned long CLINUX_KVM_GET_TSC_KHZ = KVM_GET_TSC_KHZ;
static const unsigned long CLINUX_KVM_KVMCLOCK_CTRL = KVM_KVMCLOCK_CTRL;
static const unsigned long CLINUX_KVM_RUN = KVM_RUN;
static const unsigned long CLINUX_KVM_GET_REGS = KVM_GET_REGS;
static const unsigned long CLINUX_KVM_SET_REGS = KVM_SET_REGS;
static const unsigned long CLINUX_KVM_GET_SREGS = KVM_GET_SREGS;
static const unsigned long CLINUX_KVM_SET_SREGS = KVM_SET_SREGS;
static const unsigned long CLINUX_KVM_GET_MSRS = KVM_GET_MSRS;
static const unsigned long CLINUX_KVM_SET_MSRS = KVM_SET_MSRS;
static const unsigned long CLINUX_KVM_SET_CPUID2 = KVM_SET_CPUID2;
static const unsigned long CLINUX_KVM_GET_LAPIC = KVM_GET_LAPIC;
static const unsigned long CLINUX_KVM_SET_LAPIC = KVM_SET_LAPIC;
static const unsigned long CLINUX_KVM_GET_MP_STATE = KVM_GET_MP_STATE;
static const unsigned long CLINUX_KVM_TRANSLATE = KVM_TRANSLATE;
static const unsigned long CLINUX_KVM_SET_GUEST_DEBUG = KVM_SET_GUEST_DEBUG;
static const unsigned long CLINUX_KVM_GET_XSAVE = KVM_GET_XSAVE;
static const unsigned long CLINUX_KVM_SET_XSAVE = KVM_SET_XSAVE;
static const unsigned long CLINUX_KVM_GET_STATS_FD = KVM_GET_STATS_FD;

/// The port I/O exit (KVM_EXIT_IO) as plain values; `data` is the first of `count` items of `size` bytes in the run page.
typedef struct {
    uint8_t is_write, size;
    uint16_t port;
    uint32_t count;
    uint64_t data_offset;
} clinux_kvm_io;

static inline clinux_kvm_io clinux_kvm_run_io(const struct kvm_run *run) {
    clinux_kvm_io io = {run->io.direction == KVM_EXIT_IO_OUT, run->io.size, run->io.port, run->io.count, run->io.data_offset};
    return io;
}
static inline uint64_t clinux_kvm_run_mmio_address(const struct kvm_run *run) { return run->mmio.phys_addr; }
static inline uint32_t clinux_kvm_run_mmio_length(const struct kvm_run *run) { return run->mmio.len; }
static inline int clinux_kvm_run_mmio_is_write(const struct kvm_run *run) { return run->mmio.is_write; }
static inline uint8_t *clinux_kvm_run_mmio_data(struct kvm_run *run) { return run->mmio.data; }
static inline uint64_t clinux_kvm_run_hardware_reason(const struct kvm_run *run) { return run->hw.hardware_exit_reason; }
static inline uint64_t clinux_kvm_run_fail_entry_reason(const struct kvm_run *run) { return run->fail_entry.hardware_entry_failure_reason; }
static inline uint32_t clinux_kvm_run_system_event_type(const struct kvm_run *run) { return run->system_event.type; }
static inline uint32_t clinux_kvm_run_internal_suberror(const struct kvm_run *run) { return run->internal.suberror; }
static inline uint32_t clinux_kvm_run_internal_ndata(const struct kvm_run *run) {
    uint32_t count = run->internal.ndata;
    return count <= 16 ? count : 16;
}
static inline uint64_t clinux_kvm_run_internal_data(const struct kvm_run *run, uint32_t index) { return run->internal.data[index & 15]; }
/// Length of the instruction that KVM could not emulate, and its bytes; 0 when KVM did not say.
static inline uint32_t clinux_kvm_run_emulation_bytes(const struct kvm_run *run, uint8_t *bytes) {
    if (run->emulation_failure.ndata < 3 || !(run->emulation_failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES)) return 0;
    uint32_t count = run->emulation_failure.insn_size <= 15 ? run->emulation_failure.insn_size : 15;
    memcpy(bytes, run->emulation_failure.insn_bytes, count);
    return count;
}
static inline uint32_t clinux_kvm_run_msr_index(const struct kvm_run *run) { return run->msr.index; }
static inline uint64_t clinux_kvm_run_msr_data(const struct kvm_run *run) { return run->msr.data; }
static inline struct kvm_debug_exit_arch clinux_kvm_run_debug(const struct kvm_run *run) { return run->debug.arch; }
static inline void clinux_kvm_run_set_immediate_exit(struct kvm_run *run, uint8_t value) {
    __atomic_store_n(&run->immediate_exit, value, __ATOMIC_SEQ_CST);
}

#endif
