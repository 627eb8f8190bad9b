// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Linux

/// KVM's 8254 timer (PIT), created when a guest first accesses it.
///
/// Current guests have better clocks and do not use it; and a machine that has one takes 15 to 20 ms longer to end,
/// since the kernel waits for a grace period for each of the timer's two notifiers. Once made, the timer's ports
/// (0x40–0x43, 0x61) are answered in the kernel; the accesses that had left the guest before are put into its state
/// here, one after the other. Any vCPU thread may call the methods.
///
/// CPUs that use the timer at the same moment have to agree on it among themselves, as on any PC: what one of them does
/// in the kernel while another's first access is put into the state may be overwritten by it.
public final class IntervalTimer: Sendable {
    private let machine: FileDescriptor
    /// Each access reads the state, changes it and writes it back.
    private let turn = Guarded(Turn())

    private struct Turn {
        var beforePause: kvm_pit_state2?
    }

    init(_ machine: consuming FileDescriptor) { self.machine = machine }

    /// Makes the timer, if it is not there yet.
    private func make() -> Bool {
        var configuration = kvm_pit_config()
        configuration.flags = UInt32(KVM_PIT_SPEAKER_DUMMY)
        do throws(SystemCallError) {
            try machine.ioctl(CLINUX_KVM_CREATE_PIT2, &configuration, named: "KVM_CREATE_PIT2")
        } catch {
            return error.errno == EEXIST
        }
        return true
    }

    /// Returns the value of a guest's first read: that of a timer that was just reset.
    public func read(port: UInt16) -> UInt8 {
        turn.withLock { _ in _ = make() }
        // Port 0x61: channel 2's output is high, the memory refresh toggles. A counter reads 0, which stands for
        // 65,536.
        return port == 0x61 ? 0x30 : 0
    }

    /// Performs a guest's first write (8254 data sheet, "Control Word Format").
    public func write(port: UInt16, value: UInt8) {
        turn.withLock { _ in
            guard make(), var state = state() else { return }
            Self.apply(value, port: port, to: &state)
            _ = try? machine.ioctl(CLINUX_KVM_SET_PIT2, &state, named: "KVM_SET_PIT2")
        }
    }

    /// The timer's registers; nil before it is made.
    /// Notes the state before a pause of the machine, in which no vCPU runs.
    public func pause() { turn.withLock { $0.beforePause = state() } }

    /// Drops the periods of a pause: KVM has counted them, to make up for them with one interrupt after the other.
    public func resume() {
        turn.withLock { turn in
            // Other modes count down once; that time is over.
            guard var state = turn.beforePause.take(), state.channels.0.mode == 2 || state.channels.0.mode == 3 else {
                return
            }
            _ = try? machine.ioctl(CLINUX_KVM_SET_PIT2, &state, named: "KVM_SET_PIT2")
        }
    }

    func state() -> kvm_pit_state2? {
        var state = kvm_pit_state2()
        return (try? machine.ioctl(CLINUX_KVM_GET_PIT2, &state, named: "KVM_GET_PIT2")) == nil ? nil : state
    }

    private static func apply(_ value: UInt8, port: UInt16, to state: inout kvm_pit_state2) {
        switch port {
        case 0x43:
            let access = value >> 4 & 3
            // A read-back or latch command is about a count that was not set.
            guard value >> 6 < 3, access != 0 else { return }
            change(channel: Int(value >> 6), of: &state) { channel in
                channel.rw_mode = access
                channel.read_state = access
                channel.write_state = access
                // Modes 6 and 7 are 2 and 3.
                channel.mode = value >> 1 & 7 > 5 ? (value >> 1 & 7) - 4 : value >> 1 & 7
                channel.bcd = value & 1
            }
        case 0x40...0x42:
            change(channel: Int(port - 0x40), of: &state) { $0.take(countByte: value) }
        case 0x61:
            state.channels.2.gate = value & 1
            state.flags =
                value & 2 != 0
                ? state.flags | UInt32(KVM_PIT_FLAGS_SPEAKER_DATA_ON)
                : state.flags & ~UInt32(KVM_PIT_FLAGS_SPEAKER_DATA_ON)
        default: break
        }
    }

    private static func change(
        channel: Int, of state: inout kvm_pit_state2, _ body: (inout kvm_pit_channel_state) -> Void
    ) {
        switch channel {
        case 0: body(&state.channels.0)
        case 1: body(&state.channels.1)
        default: body(&state.channels.2)
        }
    }
}

extension kvm_pit_channel_state {
    /// A byte of a new count, as the control word before it said (8254 data sheet, "Write Operations"); 0 stands for
    /// 65,536.
    fileprivate mutating func take(countByte value: UInt8) {
        func full(_ number: UInt32) -> UInt32 { number == 0 ? 65536 : number }
        switch write_state {
        case 1: count = full(UInt32(value))
        case 2: count = full(UInt32(value) << 8)
        case 3:
            write_latch = value
            write_state = 4
        case 4:
            count = full(UInt32(value) << 8 | UInt32(write_latch))
            write_state = 3
        // A count without a control word: the mode is undefined, so nothing counts.
        default: break
        }
    }
}
