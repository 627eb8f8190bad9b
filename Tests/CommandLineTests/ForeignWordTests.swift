// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import TestSupport
import Testing

@testable import swkvm

/// What users of QEMU, virt-install and Firecracker type.
@Suite(.timed) struct ForeignWordTests {
    private func problem(_ line: String) -> String? {
        ForeignWords.problem(in: line.split(separator: " ").map(String.init))
    }

    /// To the parser it is -n -o -g -r -a -p -h, and so a request for help.
    @Test func noWordOfSeveralLettersIsSingleLetters() {
        #expect(problem("run -nographic") == "'-nographic' is not needed: the terminal is the guest's serial port")
        #expect(problem("run --mem 1G -nographic") == problem("run -nographic"))
        #expect(problem("run -machine q35")?.hasPrefix("'-machine' is not needed") == true)
        #expect(
            problem("run -hda disk.img")
                == "'-hda' is --disk PATH[,format=FORMAT][,ro] here (swkvm run IMAGE boots the system on a disk image)")
        #expect(problem("run --import") == "'--import' is swkvm run IMAGE here")
        #expect(problem("run -snapshot")?.hasPrefix("'-snapshot' is swkvm run IMAGE here (the image is not") == true)
        #expect(problem("run -foo") == "Unknown option '-foo'")
        #expect(problem("run -kernel bzImage") == "'-kernel': use --kernel")
        #expect(problem("run -help") == "'-help': use --help")
    }

    @Test(arguments: [
        "-m 2G", "--memory 2048", "--memory=2048", "--ram 2048", "-smp 2", "--vcpus 2", "--vcpus=2,sockets=1",
        "-drive file=a,if=virtio", "-hda a",
        "-cdrom a.iso", "--cdrom a.iso", "-netdev user,id=n0", "-nic user", "--network bridge=br0", "-serial mon:stdio",
        "--vnc :1", "-vnc :1", "--bios OVMF.fd",
        "-cpu host", "-enable-kvm", "-accel kvm", "--graphics none", "--os-variant debian12", "-daemonize",
        "-monitor stdio", "-device virtio-net", "--location URL",
        "--api-socket path=/tmp/s", "--no-api", "-s", "-S", "--extra-args console=ttyS0", "-display none",
        "-snapshot", "--import", "--noautoconsole",
        "-no-reboot", "--noreboot", "-no-shutdown", "-action reboot=shutdown",
        "--events on_reboot=destroy", "-version", "-V", "-icount 1",
        "--rootfs a", "--initramfs a", "--tap t", "-debugcon stdio", "--qemu-commandline x", "--security x",
    ])
    func usualWordsAreNamed(line: String) throws {
        let sentence = try #require(problem("run \(line)"))
        let word = line.prefix { $0 != " " && $0 != "=" }
        #expect(sentence.hasPrefix("'\(word)' is "), "\(sentence)")
        // The parser refuses each, or takes it for a request for help.
        #expect(throws: (any Error).self) { try RunCommand.parse(line.split(separator: " ").map(String.init)) }
    }

    @Test func whatIsThereIsNamed() {
        #expect(problem("run --metrics-path m") == "'--metrics-path' is --metrics PATH here")
        for (line, words) in [
            ("-monitor stdio", ["Ctrl-A :", "`help`"]), ("-qmp stdio", ["Ctrl-A :"]),
            ("-chroot /x", ["--sandbox", "--run-as"]), ("--security x", ["--sandbox"]),
            ("-overcommit mem-lock=on", ["--prealloc", "--cgroup"]),
        ] {
            for word in words {
                #expect(problem("run \(line)")?.contains(word) == true, "\(problem("run \(line)") ?? "")")
            }
        }
    }

    /// The same in other commands.
    @Test func helpIsGivenToWhoAsksForIt() {
        for line in ["doctor -machine", "image info -fish a.raw"] {
            let words = line.split(separator: " ").map(String.init)
            #expect(
                ForeignWords.unrequestedHelp(words)
                    == "Unknown option '\(words.first { $0.hasPrefix("-") } ?? "")'")
        }
        for line in [
            "doctor -h", "image info --help", "help run", "--help-hidden", "image --version", "", "image", "doctor",
        ] {
            #expect(ForeignWords.unrequestedHelp(line.split(separator: " ").map(String.init)) == nil)
        }
    }

    /// The status of a guest that reboots is the one that the advice names.
    @Test func noRebootIsOnRebootExit() {
        #expect(
            problem("run -no-reboot")
                == "'-no-reboot' is --on-reboot exit here (the machine ends, with status 103, when the guest reboots)")
        #expect(problem("run --version") == nil)
    }

    @Test func commandsThatAreNotThere() {
        func unknown(_ line: String) -> String? {
            UnknownCommand.problem(in: line.split(separator: " ").map(String.init))
        }
        #expect(unknown("rnu --mem 1G") == "'rnu' is not a command; did you mean 'run'?")
        #expect(
            unknown("launch")
                == "'launch' is not a command; the commands are run, create, start, stop, restart, list, info, console, logs, ssh, edit, resize, snapshot, clone, rename, cp, autostart, define, dumpxml, delete, ip, network, image, doctor"
        )
        #expect(unknown("help launch") == unknown("launch"))
        #expect(unknown("image creat x")?.hasSuffix("did you mean 'create'?") == true)
        #expect(
            unknown("image list")?.hasPrefix("'list' is not a command of swkvm image; the commands are create, info")
                == true)
        #expect(unknown("help image list") == unknown("image list"))
        for line in [
            "", "run x", "help", "help run", "image", "image info x", "help image info", "image -V", "--version", "-x",
            "doctor y", "image --help",
        ] {
            #expect(unknown(line) == nil, "\(line)")
        }
    }

    /// The parser's lists are put on one line; the hyphen of an option is no list's.
    @Test func aMessageKeepsTheHyphensOfOptions() {
        #expect(Command.oneLine("-o foo is not known") == "-o foo is not known")
        #expect(Command.oneLine("--disk a,b\n  - one\n  - two") == "--disk a,b one two")
    }

    @Test func allOfALineAreNamedAtOnce() {
        #expect(
            problem("run -m 2G -smp 2 -smp 4 --disk a.raw -nographic")
                == "'-m' is --mem SIZE here (SIZE without a unit is in bytes: QEMU's -m 2048 is --mem 2048M); '-smp' is --cpus N here; "
                + "'-nographic' is not needed: the terminal is the guest's serial port")
    }

    @Test func aMachineWithoutItsCommand() {
        #expect(
            problem("-m 2G")?.hasPrefix("a machine's options come after `swkvm run`; '-m' is --mem SIZE here") == true)
        #expect(problem("--kernel bzImage") == "a machine's options come after `swkvm run`")
    }

    @Test(arguments: [
        "", "run", "run --help", "run -h", "run --version", "run --mem x", "run --unknown", "run --cpus -1",
        "run -x=1 --help", "--help", "-h", "--version",
        "image create -o a b", "image info -m", "doctor -m", "run -- -nographic", "--generate-completion-script bash",
        "walk -m",
    ])
    func othersAreTheParsersAffair(line: String) {
        if line == "run -x=1 --help" { return #expect(problem(line) == "'-x' is --cmdline WORDS here") }
        #expect(problem(line) == nil)
    }

    /// What is recommended is there, and what is there is not called another program's.
    @Test func theTableIsTrue() {
        #expect(
            ForeignWords.machineOptions.isSuperset(of: [
                "mem", "cpus", "kernel", "disk", "net", "console", "hugepages", "rng", "uuid", "log-level",
            ]))
        #expect(ForeignWords.machineOptions.isDisjoint(with: ForeignWords.advice.keys))
        for (name, advice) in ForeignWords.advice {
            let words = "\(advice)".split { !($0.isLetter || $0 == "-") }.filter {
                $0.hasPrefix("--") && !["--backing", "--version"].contains($0)
            }
            for word in words {
                #expect(ForeignWords.machineOptions.contains(String(word.dropFirst(2))), "\(name): \(word)")
            }
        }
    }
}

@Suite(.timed) struct SuggestionTests {
    private func suggestion(_ typed: String) throws -> String {
        let error = #expect(throws: (any Error).self) { try Command.parseAsRoot(["run", typed]) }
        return Suggestion.keepingNear(Command.message(for: try #require(error)))
    }

    @Test(arguments: [
        "--ram", "--vnc", "--nat", "--ssh", "--gpu", "--usb", "--dns", "--tap", "--cores", "--debug",
        "--bios", "--wait", "--size", "--qemu",
    ])
    func similarLettersAreNoMeaning(typed: String) throws {
        let sentence = try suggestion(typed)
        #expect(
            sentence == "Unknown option '\(typed)'" || typed == "--nat" && sentence.hasSuffix("'--net'?"), "\(sentence)"
        )
    }

    @Test(arguments: [
        ("--memm", "--mem"), ("--me", "--mem"), ("--dsik", "--disk"), ("--cpu", "--cpus"), ("--kernal", "--kernel"),
        ("--intird", "--initrd"), ("--comandline", ""),
        ("--cmdlin", "--cmdline"), ("--hugepage", "--hugepages"), ("--hguepages", "--hugepages"),
        ("--consol", "--console"), ("--loglevel", "--log-level"),
    ])
    func slipsAreUnderstood(typed: String, meant: String) throws {
        #expect(
            try suggestion(typed) == "Unknown option '\(typed)'" + (meant.isEmpty ? "" : ". Did you mean '\(meant)'?"))
    }

    /// An option that is unknown is named, also where an argument is missing: the one is what was meant to be the
    /// other.
    @Test(arguments: [
        (["image", "info", "--x"], "Unknown option '--x'"),
        (["image", "info"], "Missing expected argument '<file>'"),
        (["image", "compare", "--x"], "Unknown option '--x'"),
        (["image", "info", "--json"], "Missing expected argument '<file>'"),
        (
            ["image", "create", "c.raw", "-1M"],
            "Unknown option '-1M': a value that begins with '-' is taken as an option, and no size or number here is negative"
        ),
    ])
    func unknownOptionsComeFirst(words: [String], expected: String) throws {
        let error = #expect(throws: (any Error).self) { try Command.parseAsRoot(words) }
        #expect(Command.refusal(of: words, Command.message(for: try #require(error))) == expected)
    }

    @Test func otherSentencesStay() {
        for sentence in ["", "a", "Unknown option '-x'", "The value 'a' is invalid for '--b <c>': it's not"] {
            #expect(Suggestion.keepingNear(sentence) == sentence)
        }
    }
}
