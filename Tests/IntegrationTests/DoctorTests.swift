// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct DoctorTests {
    @Test func tellsWhatThisHostCanDo() throws {
        let doctor = try Program([Host.swkvm, "doctor"])
        try doctor.expectEnd(0)
        #expect(doctor.errors.bytes.isEmpty)
        #expect(!doctor.output.text.contains("MISSING"))
        for (kind, subject) in [
            ("ok", "/dev/kvm"), ("", "KVM"), ("", "back-end"), ("", "2 MiB pages"), ("", "1 GiB pages"), ("", "thp"),
            ("", "io_uring"),
            ("ok", "/dev/net/tun"), ("ok", "CAP_NET_ADMIN"), ("ok", "passt"), ("ok", "seccomp"),
            ("", "landlock"), ("ok", "user"), ("", "namespaces"),
        ] {
            #expect(
                doctor.output.lines.contains { $0.hasPrefix(kind) && $0.dropFirst(9).hasPrefix(subject + " ") },
                "\(subject)")
        }
    }

    /// The figures are the host's own.
    @Test func countsHugePages() throws {
        let pool = try HugePagePool(.twoMiB, free: 5)
        let doctor = try Program([Host.swkvm, "doctor"])
        try doctor.expectEnd(0)
        let line = try #require(doctor.output.lines.first { $0.contains("2 MiB pages") })
        #expect(line.hasSuffix("\(try pool.available) free of \(try pool.total)"), "\(line)")
    }

    /// What depends on a device that does not open is not reported on.
    @Test func saysWhatIsMissingAndHowToFixIt() throws {
        let doctor = try Program([
            "unshare", "-m", "sh", "-euc", "mount -t tmpfs none /dev; exec '\(Host.swkvm)' doctor",
        ])
        try doctor.expectEnd(1)
        let lines = doctor.output.lines
        #expect(lines.first?.hasPrefix("MISSING  /dev/kvm") == true, "\(lines)")
        // The kernel has KVM, so it is the device's node that is missing.
        #expect(lines.contains { $0.contains("fix: mknod -m 666 /dev/kvm c 10 232") }, "\(lines)")
        #expect(lines.contains { $0.hasPrefix("note     /dev/net/tun") })
        #expect(lines.contains { $0.contains("fix: modprobe tun") })
        for subject in ["KVM ", "back-end", "CAP_NET_ADMIN"] {
            #expect(!lines.contains { $0.dropFirst(9).hasPrefix(subject) }, "\(subject)")
        }
    }

    /// The report for an ordinary user, with these devices instead of the host's.
    private func asNobody(_ preparation: String, _ arguments: String = "doctor") throws -> Program {
        let directory = try TemporaryDirectory()
        let script = """
            cp '\(Host.swkvm)' '\(directory("swkvm"))'; chmod 755 '\(directory.path)'; cd '\(directory.path)'
            \(preparation)
            exec setpriv --reuid 65534 --regid 65534 --clear-groups --bounding-set -all --inh-caps -all ./swkvm \(arguments)
            """
        // A file system that takes devices.
        let program = try Program(["unshare", "-m", "sh", "-euc", "mount -t tmpfs -o mode=755 none /mnt; \(script)"])
        // The directory goes with this call.
        return try withExtendedLifetime(directory) {
            try program.waitForEnd()
            return program
        }
    }

    private static func device(_ path: String, _ number: String, _ mode: String) -> String {
        "mknod -m \(mode) /mnt/\(number.split(separator: " ")[2]) \(number); mount --bind /mnt/\(number.split(separator: " ")[2]) \(path);"
    }

    @Test func anOrdinaryUserIsToldWhatNeedsAnAdministrator() throws {
        let doctor = try asNobody(Self.device("/dev/net/tun", "c 10 200", "666"))
        #expect(try doctor.waitForEnd() != .signal(6))
        #expect(doctor.output.lines.contains { $0.hasPrefix("note     CAP_NET_ADMIN") })
        #expect(
            doctor.output.lines.contains { $0.contains("fix: sudo ip tuntap add swtap0 mode tap vnet_hdr user $USER") })
    }

    @Test func commandsForAnOrdinaryUserBeginWithSudo() throws {
        let preparation = Self.device("/dev/kvm", "c 10 232", "600") + Self.device("/dev/net/tun", "c 10 200", "600")
        let doctor = try asNobody(preparation)
        try doctor.expectEnd(1)
        let lines = doctor.output.lines
        #expect(lines.first?.hasPrefix("MISSING  /dev/kvm       cannot be opened by this user") == true, "\(lines)")
        #expect(lines.contains { $0.hasSuffix("fix: sudo setfacl -m u:$USER:rw /dev/kvm") }, "\(lines)")
        #expect(lines.contains { $0.contains("fix: sudo chmod 0666 /dev/net/tun") })
        for subject in ["KVM ", "back-end", "CAP_NET_ADMIN"] {
            #expect(!lines.contains { $0.dropFirst(9).hasPrefix(subject) }, "\(subject)")
        }
        for line in lines where line.contains("fix: ") {
            #expect(line.contains("fix: sudo ") || line.contains("| sudo tee "), "\(line)")
        }
        // A group that the device is for is the better way.
        let grouped = try asNobody(Self.device("/dev/kvm", "c 10 232", "660") + "chgrp tty /dev/kvm")
        try grouped.expectEnd(1)
        #expect(
            grouped.output.lines.contains { $0.contains("fix: sudo usermod -aG tty $USER   (then log in again)") },
            "\(grouped.output.text)")
    }

    @Test func asJSON() throws {
        let doctor = try Program([Host.swkvm, "doctor", "--json"])
        try doctor.expectEnd(0)
        #expect(doctor.output.text.hasPrefix("{\n    \"usable\": true,\n    \"findings\": ["), "\(doctor.output.text)")
        let refused = try asNobody(Self.device("/dev/kvm", "c 10 232", "600"), "doctor --json")
        try refused.expectEnd(1)
        for line in [
            #""usable": false,"#, #""kind": "missing","#, #""subject": "/dev/kvm","#,
            #""text": "cannot be opened by this user (Permission denied)","#,
            #""sudo setfacl -m u:$USER:rw /dev/kvm""#,
        ] {
            #expect(refused.output.lines.contains { $0.hasSuffix(line) }, "\(line): \(refused.output.text)")
        }
    }
}
