// SPDX-License-Identifier: Apache-2.0

import CLinux
import Linux
import TestSupport
import Testing

@testable import KVM

/// A machine with 64 KiB of RAM at 0 that runs a few bytes of 16-bit code.
struct TinyMachine: ~Copyable {
    let machine: VirtualMachine
    let cpu: VirtualCPU
    let memory: Mapping

    init(code: [UInt8], irqchip: Bool = false) throws {
        let system = try System()
        let memory = try Mapping(size: 64 << 10, protection: PROT_READ | PROT_WRITE, flags: MAP_PRIVATE | MAP_ANONYMOUS)
        unsafe UnsafeMutableRawBufferPointer(start: memory.start + 0x1000, count: code.count).copyBytes(from: code)
        let machine = try system.createVirtualMachine()
        try machine.setTSSAddress(0xfffb_d000)
        try machine.setIdentityMapAddress(0xfffb_c000)
        if irqchip { try machine.createInterruptControllers() }
        try unsafe machine.setMemory(slot: 0, at: 0, size: UInt64(memory.size), host: memory.start)
        let cpu = try machine.createCPU(id: 0)
        var segments = try cpu.systemRegisters()
        segments.cs.base = 0
        segments.cs.selector = 0
        try cpu.setSystemRegisters(segments)
        var registers = try cpu.registers()
        registers.rip = 0x1000
        registers.rflags = 2
        try cpu.setRegisters(registers)
        self.memory = memory
        self.machine = machine
        self.cpu = cpu
    }

    /// The next exit that is not an interruption.
    func run() throws -> Exit {
        while true {
            let exit = try cpu.runGuest()
            if case .interrupted = exit { continue }
            return exit
        }
    }
}

@Suite(.timed) struct KVMTests {
    @Test func missingDeviceIsOneSentenceWithARemedy() {
        #expect(throws: KVMError.self) { _ = try System(path: "/dev/no-such-kvm") }
        do throws(KVMError) { _ = try System(path: "/dev/no-such-kvm") } catch {
            #expect(error.description.contains("/dev/no-such-kvm does not exist"))
            #expect(error.description.contains("modprobe"))
        }
    }

    @Test func aFileThatIsNotKVMIsRefused() {
        do throws(KVMError) {
            _ = try System(path: "/dev/null")
            Issue.record("/dev/null was taken for KVM")
        } catch {
            #expect(error.description.contains("not the KVM device"))
        }
    }

    @Test func capabilitiesAreAskedOfKVM() throws {
        let system = try System()
        try system.requireCapabilities()
        #expect(system.check(Capability(number: KVM_CAP_NR_MEMSLOTS, name: "KVM_CAP_NR_MEMSLOTS")) >= 32)
        #expect(system.maximumCPUs >= 1)
        #expect(try system.supportedCPUID().contains { $0.function == 1 })
    }

    @Test func portInstructionsCarryTheirData() throws {
        // mov al,0x5a; out 0x10,al; in ax,0x20; out 0x30,ax; hlt
        let tiny = try TinyMachine(code: [0xb0, 0x5a, 0xe6, 0x10, 0xe5, 0x20, 0xe7, 0x30, 0xf4])
        guard case .port(let first) = try tiny.run() else { Issue.record("no port exit"); return }
        #expect(first.port == 0x10 && first.isWrite && first.size == 1 && first.count == 1 && first[0] == 0x5a)
        #expect(first[1] == 0)
        guard case .port(let input) = try tiny.run() else { Issue.record("no port exit"); return }
        #expect(input.port == 0x20 && !input.isWrite && input.size == 2)
        input[0] = 0xbeef
        input[7] = 1
        guard case .port(let output) = try tiny.run() else { Issue.record("no port exit"); return }
        #expect(output.port == 0x30 && output[0] == 0xbeef)
        guard case .halt = try tiny.run() else { Issue.record("no halt"); return }
    }

    @Test func mmioBeyondRAMIsAnExit() throws {
        // mov ax,0x2000; mov ds,ax (0x20000 is beyond the 64 KiB); mov [0],al; mov bl,[1]; hlt
        let tiny = try TinyMachine(code: [0xb8, 0x42, 0x20, 0x8e, 0xd8, 0xa2, 0, 0, 0x8a, 0x1e, 1, 0, 0xf4])
        guard case .mmio(let store) = try tiny.run() else { Issue.record("no MMIO exit"); return }
        #expect(store.isWrite && store.address == 0x20420 && store.size == 1 && store.value == 0x42)
        guard case .mmio(let load) = try tiny.run() else { Issue.record("no MMIO exit"); return }
        #expect(!load.isWrite && load.address == 0x20421)
        load.value = 0x77
        guard case .halt = try tiny.run() else { Issue.record("no halt"); return }
        #expect(try tiny.cpu.registers().rbx & 0xff == 0x77)
    }

    @Test func anIOEventFDIsSignalledWithoutAnExit() throws {
        // mov ax,0x2000; mov ds,ax; mov word [0x50],7; mov word [0x50],8; hlt
        let tiny = try TinyMachine(code: [
            0xb8, 0, 0x20, 0x8e, 0xd8, 0xc7, 6, 0x50, 0, 7, 0, 0xc7, 6, 0x50, 0, 8, 0, 0xf4,
        ])
        let seven = try EventFD()
        try tiny.machine.assignIOEventFD(seven, for: IOEventMatch(address: 0x20050, length: 2, value: 7))
        guard case .mmio(let other) = try tiny.run() else { Issue.record("no exit for the other value"); return }
        #expect(other.value == 8)
        #expect(seven.drain() == 1)
        guard case .halt = try tiny.run() else { Issue.record("no halt"); return }
    }

    @Test func aDeassignedIOEventFDIsAnExitAgain() throws {
        // mov ax,0x2000; mov ds,ax; mov word [0x50],7 (three times); out 1,al between the first and the second; hlt
        let store: [UInt8] = [0xc7, 6, 0x50, 0, 7, 0]
        let tiny = try TinyMachine(
            code: [0xb8, 0, 0x20, 0x8e, 0xd8] + store + [0xe6, 1] + store + [0xe6, 2] + store + [0xf4])
        let event = try EventFD(), match = IOEventMatch(address: 0x20050, length: 2, value: 7)
        try tiny.machine.assignIOEventFD(event, for: match)
        guard case .port = try tiny.run() else { Issue.record("the write came to user space"); return }
        #expect(event.drain() == 1)
        try tiny.machine.deassignIOEventFD(event, for: match)
        guard case .mmio(let write) = try tiny.run() else { Issue.record("the ioeventfd is still there"); return }
        #expect(write.address == 0x20050 && write.value == 7 && event.drain() == 0)
        do throws(KVMError) {
            try tiny.machine.deassignIOEventFD(event, for: match)
            Issue.record("an ioeventfd was deassigned twice")
        } catch { #expect(error.description.contains("deassign the ioeventfd of address 0x20050")) }
        guard case .port = try tiny.run() else { Issue.record("no second port exit"); return }
        // The address is free for another one.
        let next = try EventFD()
        try tiny.machine.assignIOEventFD(next, for: match)
        guard case .halt = try tiny.run() else { Issue.record("no halt"); return }
        #expect(next.drain() == 1 && event.drain() == 0)
    }

    @Test func anImmediateExitIsNotLost() throws {
        // jmp to itself: only the request ends the run.
        let tiny = try TinyMachine(code: [0xeb, 0xfe])
        tiny.cpu.immediateExit.request(true)
        guard case .interrupted = try tiny.cpu.runGuest() else { Issue.record("the run went on"); return }
    }

    @Test func aSignalEndsARunUnderWay() throws {
        // Port 1 tells that the guest runs; then it loops for ever.
        let tiny = try TinyMachine(code: [0xe6, 0x01, 0xeb, 0xfe])
        guard case .port = try tiny.run() else { Issue.record("no port exit"); return }
        let signal = clinux_sigrtmin()
        _ = clinux_install_interrupting_signal(signal)
        let this = pthread_self()
        let exit = tiny.cpu.immediateExit
        let kicker = try Thread.start(name: "kicker") {
            exit.request(true)
            pthread_kill(this, signal)
        }
        let before = SignalSet([signal]).unblock()
        guard case .interrupted = try tiny.cpu.runGuest() else { Issue.record("the run ended otherwise"); return }
        kicker.join()
        before.restore()
    }

    @Test func aTripleFaultIsAShutdown() throws {
        // lidt with limit 0; mov eax,cr0; or al,1; mov cr0,eax; ud2: protected mode without an interrupt table.
        let tiny = try TinyMachine(code: [
            0x0f, 0x01, 0x1e, 0x10, 0x10, 0x0f, 0x20, 0xc0, 0x0c, 1, 0x0f, 0x22, 0xc0, 0x0f, 0x0b,
        ])
        guard case .shutdown = try tiny.run() else { Issue.record("no shutdown"); return }
    }

    @Test func stateGoesInAndOut() throws {
        let tiny = try TinyMachine(code: [0xf4], irqchip: true)
        var registers = try tiny.cpu.registers()
        registers.r15 = 0x1234_5678_9abc_def0
        try tiny.cpu.setRegisters(registers)
        #expect(try tiny.cpu.registers().r15 == 0x1234_5678_9abc_def0)
        #expect(try tiny.cpu.setModelSpecificRegister(0x174, 0x10))
        #expect(try tiny.cpu.modelSpecificRegisters([0x174, 0xdead_beef]) == [0x174: 0x10])
        #expect(try tiny.cpu.mpState() == UInt32(KVM_MP_STATE_RUNNABLE))
        #expect(tiny.cpu.translate(0x1000) == 0x1000)
    }

    @Test func anEventFDHasOneInterrupt() throws {
        let tiny = try TinyMachine(code: [0xf4], irqchip: true)
        let event = try EventFD()
        try tiny.machine.assignIRQFD(event, gsi: 5)
        try tiny.machine.interruptLine(gsi: 5).pulse()
        do throws(KVMError) {
            try tiny.machine.assignIRQFD(event, gsi: 6)
            Issue.record("an eventfd was assigned twice")
        } catch { #expect(error.description.contains("assign an irqfd to GSI 6")) }
        try tiny.machine.deassignIRQFD(event, gsi: 5)
        try tiny.machine.assignIRQFD(event, gsi: 6)
        try tiny.machine.deassignIRQFD(event, gsi: 6)
        try tiny.machine.deassignIRQFD(event, gsi: 6)
    }

    @Test func tooManyCPUsIsSaidWithTheLimit() {
        #expect(KVMError.tooManyCPUs(wanted: 9, maximum: 8).description.contains("--cpus 8"))
    }

    @Test func theTimerIsMadeByItsFirstUser() throws {
        // in al,0x61 | mov al,0x34; out 0x43,al (channel 0, both bytes, mode 2) | mov al,0xb6; out 0x43,al | hlt
        let tiny = try TinyMachine(
            code: [0xe4, 0x61, 0xb0, 0x34, 0xe6, 0x43, 0xb0, 0xb6, 0xe6, 0x43, 0xe5, 0x80, 0xe4, 0x43, 0xf4],
            irqchip: true)
        let timer = try tiny.machine.intervalTimer()
        guard case .port(let first) = try tiny.run(), first.port == 0x61 else { Issue.record("no first use"); return }
        first[0] = UInt32(timer.read(port: 0x61))
        // From here on the kernel answers: the next exit is the port that nobody has.
        guard case .port(let second) = try tiny.run(), second.port == 0x80 else {
            Issue.record("the timer's ports still come here"); return
        }
    }

    @Test func theTimersFirstCommandIsNotLost() throws {
        // out 0x43 with a control word is the first use; then the count's two bytes and a read-back of the status.
        let tiny = try TinyMachine(
            code: [
                0xb0, 0x34, 0xe6, 0x43, 0xb0, 0x10, 0xe6, 0x40, 0xb0, 0x27, 0xe6, 0x40, 0xb0, 0xe2, 0xe6, 0x43, 0xe4,
                0x40, 0xe6, 0x80, 0xf4,
            ],
            irqchip: true)
        let timer = try tiny.machine.intervalTimer()
        guard case .port(let first) = try tiny.run(), first.port == 0x43 else { Issue.record("no first use"); return }
        timer.write(port: 0x43, value: UInt8(truncatingIfNeeded: first[0]))
        guard case .port(let status) = try tiny.run(), status.port == 0x80 else {
            Issue.record("the timer's ports still come here"); return
        }
        // 8254 data sheet, "Status Byte": access both bytes (bits 5, 4), mode 2 (bits 3 to 1).
        #expect(status[0] & 0x3f == 0x34)
    }

    /// Accesses that have left the guest before the timer was made come here one by one, from whichever vCPU.
    @Test func accessesThatCameBeforeItAreAllInItsState() throws {
        let tiny = try TinyMachine(code: [0xf4], irqchip: true)
        let timer = try tiny.machine.intervalTimer()
        #expect(timer.state() == nil)
        // A count that no control word announces; then both bytes, the low one, the high one.
        timer.write(port: 0x40, value: 0x55)
        for (control, channel, bytes) in [(0x34, 0x40, [0x10, 0x27]), (0x54, 0x41, [0x12]), (0xa6, 0x42, [0x03])]
            as [(UInt8, UInt16, [UInt8])]
        {
            timer.write(port: 0x43, value: control)
            for byte in bytes { timer.write(port: channel, value: byte) }
        }
        let state = try #require(timer.state())
        #expect(state.channels.0.count == 0x2710 && state.channels.0.mode == 2)
        #expect(state.channels.1.count == 0x12 && state.channels.2.count == 0x300 && state.channels.2.mode == 3)
        timer.write(port: 0x41, value: 0)
        #expect(timer.state()?.channels.1.count == 65536)
    }

    @Test func noneOfTwoFirstAccessesIsLost() throws {
        for _ in 0..<30 {
            let tiny = try TinyMachine(code: [0xf4], irqchip: true)
            let timer = try tiny.machine.intervalTimer()
            let first = try Thread.start(name: "first") { timer.write(port: 0x43, value: 0x34) }
            let second = try Thread.start(name: "second") { timer.write(port: 0x61, value: 3) }
            timer.write(port: 0x43, value: 0xb6)
            first.join()
            second.join()
            let state = try #require(timer.state())
            #expect(state.channels.0.rw_mode == 3 && state.channels.0.mode == 2)
            #expect(state.channels.2.rw_mode == 3 && state.channels.2.mode == 3 && state.channels.2.gate == 1)
            #expect(state.flags & UInt32(KVM_PIT_FLAGS_SPEAKER_DATA_ON) != 0)
        }
    }

    @Test func settlingReturns() throws {
        let tiny = try TinyMachine(code: [0xf4], irqchip: true)
        tiny.machine.waitForReplacedBuses()
    }
}
