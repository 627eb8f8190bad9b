internal import CLinux
internal import Linux

/// KVM's 8254 timer (PIT), made when a guest first asks for it.
///
/// Guests of today have better clocks and leave it alone; and a machine that has one takes 15 to 20 ms longer to end, since the
/// kernel waits for a grace period for each of the timer's two notifiers. Once made, the timer's ports (0x40–0x43, 0x61) are answered in the kernel;
/// the one access that came before is put into its state here. Any vCPU thread may call the methods.
public final class IntervalTimer: Sendable {
    private let machine: FileDescriptor

    init(_ machine: consuming FileDescriptor) { self.machine = machine }

    /// Makes the timer, if it is not there yet.
    private func make() -> Bool {
        var configuration = kvm_pit_config()
        configuration.flags = UInt32(KVM_PIT_SPEAKER_DUMMY)
        do throws(SystemCallError) { try machine.ioctl(CLINUX_KVM_CREATE_PIT2, &configuration, named: "KVM_CREATE_PIT2") } catch {
            return error.errno == EEXIST
        }
        return true
    }

    /// The answer to a guest's first read: what a timer that was just reset has in its registers.
    public func read(port: UInt16) -> UInt8 {
        _ = make()
        // Port 0x61: channel 2's output is high, the memory refresh toggles. A counter reads 0, which stands for 65,536.
        return port == 0x61 ? 0x30 : 0
    }

    /// Does what a guest's first write asks for (8254 data sheet, "Control Word Format").
    public func write(port: UInt16, value: UInt8) {
        guard make() else { return }
        var state = kvm_pit_state2()
        guard (try? machine.ioctl(CLINUX_KVM_GET_PIT2, &state, named: "KVM_GET_PIT2")) != nil else { return }
        switch port {
        case 0x43:
            let access = value >> 4 & 3
            // A read-back or latch command is about a count that nobody has set.
            guard value >> 6 < 3, access != 0 else { return }
            unsafe withUnsafeMutableBytes(of: &state.channels) { bytes in
                // Three channels, as the kernel's structure has them.
                let channels = unsafe bytes.bindMemory(to: kvm_pit_channel_state.self)
                let index = Int(value >> 6)
                unsafe channels[index].rw_mode = access
                unsafe channels[index].read_state = access
                unsafe channels[index].write_state = access
                // Modes 6 and 7 are 2 and 3.
                unsafe channels[index].mode = value >> 1 & 7 > 5 ? (value >> 1 & 7) - 4 : value >> 1 & 7
                unsafe channels[index].bcd = value & 1
            }
        case 0x61:
            state.channels.2.gate = value & 1
            state.flags = value & 2 != 0 ? state.flags | UInt32(KVM_PIT_FLAGS_SPEAKER_DATA_ON) : state.flags & ~UInt32(KVM_PIT_FLAGS_SPEAKER_DATA_ON)
        // A count without a control word: the mode is undefined, so nothing counts.
        default: return
        }
        _ = try? machine.ioctl(CLINUX_KVM_SET_PIT2, &state, named: "KVM_SET_PIT2")
    }
}
