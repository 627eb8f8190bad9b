// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// What becomes of a machine after it was defined: names, copies, snapshots, sizes.
@Suite(.timed) struct MachineChangeTests {
    private let home: MachineHome

    init() throws { home = try MachineHome() }

    private func disk(_ name: String, _ file: String = "disk.qcow2") -> String {
        "\(home.path)/machines/\(name)/\(file)"
    }

    /// Writes to a disk what `read` finds there.
    private func write(_ byte: Int, to path: String) throws {
        _ = try shell("qemu-io -f qcow2 -c 'write -P \(byte) 64k 64k' '\(path)'")
    }

    private func has(_ byte: Int, _ path: String) throws -> Bool {
        try !shell("qemu-io -f qcow2 -r -c 'read -P \(byte) 64k 64k' '\(path)'").contains("verification failed")
    }

    // MARK: rename

    @Test(.enabled(if: Host.isFit, Host.needed)) func aRenamedMachineIsTheSameToItsGuest() throws {
        try home.swkvm(
            "create", "web", "--mem", "64M", "--disk-size", "1M", "--user", "me", "--net", "user,publish=2299:22")
        #expect(try home.swkvm("rename", "web", "db").output.text == "web: renamed to db\n")
        #expect(try home.states == ["db stopped"])
        let definition = try home.definition(of: "db")
        #expect(definition.contains("uuid = \""), "\(definition)")
        #expect(definition.contains(",mac="), "\(definition)")
        #expect(try home.files(of: "web").isEmpty && home.files(of: "db") == ["disk.qcow2"])
        // Again: what is stated stays.
        try home.swkvm("rename", "db", "other")
        #expect(try home.definition(of: "other") == definition)
        try home.swkvm("create", "taken", "--mem", "64M")
        #expect(try home.swkvm("rename", "other", "taken", status: 64).errors.text.contains("there is a machine taken"))
        #expect(try home.swkvm("rename", "none", "x", status: 64).errors.text.contains("there is no machine none"))
        try home.swkvm("start", "taken")
        #expect(try home.swkvm("rename", "taken", "x", status: 1).errors.text.contains("taken is running"))
        try home.swkvm("stop", "taken")
    }

    /// What a machine's name leads to is the same after it has another one.
    @Test func theIdentityOfARenamedMachine() throws {
        func identity(_ name: String) throws -> String {
            let lines = try home.definition(of: name).split(separator: "\n").filter {
                $0.hasPrefix("uuid") || $0.hasPrefix("net")
            }
            return lines.joined(separator: " ")
        }
        try home.swkvm("create", "web", "--mem", "64M", "--net", "tap=swx0", "--net", "stream=/x")
        try home.swkvm("rename", "web", "db")
        let first = try identity("db")
        // Of a machine of the old name again.
        try home.swkvm("create", "web", "--mem", "64M", "--net", "tap=swx0", "--net", "stream=/x")
        try home.swkvm("rename", "web", "again")
        #expect(try identity("again") == first)
        try home.swkvm("create", "web2", "--mem", "64M", "--net", "tap=swx0", "--net", "stream=/x")
        try home.swkvm("rename", "web2", "third")
        #expect(try identity("third") != first)
    }

    // MARK: clone

    @Test func aCloneIsIndependent() throws {
        try shell(
            "cd '\(home.directory.path)' && qemu-img create -q -f qcow2 base.qcow2 4M && qemu-io -c 'write -P 9 1M 64k' base.qcow2"
        )
        let base = home.directory("base.qcow2")
        try home.swkvm(
            "create", "web", "\(base)", "--kernel", "bundled", "--uuid", "12345678-1234-1234-1234-123456789abc",
            "--hostname",
            "web", "--net", "user,publish=2222:22,publish=8080:80,mac=52:54:00:12:34:56")
        try write(5, to: disk("web"))
        try home.swkvm("snapshot", "web", "create", "first")
        let clone = try home.swkvm("clone", "web", "db").output.text
        #expect(clone.hasPrefix("db: created, a clone of web; port "), "\(clone)")
        let definition = try home.definition(of: "db")
        for word in ["uuid", "hostname", "mac=", "=2222:", ":2222:", ":8080:"] {
            #expect(!definition.contains(word), "\(definition)")
        }
        #expect(definition.contains(":22,") && definition.contains(":80"), "\(definition)")
        #expect(try shell("qemu-img info '\(disk("db"))'").contains("backing file: \(base)"))
        #expect(try home.swkvm("snapshot", "db", "list").output.text.contains("first"))
        try home.swkvm("clone", "--copy", "--progress", "web", "alone")
        #expect(try !shell("qemu-img info '\(disk("alone"))'").contains("backing"))
        // What one writes, the others do not have.
        try write(6, to: disk("web"))
        for name in ["db", "alone"] {
            #expect(try has(5, disk(name)), "\(name)")
            #expect(try shell("qemu-img check '\(disk(name))'").contains("No errors"))
            let text = try shell("qemu-io -f qcow2 -r -c 'read -P 9 1M 64k' '\(disk(name))'")
            #expect(!text.contains("verification failed"), "\(name)")
        }
        try home.swkvm("delete", "web")
        #expect(try has(5, disk("db")))
        let progress = try home.swkvm("clone", "--progress", "--copy", "db", "shown")
        #expect(progress.errors.lines.last?.hasPrefix("100.0%") == true, "\(progress.story)")
        #expect(
            try home.swkvm("clone", "db", "alone", status: 64).errors.text.contains("there is a machine alone already"))
        #expect(try home.swkvm("clone", "none", "x", status: 64).errors.text.contains("there is no machine none"))
    }

    /// What works in one directory only, or for one machine at a time.
    @Test func whatCannotBeCloned() throws {
        try shell("qemu-img create -q -f raw '\(home.directory("shared.raw"))' 1M")
        let shared = home.directory("shared.raw")
        try home.swkvm("create", "web", "--mem", "64M", "--disk-size", "1M", "--disk", shared, "--net", "tap=swx0")
        let clone = try home.swkvm("clone", "web", "db").output.text
        #expect(clone.contains("the disk \(shared), the TAP swx0 as web"), "\(clone)")
        try shell(
            "cd '\(home.path)/machines/web' && mv disk.qcow2 base.qcow2 && qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 disk.qcow2"
        )
        let refused = try home.swkvm("clone", "web", "x", status: 64)
        #expect(refused.errors.text.contains("use --copy"), "\(refused.story)")
        #expect(try home.files(of: "x").isEmpty)
        try home.swkvm("clone", "--copy", "web", "x")
        #expect(try home.files(of: "x") == ["disk.qcow2"])
    }

    /// A copy of a tree of images shows how far it is.
    @Test func createShowsProgress() throws {
        try shell("qemu-img create -q -f qcow2 '\(home.directory("base.qcow2"))' 4M")
        let image = home.directory("base.qcow2")
        let quiet = try home.swkvm("create", "a", image, "--kernel", "bundled", "--copy")
        #expect(quiet.errors.text.isEmpty, "\(quiet.story)")
        let shown = try home.swkvm("create", "b", image, "--kernel", "bundled", "--copy", "--progress")
        #expect(shown.errors.lines.last?.hasPrefix("100.0%") == true, "\(shown.story)")
    }

    // MARK: snapshot

    @Test func snapshotsOfAllDisks() throws {
        try home.swkvm("create", "web", "--mem", "64M", "--disk-size", "1M", "--disk", "/nonexistent/other.raw")
        _ = try shell(
            """
            qemu-img create -q -f qcow2 '\(disk("web", "data.qcow2"))' 1M
            sed -i 's|^disk = .*|disk = ["disk.qcow2", "data.qcow2"]|' '\(home.path)/definitions/web.toml'
            """)
        let disks = [disk("web"), disk("web", "data.qcow2")]
        for path in disks { try write(1, to: path) }
        #expect(
            try home.swkvm("snapshot", "web", "create", "one").output.text == "web: created snapshot one of 2 disks\n")
        for path in disks { try write(2, to: path) }
        // A name that is another one's number.
        try home.swkvm("snapshot", "web", "create", "1")
        for path in disks { try write(3, to: path) }
        try home.swkvm("snapshot", "web", "revert", "1")
        for path in disks { #expect(try has(2, path)) }
        try home.swkvm("snapshot", "web", "revert", "one")
        for path in disks { #expect(try has(1, path)) }
        let list = try home.swkvm("snapshot", "web", "list").output.lines
        #expect(list.count == 3 && list[0].hasPrefix("TAG ") && list[1].hasPrefix("one "), "\(list)")
        #expect(try home.swkvm("snapshot", "web", "list", "--json").output.text.contains("\"disks\": 2"))
        let twice = try home.swkvm("snapshot", "web", "create", "one", status: 1)
        #expect(twice.errors.text.contains("web has a snapshot 'one' already"), "\(twice.story)")
        let missing = try home.swkvm("snapshot", "web", "revert", "two", status: 1)
        #expect(missing.errors.text.contains("web has no snapshot 'two'"), "\(missing.story)")
        try home.swkvm("snapshot", "web", "delete", "one")
        #expect(try home.swkvm("snapshot", "web", "list").output.lines.count == 2)
        for path in disks { #expect(try shell("qemu-img check '\(path)'").contains("No errors")) }
        #expect(try home.files(of: "web").sorted() == ["data.qcow2", "disk.qcow2"])
        for words in [
            ["revert"], ["delete"], ["list", "x"], ["make", "x"], ["create", "x", "--json"], ["create", ""],
        ] {
            let wrong = try home.start(["snapshot", "web"] + words)
            #expect(try wrong.waitForEnd() == .status(64), "\(wrong.story)")
        }
    }

    /// Killed between two disks: a snapshot that not all have is removed, what was to be reverted or deleted is.
    @Test(arguments: ["create", "revert", "delete"]) func whatWasInterrupted(change: String) throws {
        try home.swkvm("create", "web", "--mem", "64M", "--disk-size", "1M")
        let disks = [disk("web"), disk("web", "data.qcow2")]
        _ = try shell(
            """
            qemu-img create -q -f qcow2 '\(disks[1])' 1M
            sed -i 's|^disk = .*|disk = ["disk.qcow2", "data.qcow2"]|' '\(home.path)/definitions/web.toml'
            """)
        for path in disks { try write(1, to: path) }
        if change != "create" { try home.swkvm("snapshot", "web", "create", "one") }
        for path in disks { try write(2, to: path) }
        let word = ["create": "-c", "revert": "-a", "delete": "-d"][change] ?? ""
        _ = try shell(
            "printf '\(change)\\none' >'\(home.path)/machines/web/.snapshot'; qemu-img snapshot \(word) one '\(disks[0])'"
        )
        let list = try home.swkvm("snapshot", "web", "list")
        #expect(list.errors.lines.count == 1, "\(list.story)")
        #expect(list.output.lines.count == (change == "revert" ? 2 : 1), "\(list.story)")
        for path in disks { #expect(try has(change == "revert" ? 1 : 2, path)) }
        #expect(try home.files(of: "web").sorted() == ["data.qcow2", "disk.qcow2"])
    }

    /// No room for the second disk's: the first one has none either.
    @Test(.enabled(if: Host.isFit, Host.needed)) func aSnapshotWithoutRoom() throws {
        try home.swkvm("create", "web", "--mem", "64M", "--disk-size", "1M")
        let mount = "\(home.path)/machines/web/small"
        let program = try Program([
            "unshare", "-m", "sh", "-euc",
            """
            mkdir '\(mount)' && mount -t tmpfs -o size=512K none '\(mount)'
            qemu-img create -q -f qcow2 '\(mount)/data.qcow2' 1M
            qemu-io -f qcow2 -c 'write -P 7 0 64k' '\(mount)/data.qcow2' >/dev/null
            sed -i 's|^disk = .*|disk = ["disk.qcow2", "small/data.qcow2"]|' '\(home.path)/definitions/web.toml'
            head -c 1M /dev/zero >'\(mount)/filler' 2>/dev/null || true
            export SWKVM_HOME='\(home.path)'
            '\(Host.swkvm)' snapshot web create one || echo status=$?
            '\(Host.swkvm)' snapshot web list
            ls -A '\(home.path)/machines/web'
            """,
        ])
        #expect(try program.waitForEnd() == .status(0), "\(program.story)")
        #expect(program.output.lines.first == "status=1" && program.output.lines.filter { $0.hasPrefix("one") }.isEmpty)
        #expect(program.errors.text.contains("No space left on device"), "\(program.story)")
        #expect(!program.output.text.contains(".snapshot"), "\(program.story)")
    }

    @Test(.enabled(if: Host.isFit, Host.needed)) func whatCannotHaveSnapshots() throws {
        try home.swkvm("create", "bare", "--mem", "64M")
        #expect(try home.swkvm("snapshot", "bare", "create", "x", status: 1).errors.text.contains("no disk of its own"))
        try home.swkvm("create", "web", "--mem", "64M", "--disk-size", "1M", "--start")
        for words in [["create", "x"], ["list"], ["revert", "x"], ["delete", "x"]] {
            let refused = try home.start(["snapshot", "web"] + words)
            #expect(try refused.waitForEnd() == .status(1), "\(refused.story)")
            #expect(refused.errors.text.contains("web is running"), "\(refused.story)")
        }
        try home.swkvm("stop", "web")
        _ = try shell(
            "cd '\(home.path)/machines/web' && qemu-img create -q -f raw raw.raw 1M && sed -i 's|^disk = .*|disk = [\"disk.qcow2\", \"raw.raw\"]|' '\(home.path)/definitions/web.toml'"
        )
        let raw = try home.swkvm("snapshot", "web", "create", "x", status: 1)
        #expect(raw.errors.text.contains("only qcow2 images have snapshots"), "\(raw.story)")
        #expect(try !shell("qemu-img snapshot -l '\(disk("web"))'").contains("x"))
    }

    // MARK: resize

    @Test(.enabled(if: Host.isFit, Host.needed)) func sizes() throws {
        try home.swkvm("create", "web", "--mem", "64M", "--disk-size", "1M")
        #expect(
            try home.swkvm("resize", "web", "--disk-size", "+1M", "--mem", "96M", "--cpus", "2").output.text
                == "web: disk 2 MiB, memory 96M, 2 CPUs\n")
        #expect(try shell("qemu-img info '\(disk("web"))'").contains("virtual size: 2 MiB"))
        #expect(try home.definition(of: "web").contains("cpus = 2\n"))
        for (words, status, sentence) in [
            (["--disk-size", "1M"], 64, "cannot shrink"), (["--disk-size=-1M"], 64, "cannot shrink"),
            (["--cpus", "two"], 64, "--cpus"), (["--mem", "big"], 64, "--mem"), ([], 64, "nothing to change"),
            (["--disk-size", "big"], 64, "expected a size"),
        ] as [([String], Int32, String)] {
            let refused = try home.start(["resize", "web"] + words)
            #expect(try refused.waitForEnd() == .status(status), "\(refused.story)")
            #expect(refused.errors.text.contains(sentence), "\(refused.story)")
        }
        try home.swkvm("create", "bare", "--mem", "64M")
        #expect(
            try home.swkvm("resize", "bare", "--disk-size", "2M", status: 64).errors.text.contains("no disk of its own")
        )
        try home.swkvm("start", "web")
        #expect(try home.swkvm("resize", "web", "--disk-size", "4M", status: 1).errors.text.contains("web is running"))
        #expect(
            try home.swkvm("resize", "web", "--cpus", "1").output.text
                == "web: 1 CPU, when it is restarted: `swkvm restart web`\n")
        try home.swkvm("restart", "web")
        #expect(try home.swkvm("info", "web").output.text.contains("--cpus 1"))
        try home.swkvm("stop", "web")
    }

    // MARK: cp

    @Test(.enabled(if: Host.isFit, Host.needed)) func filesOfAStoppedMachine() throws {
        _ = try shell(
            """
            export PATH=$PATH:/usr/sbin:/sbin; cd '\(home.directory.path)' && mkdir -p tree/etc/sub && echo web >tree/etc/hostname
            echo deep >tree/etc/sub/file && truncate -s 16M system && mkfs.ext4 -q -F -d tree system
            qemu-img convert -f raw -O qcow2 system base.qcow2
            """)
        try home.swkvm("create", "web", home.directory("base.qcow2"), "--kernel", "bundled")
        let here = home.directory("copy")
        try home.swkvm("cp", "web:/etc/hostname", here)
        #expect(try shell("cat '\(here)'") == "web\n")
        try home.swkvm("cp", "web:/etc", home.directory("all"))
        #expect(try shell("cat '\(home.directory("all"))/sub/file'") == "deep\n")
        for (words, status, sentence) in [
            (["web:/etc/hostname", here], 1, "exist"), (["web:/none", home.directory("x")], 1, "/none"),
            (["web:hostname", here], 1, "begins with /"),
            ([here, "web:/etc/"], 1, "only be copied into a machine that runs"),
            ([here, here], 64, "one of SOURCE and TARGET"), (["web:/a", "web:/b"], 64, "one of SOURCE and TARGET"),
            (["none:/a", here], 64, "there is no machine none"),
        ] as [([String], Int32, String)] {
            let refused = try home.start(["cp"] + words)
            #expect(try refused.waitForEnd() == .status(status), "\(refused.story)")
            #expect(refused.errors.text.contains(sentence), "\(refused.story)")
        }
    }

    /// scp gets the port, the user and the host key's file of `swkvm ssh`.
    @Test(.enabled(if: Host.isFit, Host.needed)) func filesOfARunningMachine() throws {
        let tools = try home.directory.write(Array("#!/bin/sh\nprintf '%s\\n' \"$@\"\n".utf8), to: "scp")
        _ = try shell("chmod +x '\(tools)'")
        try home.swkvm("create", "web", "--mem", "64M", "--user", "me", "--net", "none", "--start")
        let refused = try home.swkvm("cp", "web:/a", "b", status: 1)
        #expect(refused.errors.text.contains("no port of the host leads to the guest's port 22"))
        // What is published is in the definition; scp is not the real one.
        _ = try shell("sed -i 's|^net = .*|net = \"user,publish=2222:22\"|' '\(home.path)/definitions/web.toml'")
        let path = ["PATH=\(home.directory.path):/usr/bin:/bin"]
        for (words, pair) in [
            (["web:a b", "here"], ["127.0.0.1:a b", "./here"]),
            (["./x:y", "web:/tmp/"], ["././x:y", "127.0.0.1:/tmp/"]),
            (["/x", "web:"], ["/x", "127.0.0.1:"]),
        ] as [([String], [String])] {
            let copy = try home.start(["cp"] + words, environment: path)
            #expect(try copy.waitForEnd() == .status(0), "\(copy.story)")
            #expect(copy.output.lines.suffix(4) == ["-r", "--"] + pair, "\(copy.story)")
            #expect(
                copy.output.text.contains("-P\n2222\n") && copy.output.text.contains("-o\nUser=me\n"), "\(copy.story)")
        }
    }

    // MARK: autostart

    /// The unit is systemd's affair: a systemctl of the test's own does what the real one would.
    @Test(.enabled(if: Host.isFit, Host.needed)) func autostart() throws {
        let directory = try TemporaryDirectory(), user = 65_534
        let wants = ".config/systemd/user/default.target.wants"
        try directory.write(
            Array(
                """
                #!/bin/sh
                echo "$@" >>"$HOME/calls"
                case $3 in enable) mkdir -p "$HOME/\(wants)"; ln -s x "$HOME/\(wants)/$4" ;; disable) rm "$HOME/\(wants)/$4" ;; esac

                """.utf8), to: "systemctl")
        _ = try shell(
            "cd '\(directory.path)' && chmod +x systemctl && cp '\(Host.swkvm)' swkvm && chown -R \(user) . && chmod 700 ."
        )
        func swkvm(_ words: String..., status: Int32 = 0, path: String = "/usr/bin:/bin") throws -> Program {
            let program = try Program(
                [
                    "setpriv", "--reuid", "\(user)", "--clear-groups", "env", "-i", "HOME=\(directory.path)",
                    "PATH=\(directory.path):\(path)", directory("swkvm"),
                ] + words)
            #expect(try program.waitForEnd() == .status(status), "\(program.story)")
            return program
        }
        _ = try swkvm("create", "web", "--mem", "64M")
        #expect(try swkvm("autostart", "web").output.text == "web: starts with this user's sessions\n")
        #expect(try shell("cat '\(directory("calls"))'") == "--user --quiet enable swkvm-machine@web.service\n")
        #expect(try swkvm("list", "--json").output.text.contains("\"autostart\": true"))
        #expect(try swkvm("info", "web").output.text.contains("autostart:  "))
        // A new name takes it along, and what is deleted starts no more.
        _ = try swkvm("rename", "web", "db")
        #expect(try shell("ls '\(directory.path)/\(wants)'") == "swkvm-machine@db.service\n")
        _ = try swkvm("delete", "db")
        #expect(try shell("ls '\(directory.path)/\(wants)'").isEmpty)
        _ = try swkvm("create", "web", "--mem", "64M")
        #expect(
            try swkvm("autostart", "--disable", "web").output.text == "web: does not start with this user's sessions\n")
        #expect(try swkvm("list", "--json").output.text.contains("\"autostart\": false"))
        // No systemd, or no unit.
        _ = try shell("rm '\(directory("systemctl"))'")
        let none = try swkvm("autostart", "web", status: 1, path: "/nowhere")
        #expect(none.errors.text.contains("systemctl cannot be run"), "\(none.story)")
        let refused = try home.start(["autostart", "web"])
        #expect(try refused.waitForEnd() == .status(64), "\(refused.story)")
        try home.swkvm("create", "web", "--mem", "64M")
        #expect(try home.swkvm("autostart", "web", status: 1).errors.text.contains("SWKVM_HOME is set"))
    }
}
