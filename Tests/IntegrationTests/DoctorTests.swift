import Testing

@Suite(.enabled(if: Host.isFit, Host.needed)) struct DoctorTests {
    @Test func tellsWhatThisHostCanDo() throws {
        let doctor = try Program([Host.swkvm, "doctor"])
        try doctor.expectEnd(0)
        #expect(doctor.errors.bytes.isEmpty)
        #expect(!doctor.output.text.contains("MISSING"))
        for (kind, subject) in [
            ("ok", "/dev/kvm"), ("", "KVM"), ("", "back-end"), ("", "2 MiB pages"), ("", "1 GiB pages"), ("", "thp"), ("", "io_uring"),
            ("ok", "/dev/net/tun"), ("ok", "CAP_NET_ADMIN"),
        ] {
            #expect(doctor.output.lines.contains { $0.hasPrefix(kind) && $0.dropFirst(9).hasPrefix(subject + " ") }, "\(subject)")
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

    @Test func saysWhatIsMissingAndHowToMendIt() throws {
        let doctor = try Program(["unshare", "-m", "sh", "-euc", "mount -t tmpfs none /dev; exec '\(Host.swkvm)' doctor"])
        try doctor.expectEnd(1)
        let lines = doctor.output.lines
        #expect(lines.first?.hasPrefix("MISSING  /dev/kvm") == true && lines.first?.contains("modprobe") == true)
        #expect(lines.contains { $0.hasPrefix("note     /dev/net/tun") })
        #expect(lines.contains { $0.contains("mend: modprobe tun") })
    }

    @Test func anOrdinaryUserIsToldWhatNeedsAnAdministrator() throws {
        let directory = try TemporaryDirectory()
        try shell("cp '\(Host.swkvm)' '\(directory("swkvm"))'; chmod 755 '\(directory.path)'")
        let doctor = try Program([
            "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--bounding-set", "-all", "--inh-caps", "-all",
            directory("swkvm"), "doctor",
        ])
        #expect(try doctor.finish() != .signal(6))
        #expect(doctor.output.lines.contains { $0.hasPrefix("note     CAP_NET_ADMIN") })
    }
}
