internal import CLinux
internal import GuestMemory
internal import HostNetwork
internal import KVM
internal import Linux

/// Looks at the host and says what machines can have here.
public enum Doctor {
    /// One line of the examination.
    public struct Finding: Sendable, CustomStringConvertible {
        public enum Kind: String, Sendable {
            case good = "ok"
            /// Something that some machines want is missing.
            case limited = "note"
            /// No machine runs without it.
            case missing = "MISSING"
        }

        public let kind: Kind
        public let subject: String
        public let text: String
        /// The command, or the deed, that mends it.
        public let remedy: String?

        public var description: String {
            func padded(_ text: String, _ width: Int) -> String { text + String(repeating: " ", count: max(1, width - text.count)) }
            let line = padded(kind.rawValue, 9) + padded(subject, 15) + text
            return remedy.map { line + "\n" + String(repeating: " ", count: 24) + "mend: \($0)" } ?? line
        }
    }

    /// All findings, in an order to be read.
    public static func examine() -> [Finding] {
        kvm() + [back()] + proc() + memory() + [uring(), tun(), netAdmin()]
    }

    private static func kvm() -> [Finding] {
        do throws(KVMError) {
            let system = try System()
            var findings = [Finding(kind: .good, subject: "/dev/kvm", text: "opens, API version 12, up to \(system.maximumCPUs) vCPUs a machine", remedy: nil)]
            for capability in Capability.required where system.check(capability) == 0 {
                findings.append(Finding(kind: .missing, subject: "KVM", text: "\(capability.name) is missing", remedy: "use a newer kernel"))
            }
            let absent = Capability.optional.filter { system.check($0) == 0 }.map(\.name)
            if absent.isEmpty {
                findings.append(Finding(kind: .good, subject: "KVM", text: "all capabilities that swkvm uses", remedy: nil))
            } else {
                findings.append(Finding(kind: .limited, subject: "KVM", text: "works, without \(absent.joined(separator: ", "))", remedy: nil))
            }
            // A machine is the proof: other hypervisors may hold the processor's virtualization.
            _ = try system.createVirtualMachine()
            return findings
        } catch {
            return [Finding(kind: .missing, subject: "/dev/kvm", text: error.description, remedy: nil)]
        }
    }

    /// What KVM's back-end is: an explanation only, nothing depends on it.
    private static func back() -> Finding {
        let flags = (try? readFile("/proc/cpuinfo", limit: 4 << 20)).map { text in
            text.split(separator: UInt8(ascii: "\n")).first { $0.starts(with: "flags".utf8) }?.split(separator: UInt8(ascii: " ")).map { String(decoding: $0, as: UTF8.self) } ?? []
        } ?? []
        let modules = ["kvm_intel", "kvm_amd", "kvm_pvm"].filter { unsafe access("/sys/module/\($0)", F_OK) == 0 }
        let hardware = flags.contains("vmx") ? "Intel VT-x" : flags.contains("svm") ? "AMD-V" : nil
        switch (modules.first, hardware) {
        case ("kvm_pvm"?, _):
            return Finding(
                kind: .limited, subject: "back-end",
                text: "kvm_pvm, in software: a guest's ring 0 is interpreted (about 0.6 µs an instruction), its ring 3 is native; stock Linux kernels do not boot",
                remedy: nil)
        case (let module?, let hardware?): return Finding(kind: .good, subject: "back-end", text: "\(module), \(hardware)", remedy: nil)
        case (let module?, nil):
            return Finding(kind: .limited, subject: "back-end", text: "\(module); the CPU shows neither vmx nor svm, as in some clouds", remedy: nil)
        case (nil, let hardware?):
            return Finding(
                kind: .limited, subject: "back-end", text: "the CPU has \(hardware); KVM is built into the kernel, or not loaded",
                remedy: hardware == "AMD-V" ? "modprobe kvm_amd" : "modprobe kvm_intel")
        case (nil, nil):
            return Finding(
                kind: .limited, subject: "back-end", text: "neither vmx nor svm in /proc/cpuinfo and no KVM module that swkvm knows",
                remedy: "switch virtualization on in the firmware, or nested virtualization on the outer host")
        }
    }

    private static func proc() -> [Finding] {
        if unsafe access("/proc/self", F_OK) == 0 { return [] }
        return [
            Finding(
                kind: .limited, subject: "/proc", text: "not mounted: what it tells of the CPU and of memory is unknown, and cache=none does not work",
                remedy: "mount -t proc proc /proc")
        ]
    }

    private static func memory() -> [Finding] {
        var findings: [Finding] = []
        for size in [HugePageSize.twoMiB, .oneGiB] {
            let name = size == .twoMiB ? "2 MiB pages" : "1 GiB pages"
            guard let pool = try? HugePagePool(size) else {
                findings.append(Finding(kind: .limited, subject: name, text: "this kernel or CPU has none", remedy: nil))
                continue
            }
            let kind: Finding.Kind = pool.available > 0 ? .good : .limited
            let example = size == .twoMiB ? "sysctl vm.nr_hugepages=1024" : "echo 2 > /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"
            findings.append(
                Finding(
                    kind: kind, subject: name, text: "\(pool.available) free of \(pool.total)",
                    remedy: pool.available > 0 ? nil : "\(example)   (for 2 GiB of guest RAM)"))
        }
        let setting = ((try? readFile("/sys/kernel/mm/transparent_hugepage/enabled", limit: 256)).map { String(decoding: $0, as: UTF8.self) } ?? "")
            .split(separator: "[").last?.split(separator: "]").first.map(String.init)
        switch setting {
        case "always"?, "madvise"?: findings.append(Finding(kind: .good, subject: "thp", text: "transparent huge pages: \(setting ?? "")", remedy: nil))
        default:
            findings.append(
                Finding(
                    kind: .limited, subject: "thp", text: "transparent huge pages are off",
                    remedy: "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"))
        }
        return findings
    }

    private static func uring() -> Finding {
        if (try? IORing(entries: 4)) != nil { return Finding(kind: .good, subject: "io_uring", text: "disks use it", remedy: nil) }
        return Finding(
            kind: .limited, subject: "io_uring", text: "not to be had; disks use slower system calls", remedy: "sysctl kernel.io_uring_disabled=0")
    }

    private static func tun() -> Finding {
        do throws(SystemCallError) {
            _ = try FileDescriptor.open("/dev/net/tun", O_RDWR)
            return Finding(kind: .good, subject: "/dev/net/tun", text: "opens", remedy: nil)
        } catch {
            return Finding(
                kind: .limited, subject: "/dev/net/tun", text: "\(error.reason): no --net tap=",
                remedy: error.errno == ENOENT ? "modprobe tun" : "chmod 0666 /dev/net/tun, as most distributions have it")
        }
    }

    private static func netAdmin() -> Finding {
        if clinux_has_capability(CAP_NET_ADMIN) != 0 { return Finding(kind: .good, subject: "CAP_NET_ADMIN", text: "TAPs and bridges can be made", remedy: nil) }
        return Finding(
            kind: .limited, subject: "CAP_NET_ADMIN", text: "not held: swkvm can use a TAP that was made for this user, but not make one",
            remedy: "sudo ip tuntap add swtap0 mode tap vnet_hdr user $USER")
    }
}
