// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import GuestMemory
internal import HostNetwork
internal import KVM
internal import Linux
internal import Sandbox

/// Inspects the host and reports what machines can use here.
public enum Doctor {
    /// One line of the examination.
    public struct Finding: Sendable, CustomStringConvertible {
        public enum Kind: String, Sendable {
            case good = "ok"
            /// Something that some machines need is missing.
            case limited = "note"
            /// A requirement of every machine is missing.
            case missing = "MISSING"
        }

        public let kind: Kind
        public let subject: String
        public let text: String
        /// The fix.
        public let remedy: Remedy?

        init(_ kind: Kind, _ subject: String, _ text: String, fix remedy: Remedy? = nil) {
            (self.kind, self.subject, self.text, self.remedy) = (kind, subject, text, remedy)
        }

        public var description: String {
            func padded(_ text: String, _ width: Int) -> String {
                text + String(repeating: " ", count: max(1, width - text.count))
            }
            let line = padded(kind.rawValue, 9) + padded(subject, 15) + text
            return remedy.map { line + "\n" + String(repeating: " ", count: 24) + "fix: \($0.text)" } ?? line
        }
    }

    /// Commands for this user's shell, or an advice where no command does it, or both.
    public struct Remedy: Sendable, Equatable {
        public let commands: [String]
        public let advice: String?

        var text: String {
            let commands = commands.joined(separator: "; ")
            return advice.map { commands.isEmpty ? $0 : "\(commands)   (\($0))" } ?? commands
        }

        static func advice(_ text: String) -> Remedy { Remedy(commands: [], advice: text) }
    }

    /// All findings, in an order to be read.
    public static func examine() -> [Finding] { Examination(isRoot: geteuid() == 0).findings }
}

/// One examination of the host.
struct Examination {
    /// Indicates whether commands need no `sudo`.
    let isRoot: Bool

    /// What depends on a device that cannot be opened is omitted: it cannot be examined.
    var findings: [Doctor.Finding] {
        kvm(at: "/dev/kvm") + proc() + memory() + [uring()] + network() + [passt()] + sandbox()
    }

    // MARK: Commands

    /// A command that only root may run, as this user has to type it.
    func asRoot(_ command: String, advice: String? = nil) -> Doctor.Remedy {
        Doctor.Remedy(commands: [isRoot ? command : "sudo \(command)"], advice: advice)
    }

    /// Writes to a file of the kernel's; the shell of an ordinary user would open it without `sudo`.
    func write(_ value: String, to path: String, advice: String? = nil) -> Doctor.Remedy {
        Doctor.Remedy(
            commands: [isRoot ? "echo \(value) > \(path)" : "echo \(value) | sudo tee \(path)"], advice: advice)
    }

    // MARK: KVM

    func kvm(at path: String) -> [Doctor.Finding] {
        do throws(KVMError) {
            let system = try System(path: path)
            var findings = [
                Doctor.Finding(.good, path, "available, API version 12, up to \(system.maximumCPUs) vCPUs per machine")
            ]
            for capability in Capability.required where system.check(capability) == 0 {
                findings.append(
                    Doctor.Finding(.missing, "KVM", "\(capability.name) is missing", fix: .advice("use a newer kernel"))
                )
            }
            let absent = Capability.optional.filter { system.check($0) == 0 }.map(\.name)
            findings.append(
                absent.isEmpty
                    ? Doctor.Finding(.good, "KVM", "all required and optional capabilities are present")
                    : Doctor.Finding(.limited, "KVM", "available, without \(absent.joined(separator: ", "))"))
            // A machine is the proof: other hypervisors may hold the processor's virtualization.
            _ = try system.createVirtualMachine()
            return findings + [backEnd(RingZero.found(on: system))]
        } catch .unavailable(_, let error) {
            return [unavailable(path, error)]
        } catch {
            return [Doctor.Finding(.missing, path, error.description)]
        }
    }

    private func unavailable(_ path: String, _ error: SystemCallError) -> Doctor.Finding {
        switch error.errno {
        case ENOENT: Doctor.Finding(.missing, path, "does not exist; \(Processor().sentence)", fix: loading(path))
        case EACCES, EPERM:
            Doctor.Finding(.missing, path, "cannot be opened by this user (\(error.reason))", fix: admission(to: path))
        default: Doctor.Finding(.missing, path, "cannot be opened: \(error.reason)", fix: loading(path))
        }
    }

    /// What brings the device about.
    private func loading(_ path: String) -> Doctor.Remedy {
        // "10:232\n": the kernel has the device, so it is this /dev that lacks it.
        if let text = try? readFile("/sys/class/misc/kvm/dev", limit: 32),
            case let numbers = text.split(separator: UInt8(ascii: ":")), numbers.count == 2
        {
            let number = numbers.map { String(decoding: $0.prefix { $0 > UInt8(ascii: " ") }, as: UTF8.self) }
            return asRoot(
                "mknod -m 666 \(path) c \(number[0]) \(number[1])",
                advice: "in a container: start it with --device \(path)")
        }
        switch Processor().virtualization {
        case .intel?: return asRoot("modprobe kvm_intel")
        case .amd?: return asRoot("modprobe kvm_amd")
        case nil:
            return .advice(
                "enable virtualization in the firmware, or nested virtualization on the outer host, then run modprobe kvm_intel or kvm_amd"
            )
        }
    }

    /// What lets this user in: the group that the device is for, or an entry of its own.
    private func admission(to path: String) -> Doctor.Remedy {
        let readAndWrite: mode_t = 0o060
        var status = stat()
        if unsafe stat(path, &status) == 0, status.st_gid != 0, status.st_mode & readAndWrite == readAndWrite,
            let group = groupName(status.st_gid)
        {
            return asRoot("usermod -aG \(group) $USER", advice: "then log in again")
        }
        return asRoot("setfacl -m u:$USER:rw \(path)")
    }

    private func groupName(_ number: gid_t) -> String? {
        for line in ((try? readFile("/etc/group", limit: 1 << 20)) ?? []).split(separator: UInt8(ascii: "\n")) {
            let fields = line.split(separator: UInt8(ascii: ":"), omittingEmptySubsequences: false).map {
                String(decoding: $0, as: UTF8.self)
            }
            if fields.count >= 3, fields[2] == "\(number)" { return fields[0] }
        }
        return nil
    }

    /// What KVM's back-end is and does. The module's name and the CPU's flags are an explanation; how ring 0 runs was
    /// tried.
    private func backEnd(_ ringZero: RingZero?) -> Doctor.Finding {
        let module =
            ["kvm_intel", "kvm_amd", "kvm_pvm"].first { unsafe access("/sys/module/\($0)", F_OK) == 0 }
            ?? "KVM, built into the kernel"
        switch ringZero {
        case .interpreted?:
            return Doctor.Finding(
                .limited, "back-end",
                "\(module): guest ring 0 is emulated (about 0.6 µs per instruction), ring 3 runs natively; stock Linux kernels do not boot"
            )
        case .native?:
            return Doctor.Finding(.good, "back-end", "\(module); guest ring 0 runs natively; \(Processor().sentence)")
        case nil: return Doctor.Finding(.limited, "back-end", "\(module); could not determine how guest ring 0 runs")
        }
    }

    // MARK: Memory

    private func proc() -> [Doctor.Finding] {
        if unsafe access("/proc/self", F_OK) == 0 { return [] }
        return [
            Doctor.Finding(
                .limited, "/proc",
                "not mounted: CPU and memory information is unavailable, and cache=none does not work",
                fix: asRoot("mount -t proc proc /proc"))
        ]
    }

    private func memory() -> [Doctor.Finding] {
        var findings: [Doctor.Finding] = []
        for size in [HugePageSize.twoMiB, .oneGiB] {
            let name = size == .twoMiB ? "2 MiB pages" : "1 GiB pages"
            guard let pool = try? HugePagePool(size) else {
                findings.append(Doctor.Finding(.limited, name, "not supported by this kernel or CPU"))
                continue
            }
            let advice = "for 2 GiB of guest RAM"
            let remedy =
                size == .twoMiB
                ? asRoot("sysctl vm.nr_hugepages=1024", advice: advice)
                : write("2", to: "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", advice: advice)
            let isThere = pool.available > 0
            findings.append(
                Doctor.Finding(
                    isThere ? .good : .limited, name, "\(pool.available) free of \(pool.total)",
                    fix: isThere ? nil : remedy))
        }
        let path = "/sys/kernel/mm/transparent_hugepage/enabled"
        let setting = ((try? readFile(path, limit: 256)).map { String(decoding: $0, as: UTF8.self) } ?? "")
            .split(separator: "[").last?.split(separator: "]").first.map(String.init)
        switch setting {
        case "always"?, "madvise"?:
            findings.append(Doctor.Finding(.good, "thp", "transparent huge pages: \(setting ?? "")"))
        default:
            findings.append(
                Doctor.Finding(.limited, "thp", "transparent huge pages are off", fix: write("madvise", to: path)))
        }
        return findings
    }

    // MARK: Disks and network

    private func uring() -> Doctor.Finding {
        if (try? IORing(entries: 4)) != nil { return Doctor.Finding(.good, "io_uring", "available; used by disks") }
        return Doctor.Finding(
            .limited, "io_uring", "unavailable; disks use slower system calls",
            fix: asRoot("sysctl kernel.io_uring_disabled=0"))
    }

    /// One finding for each layer of the sandbox that a host may lack.
    private func sandbox() -> [Doctor.Finding] {
        [filters(), landlock(), user(), namespaces()]
    }

    private func filters() -> Doctor.Finding {
        if Sandbox.hasFilters { return Doctor.Finding(.good, "seccomp", "system calls can be filtered") }
        return Doctor.Finding(
            .limited, "seccomp", "this kernel has no seccomp filters: --sandbox on runs without it",
            fix: .advice("use a kernel with CONFIG_SECCOMP_FILTER"))
    }

    private func landlock() -> Doctor.Finding {
        switch Sandbox.landlock {
        case .success(let version):
            let parts = version >= 6 ? "files, ports and scopes" : version >= 4 ? "files and ports" : "files"
            return Doctor.Finding(.good, "landlock", "version \(version): \(parts) can be restricted")
        case .failure(let refusal):
            return Doctor.Finding(
                .limited, "landlock", "\(refusal.reason): --sandbox on runs without it",
                fix: .advice("boot with lsm=landlock,… on a kernel with CONFIG_SECURITY_LANDLOCK"))
        }
    }

    private func user() -> Doctor.Finding {
        let text =
            Sandbox.User.canChange
            ? "root; machines run as the owner of their first disk, or nobody (--run-as), without capabilities"
            : "unprivileged; machines run as this user"
        return Doctor.Finding(.good, "user", text)
    }

    private func namespaces() -> Doctor.Finding {
        guard let refusal = Sandbox.namespacesRefusal else {
            return Doctor.Finding(.good, "namespaces", "available (--sandbox on,namespaces)")
        }
        return Doctor.Finding(
            .limited, "namespaces", "\(refusal.reason): --sandbox on,namespaces is unavailable",
            fix: .advice("allow user namespaces (sysctl user.max_user_namespaces), or start swkvm as root"))
    }

    private func network() -> [Doctor.Finding] {
        let path = "/dev/net/tun"
        do throws(SystemCallError) {
            _ = try FileDescriptor.open(path, O_RDWR)
            return [Doctor.Finding(.good, path, "can be opened"), netAdmin()]
        } catch {
            let remedy =
                switch error.errno {
                case ENOENT, ENODEV, ENXIO:
                    asRoot("modprobe tun", advice: "in a container: start it with --device \(path)")
                default: asRoot("chmod 0666 \(path)", advice: "the default of most distributions")
                }
            return [Doctor.Finding(.limited, path, "\(error.reason): --net tap= is unavailable", fix: remedy)]
        }
    }

    private func passt() -> Doctor.Finding {
        if let path = Passt.find() { return Doctor.Finding(.good, "passt", "\(path); --net user is available") }
        return Doctor.Finding(
            .limited, "passt", "not installed: --net user, the network of an IMAGE, is unavailable",
            fix: asRoot("apt install passt"))
    }

    private func netAdmin() -> Doctor.Finding {
        if clinux_has_capability(CAP_NET_ADMIN) != 0 {
            return Doctor.Finding(.good, "CAP_NET_ADMIN", "TAPs and bridges can be created")
        }
        return Doctor.Finding(
            .limited, "CAP_NET_ADMIN", "not held: swkvm can use an existing TAP of this user, but cannot create one",
            fix: asRoot("ip tuntap add swtap0 mode tap vnet_hdr user $USER"))
    }
}

/// What the CPU reports about virtualization: an explanation, on which nothing depends.
private struct Processor {
    enum Virtualization { case intel, amd }

    let virtualization: Virtualization?

    init() {
        let lines = ((try? readFile("/proc/cpuinfo", limit: 4 << 20)) ?? []).split(separator: UInt8(ascii: "\n"))
        let flags = lines.first { $0.starts(with: "flags".utf8) }?.split(separator: UInt8(ascii: " ")) ?? []
        virtualization =
            flags.contains { $0.elementsEqual("vmx".utf8) }
            ? .intel : flags.contains { $0.elementsEqual("svm".utf8) } ? .amd : nil
    }

    var sentence: String {
        switch virtualization {
        case .intel?: "the CPU has Intel VT-x"
        case .amd?: "the CPU has AMD-V"
        case nil: "the CPU reports neither vmx nor svm"
        }
    }
}
