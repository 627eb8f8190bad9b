// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// An interactive shell in a terminal, with swkvm's completions and the test at the keys.
private final class CompletingShell {
    enum Kind: String, CaseIterable {
        case bash, zsh
        /// bash with Debian's bash-completion, which has functions and settings of its own.
        case bashCompletion

        var program: String { self == .zsh ? "zsh" : "bash" }
        static let framework = "/usr/share/bash-completion/bash_completion"

        var isInstalled: Bool {
            let paths = self == .bashCompletion ? [Self.framework] : ["/bin/\(rawValue)", "/usr/bin/\(rawValue)"]
            return paths.contains { access($0, R_OK) == 0 }
        }

        /// Puts all that could be completed onto the line.
        var allMatches: String { self == .zsh ? "\t\u{18}a" : "\u{1b}*" }
    }

    private let shell: Program
    private let kind: Kind

    init(_ kind: Kind, in directory: TemporaryDirectory) throws {
        self.kind = kind
        let script = directory("completions.\(kind.program)")
        try IntegrationTests.shell("'\(Host.swkvm)' --generate-completion-script \(kind.program) > '\(script)'")
        // A key shows the line between marks, which are not in the text that asks for that, and empties it.
        let setup =
            kind == .zsh
            ? """
            unsetopt zle_bracketed_paste; PS1='> '; autoload -Uz compinit; compinit -D -u; source '\(script)'
            dump() { print -r -- '@''@'"$BUFFER"'@''@' > /dev/tty; BUFFER=''; }; zle -N dump; bindkey -e; bindkey '^O' dump
            zstyle ':completion:all-matches::::' completer _all_matches
            zstyle ':completion:all-matches:*' old-matches only; zstyle ':completion:all-matches:*' insert true
            zle -C all-matches complete-word _generic; bindkey '^Xa' all-matches
            """
            : """
            bind 'set enable-bracketed-paste off'; PS1='> '; \(kind == .bashCompletion ? "source \(Kind.framework); " : "")source '\(script)'
            dump() { printf '@''@%s@''@\\n' "$READLINE_LINE" > /dev/tty; READLINE_LINE=; READLINE_POINT=0; }; bind -x '"\\C-o": dump'
            """
        try directory.write(Array(setup.utf8), to: "setup.\(kind)")
        let arguments = kind == .zsh ? ["zsh", "-f", "-i"] : ["bash", "--norc", "--noprofile", "-i"]
        let environment = ["TERM=dumb", "LC_ALL=C.UTF-8", "HOME=\(directory.path)", "HISTFILE=", "INPUTRC=/dev/null"]
        shell = try Program(["env", "-C", directory.path] + environment + arguments, terminal: PseudoTerminal())
        try shell.type("source '\(directory("setup.\(kind)"))'; echo 'rea''dy'\n")
        try shell.wait(for: "ready\r\n")
    }

    /// The command line after these keys.
    func line(after keys: String) throws -> String {
        let before = shell.output.position
        try shell.type(keys + "\u{0f}")
        try shell.wait(for: "@@")
        let start = shell.output.position
        // What a function complains of comes between.
        let shown = String(decoding: shell.output.bytes[before..<start], as: UTF8.self)
        #expect(!shown.contains("bash: ") && !shown.contains("command not found"), "\(shown)")
        try shell.wait(for: "@@")
        return String(decoding: shell.output.bytes[start..<shell.output.position - 2], as: UTF8.self)
    }

    /// What is offered for the last word: the words that came to the line.
    func offers(for text: String) throws -> [String] {
        let before = text.split(separator: " ", omittingEmptySubsequences: true).count - (text.hasSuffix(" ") ? 0 : 1)
        return try line(after: text + kind.allMatches).split(separator: " ").dropFirst(before).map(String.init).sorted()
    }
}

/// The shells' completions, by the keys that a user presses.
@Suite(.timed) struct CompletionTests {
    private let directory: TemporaryDirectory

    init() throws {
        directory = try TemporaryDirectory()
        try shell(
            "cd '\(directory.path)'; mkdir images keys; touch vmlinux initrd.img images/base.qcow2 images/data.raw keys/secret 'my disk.raw' x=y.raw y,comma.raw images/z,comma.raw"
        )
    }

    private static let tab = "\t"

    /// Every option and argument that has a path, in every spelling.
    @Test(arguments: CompletingShell.Kind.allCases) fileprivate func everyPathCompletesFiles(
        kind: CompletingShell.Kind
    ) throws {
        guard kind.isInstalled else { return print("not tried: \(kind) is not installed here") }
        let shell = try CompletingShell(kind, in: directory)
        let words = [
            "run", "run --kernel", "run --initrd", "run --disk", "run --console unix:", "run --console file:",
            "run --gdb unix:", "run --disk a.raw,key-file=",
            "run --disk a.raw,ro,data-file=", "image create", "image create --backing", "image create -b",
            "image create --key-file", "image create --data-file",
            "image info", "image info --data-file", "image check", "image convert", "image convert a.raw",
            "image convert --backing", "image convert -B",
            "image convert --key-file", "image convert --target-key-file", "image convert --data-file", "image compare",
            "image compare a.raw",
            "image compare --second-data-file", "image compare --second-key-file", "image map", "image resize",
            "image snapshot list", "image snapshot create",
            "image snapshot -l", "image snapshot -c name",
            "image snapshot -d name", "image snapshot apply", "image snapshot delete", "image commit",
            "image commit --backing-data-file",
            "image commit --key-file", "image rebase",
            "image rebase --backing", "image rebase --backing-key-file", "image bench", "image bench --key-file",
            "image bench --data-file",
        ]
        for word in words {
            let text = "swkvm " + word + (word.hasSuffix(":") || word.hasSuffix("=") ? "" : " ") + "images/ba"
            #expect(try shell.line(after: text + Self.tab) == text.dropLast(2) + "base.qcow2 ", "\(kind)")
        }
        for option in ["run --kernel", "image create --backing", "run --disk"] {
            #expect(
                try shell.line(after: "swkvm \(option)=images/ba" + Self.tab) == "swkvm \(option)=images/base.qcow2 ",
                "\(kind)")
        }
        #expect(try shell.line(after: "swkvm run --kernel ima" + Self.tab) == "swkvm run --kernel images/", "\(kind)")
        #expect(
            try shell.line(after: "swkvm run --kernel \(directory.path)/vm" + Self.tab)
                == "swkvm run --kernel \(directory.path)/vmlinux ", "\(kind)")
        #expect(
            try shell.line(after: "swkvm run --disk a.raw,backing-dir=ima" + Self.tab).hasPrefix(
                "swkvm run --disk a.raw,backing-dir=images"), "\(kind)")
    }

    @Test(arguments: CompletingShell.Kind.allCases) fileprivate func namesThatNeedQuotes(
        kind: CompletingShell.Kind
    ) throws {
        guard kind.isInstalled else { return print("not tried: \(kind) is not installed here") }
        let shell = try CompletingShell(kind, in: directory)
        #expect(try shell.line(after: "swkvm run --kernel my" + Self.tab) == #"swkvm run --kernel my\ disk.raw "#)
        #expect(try shell.line(after: "swkvm run --kernel=my" + Self.tab) == #"swkvm run --kernel=my\ disk.raw "#)
        #expect(try shell.line(after: #"swkvm run --disk my\ d"# + Self.tab) == #"swkvm run --disk my\ disk.raw "#)
        #expect(try shell.line(after: #"swkvm run --disk "my d"# + Self.tab) == #"swkvm run --disk "my disk.raw" "#)
        #expect(
            try shell.line(after: #"swkvm run --disk a.raw,key-file=my"# + Self.tab)
                == #"swkvm run --disk a.raw,key-file=my\ disk.raw "#)
        #expect(
            try shell.line(after: #"swkvm run --disk my\ disk.raw,fo"# + Self.tab)
                == #"swkvm run --disk my\ disk.raw,format="#)
        #expect(try shell.line(after: "swkvm image info x=" + Self.tab) == "swkvm image info x=y.raw ")
    }

    /// Options, commands, and the values that the help names; nothing that is refused afterwards.
    @Test(arguments: CompletingShell.Kind.allCases) fileprivate func wordsThatTheHelpNames(
        kind: CompletingShell.Kind
    ) throws {
        guard kind.isInstalled else { return print("not tried: \(kind) is not installed here") }
        let shell = try CompletingShell(kind, in: directory)
        let makeable = ["qcow2", "raw", "vdi", "vmdk"]
        let expected: [(String, [String])] = [
            ("swkvm run --console ", ["file:", "none", "pty", "stdio", "unix:"]),
            ("swkvm run --trace ", ["exits"]),
            ("swkvm run --uuid ", ["none"]),
            (
                "swkvm run --sandbox ",
                ["capabilities", "landlock", "namespaces", "off", "on", "report", "seccomp", "user"]
            ),
            ("swkvm create web --bus ", ["mmio", "pci"]),
            ("swkvm run --log-level ", ["critical", "debug", "error", "info", "notice", "trace", "warning"]),
            ("swkvm image create --format ", makeable), ("swkvm image convert -O ", makeable),
            ("swkvm image check --format ", ["qcow2"]),
            ("swkvm image create --preallocation ", ["falloc", "full", "metadata", "off"]),
            ("swkvm image check --repair ", ["all", "leaks"]),
            (
                "swkvm help ",
                [
                    "autostart", "clone", "console", "cp", "create", "define", "delete", "doctor", "dumpxml", "edit",
                    "image", "info", "ip", "list", "logs", "network", "rename", "resize", "restart", "run", "snapshot",
                    "ssh", "start", "stop",
                ]
            ),
            ("swkvm help image snapshot ", ["apply", "create", "delete", "list"]),
        ]
        for (text, words) in expected { #expect(try shell.offers(for: text) == words, "\(kind): \(text)") }
        let lines = [
            ("swkvm ru", "swkvm run "), ("swkvm image conv", "swkvm image convert "),
            ("swkvm run --ker", "swkvm run --kernel "), ("swkvm create web --ker", "swkvm create web --kernel "),
            ("swkvm create web --disk-s", "swkvm create web --disk-size "),
            ("swkvm create web --cop", "swkvm create web --copy "),
            ("swkvm help ru", "swkvm help run "), ("swkvm help image conv", "swkvm help image convert "),
            ("swkvm image snapshot ap", "swkvm image snapshot apply "),
            ("swkvm run --console=st", "swkvm run --console=stdio "),
            ("swkvm run --console un", "swkvm run --console unix:"),
            ("swkvm run --kernel bun", "swkvm run --kernel bundled "),
            ("swkvm run --kernel=vml", "swkvm run --kernel=vmlinux "),
            ("swkvm run --log-level=w", "swkvm run --log-level=warning "),
            ("swkvm run --hugepages --cp", "swkvm run --hugepages --cpus "),
            ("swkvm run --hugepages=th", "swkvm run --hugepages=thp "),
            ("swkvm run --kernel=vmlinux --init", "swkvm run --kernel=vmlinux --initrd "),
        ]
        // zsh puts an equals sign behind an option with a value, which goes when a blank is typed.
        for (text, line) in lines {
            let completed = try shell.line(after: text + Self.tab)
            #expect(completed == line || kind == .zsh && completed == line.dropLast() + "=", "\(kind)")
        }
        #expect(try !shell.offers(for: "swkvm image snapshot ").contains("by-option"))
        // What is refused beside the one is not offered beside it.
        for text in [
            "rebase --backing a.raw --no-b", "rebase --no-backing --backing-f", "create --iterations 1000 --iter-",
        ] {
            let line = "swkvm image " + text
            let completed = try shell.line(after: line + Self.tab)
            #expect(text.hasSuffix("-f") ? completed != line : completed == line, "\(kind): \(completed)")
        }
        #expect(
            try shell.line(after: "swkvm image rebase --no-b" + Self.tab) == "swkvm image rebase --no-backing ",
            "\(kind)")
    }

    @Test(arguments: CompletingShell.Kind.allCases) fileprivate func valuesWithSeveralParts(
        kind: CompletingShell.Kind
    ) throws {
        guard kind.isInstalled else { return print("not tried: \(kind) is not installed here") }
        let shell = try CompletingShell(kind, in: directory)
        let lines = [
            ("swkvm run --disk a.raw,for", "swkvm run --disk a.raw,format="),
            ("swkvm run --disk a.raw,format=q", "swkvm run --disk a.raw,format=qcow2 "),
            ("swkvm run --disk=a.raw,ro,cache=n", "swkvm run --disk=a.raw,ro,cache=none "),
            ("swkvm run --numa mem=1G,pol", "swkvm run --numa mem=1G,policy="),
            ("swkvm run --numa mem=1G,policy=i", "swkvm run --numa mem=1G,policy=interleave "),
            ("swkvm run --rng=max", "swkvm run --rng=max-bytes="),
            ("swkvm run --sandbox=rep", "swkvm run --sandbox=report "),
            ("swkvm run --sandbox on,nam", "swkvm run --sandbox on,namespaces "),
            ("swkvm run --sandbox off,nam", "swkvm run --sandbox off,nam"),
            ("swkvm run --console file:a,si", "swkvm run --console file:a,size="),
            ("swkvm run --console file:a,size=1M,k", "swkvm run --console file:a,size=1M,keep="),
            ("swkvm run --console stdio,s", "swkvm run --console stdio,s"),
            ("swkvm run --console unix:a,bps=1M,b", "swkvm run --console unix:a,bps=1M,bps-burst="),
            ("swkvm run images/base.qcow2,fo", "swkvm run images/base.qcow2,format="),
            ("swkvm run images/base.qcow2,format=q", "swkvm run images/base.qcow2,format=qcow2 "),
            // A comma in a path is written twice.
            ("swkvm run y", "swkvm run y,,comma.raw "),
            ("swkvm run --disk y", "swkvm run --disk y,,comma.raw "),
            ("swkvm run --disk=y,,c", "swkvm run --disk=y,,comma.raw "),
            ("swkvm run --disk images/z", "swkvm run --disk images/z,,comma.raw "),
            ("swkvm run --disk a.raw,key-file=y", "swkvm run --disk a.raw,key-file=y,,comma.raw "),
            ("swkvm run --disk a.raw,key-file=y,,co", "swkvm run --disk a.raw,key-file=y,,comma.raw "),
            ("swkvm run --disk y,,comma.raw,for", "swkvm run --disk y,,comma.raw,format="),
            ("swkvm run --console file:y", "swkvm run --console file:y,,comma.raw "),
            ("swkvm run --kernel y", "swkvm run --kernel y,comma.raw "),
            ("swkvm image create -o clu", "swkvm image create -o cluster_size="),
            ("swkvm image create -o compat=v3,laz", "swkvm image create -o compat=v3,lazy_refcounts="),
        ]
        for (text, line) in lines { #expect(try shell.line(after: text + Self.tab) == line, "\(kind): \(text)") }
        #expect(
            try shell.offers(for: "swkvm run --net ") == [
                "bridge=", "create", "fd=", "mac-lock=", "mac=", "macvtap=", "mtu=", "nat", "netns=", "none",
                "offload=", "publish=", "queues=", "rx-bps-burst=", "rx-bps=", "rx-pps-burst=", "rx-pps=", "stream=",
                "tap=", "tx-bps-burst=", "tx-bps=", "tx-pps-burst=", "tx-pps=", "user",
            ])
        // What does not go together is not offered together.
        #expect(try shell.line(after: "swkvm run --net fd=3,b" + Self.tab) == "swkvm run --net fd=3,b")
        #expect(try shell.line(after: "swkvm run --net user,publish=1:2,pu" + Self.tab).hasSuffix(",publish="))
        #expect(try shell.line(after: "swkvm run --net user,t" + Self.tab) == "swkvm run --net user,tx-")
        #expect(try shell.line(after: "swkvm run --net fd=3,o" + Self.tab) == "swkvm run --net fd=3,offload=")
        // Once is enough.
        #expect(
            try shell.line(after: "swkvm run --disk a.raw,ro,r" + Self.tab) == "swkvm run --disk a.raw,ro,reconnect=")
    }

    /// Nothing is left of a completion in the user's shell.
    @Test func bashStaysAsItWas() throws {
        let shell = try CompletingShell(.bash, in: directory)
        _ = try shell.line(after: "swkvm run --kernel vm\t")
        #expect(try shell.line(after: "trap -p RETURN >> traps; shopt -p extglob nullglob >> traps\n") == "")
        #expect(
            try String(decoding: readFile(directory("traps"), limit: 1000), as: UTF8.self)
                == "shopt -u extglob\nshopt -u nullglob\n")
    }
}
