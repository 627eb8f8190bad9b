// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// `--net nat` and `swkvm network`, in network namespaces of the test's own, with networks of its own.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct NetworkVerbTests {
    private let directory: TemporaryDirectory
    private let host: Namespace
    private var home: String { directory("home") }

    init() throws {
        directory = try TemporaryDirectory()
        // dnsmasq's user reads below it.
        try shell("chmod 755 '\(directory.path)'; mkdir -m 755 '\(directory("home"))'")
        host = try Namespace()
    }

    private func program(
        _ arguments: [String], input: Program.Stream = .null, in namespace: Namespace? = nil
    ) throws -> Program {
        try Program(
            ["env", "SWKVM_HOME=\(home)", "HOME=\(directory.path)", Host.swkvm] + arguments, input: input,
            in: namespace ?? host)
    }

    /// Runs a verb to its end.
    @discardableResult private func swkvm(
        _ arguments: String..., status: Int32 = 0, sourceLocation: SourceLocation = #_sourceLocation
    ) throws -> Program {
        let program = try program(arguments)
        #expect(try program.waitForEnd() == .status(status), "\(program.story)", sourceLocation: sourceLocation)
        return program
    }

    private func machine(_ words: [String]) throws -> Program {
        let machine = try program(["run", "--mem", "64M"] + words, input: .pipe)
        try machine.wait(for: Program.prompt)
        return machine
    }

    private func end(_ machine: Program) throws {
        try machine.powerOff()
    }

    /// The lines of `network list` without their head, each with single spaces.
    private var states: [String] {
        get throws {
            try swkvm("network", "list").output.lines.dropFirst().map {
                $0.split(separator: " ").joined(separator: " ")
            }
        }
    }

    /// Nothing of a network is left on the host.
    private func isClean() throws -> Bool {
        let processes = try shell("pgrep -a dnsmasq | grep -F '\(home)' || true")
        let names = try host.linkNames()
        return try names.filter { $0.hasPrefix("sw") } == [] && host.shell("nft list tables").isEmpty
            && processes.isEmpty && shell("ls -A '\(home)/network-run'").isEmpty
    }

    private func pid(_ name: String = "default") throws -> pid_t {
        try #require(pid_t(try shell("cat '\(home)/network-run/\(name)/pid'").filter(\.isNumber)))
    }

    private var forwarding: String {
        get throws { try host.shell("cat /proc/sys/net/ipv4/ip_forward").filter(\.isNumber) }
    }

    /// A guest gets an address, and reaches a host that knows no route to it.
    @Test func aGuestReachesWhatIsBehindTheHost() throws {
        let other = try Namespace()
        try host.shell(
            """
            ip link add up0 type veth peer name up1
            ip link set up0 up; ip addr add 203.0.113.1/24 dev up0
            """)
        try move("up1", to: other)
        try other.shell("ip link set up1 up; ip addr add 203.0.113.9/24 dev up1")
        #expect(try forwarding == "0")
        let machine = try machine(["--name", "web", "--net", "nat"])
        #expect(
            machine.errors.lines == [
                "swkvm: notice: net0: the network default is up: bridge swkvm0, address 10.213.0.1, guests in 10.213.0.0/24",
                "swkvm: notice: net0: IPv4 forwarding of the host was switched on",
            ], "\(machine.story)")
        #expect(try machine.ask("net eth0 dhcp").first?.contains("gateway 10.213.0.1") == true, "\(machine.story)")
        #expect(try machine.ask("ping 203.0.113.9 2").last?.hasPrefix("2 of 2 came back") == true, "\(machine.story)")
        #expect(try forwarding == "1")
        let leases = try swkvm("network", "leases").output.lines
        #expect(leases.count == 2 && leases[1].hasPrefix("10.213.0.") && leases[1].hasSuffix(" web"), "\(leases)")
        // Nobody outside reaches a guest by itself.
        let address = String(try #require(leases[1].split(separator: " ").first))
        try other.shell("ip route add 10.213.0.0/24 via 203.0.113.1; ! ping -c 1 -W 1 \(address) >/dev/null")
        #expect(try swkvm("network", "stop", status: 1).errors.text.contains("is in use (swtap0)"))
        try end(machine)
        #expect(try eventually { try isClean() })
        // The other end of a veth pair is a reason to forward.
        #expect(try forwarding == "1")
    }

    private func move(_ link: String, to other: Namespace) throws {
        let holder = try Program(["sleep", "1000"], in: other)
        defer { holder.send(signal: SIGKILL) }
        try host.shell("ip link set \(link) netns \(holder.pid)")
    }

    /// The network's own name server is for its guests, not for whoever has a route to the bridge's address.
    @Test func neighboursOfTheHostAreNotServed() throws {
        let neighbour = try Namespace(), guest = try Namespace()
        try swkvm("network", "start")
        try host.shell(
            """
            ip link add up0 type veth peer name up1
            ip link set up0 up; ip addr add 203.0.113.1/24 dev up0
            ip link add port0 type veth peer name port1
            ip link set port0 master swkvm0; ip link set port0 up
            """)
        try move("up1", to: neighbour)
        try move("port1", to: guest)
        try neighbour.shell(
            "ip link set up1 up; ip addr add 203.0.113.9/24 dev up1; ip route add 10.213.0.0/24 via 203.0.113.1")
        try guest.shell("ip link set port1 up; ip addr add 10.213.0.99/24 dev port1")
        // A question for the address of `host` (RFC 1035, section 4).
        let ask = """
            exec 3<>/dev/udp/10.213.0.1/53
            printf '\\x12\\x34\\x01\\0\\0\\x01\\0\\0\\0\\0\\0\\0\\x04host\\0\\0\\x01\\0\\x01' >&3
            timeout 2 head -c 4 <&3 | od -An -tx1
            """
        try directory.write(Array(ask.utf8), to: "ask")
        #expect(try eventually { try guest.shell("bash '\(directory("ask"))'").hasPrefix(" 12 34") })
        #expect(try neighbour.shell("bash '\(directory("ask"))'") == "")
        try host.shell("ip link del port0")
        try swkvm("network", "stop")
        #expect(try eventually { try isClean() })
    }

    /// The host does not take addresses and routes from its guests.
    @Test func guestsAreNoRoutersOfTheHost() throws {
        func setting(_ name: String) throws -> String {
            try host.shell("cat /proc/sys/net/ipv6/conf/\(name)").filter(\.isNumber)
        }
        guard fileStatus(ofPath: "/proc/sys/net/ipv6") != nil else { return }
        try swkvm("network", "start")
        #expect(try setting("swkvm0/disable_ipv6") == "1")
        #expect(try host.shell("ip -6 addr show dev swkvm0") == "")
        try swkvm("network", "stop")
        let alone = try machine(["--net", "tap=alone0"])
        #expect(try setting("alone0/accept_ra") == "0" && setting("alone0/disable_ipv6") == "0")
        try end(alone)
        let bridged = try machine(["--net", "tap=port0,bridge=br0,create"])
        #expect(try setting("br0/accept_ra") == "0")
        try end(bridged)
    }

    /// Switching forwarding on and off changes other settings, in the kernel.
    @Test func forwardingGoesBackToWhatItWas() throws {
        let settings = "cat /proc/sys/net/ipv4/conf/all/accept_redirects /proc/sys/net/ipv4/conf/lo/forwarding"
        try host.shell(
            "echo 0 >/proc/sys/net/ipv4/conf/all/accept_redirects; echo 1 >/proc/sys/net/ipv4/conf/lo/forwarding")
        try swkvm("network", "start")
        #expect(try forwarding == "1")
        try swkvm("network", "stop")
        #expect(try eventually { try isClean() })
        #expect(try forwarding == "0")
        #expect(try host.shell(settings) == "0\n1\n")
    }

    /// What killed processes have left at other moments.
    @Test func otherRestsOfKilledProcesses() throws {
        // Before the first change.
        _ = try shell("mkdir -p '\(home)/network-run/default/hosts'; touch '\(home)/network-run/default/kept'")
        #expect(try states == ["default down swkvm0 - -"])
        #expect(try isClean())
        // Between creating the bridge and marking it.
        try swkvm("network", "start")
        kill(try pid(), SIGKILL)
        try host.shell("ip link set swkvm0 alias ''")
        #expect(try eventually { try states == ["default up, kept swkvm0 10.213.0.0/24 0"] })
        // In another network namespace nothing of it can be repaired.
        kill(try pid(), SIGKILL)
        let other = try Namespace()
        #expect(
            try eventually {
                let verb = try program(["network", "list"], in: other)
                try verb.waitForEnd()
                return verb.errors.text.contains("was killed in another network namespace")
            })
        let start = try program(["network", "start"], in: other)
        #expect(try start.waitForEnd() == .status(1))
        // With another bridge in its definition by now.
        _ = try shell("mkdir -p '\(home)/networks'; echo 'bridge = \"br7\"' >'\(home)/networks/default.toml'")
        #expect(try states == ["default up, kept swkvm0 10.213.0.0/24 0"])
        #expect(try host.linkNames().contains("swkvm0") && !host.linkNames().contains("br7"))
        try swkvm("network", "stop")
        #expect(try eventually { try isClean() })
        #expect(try shell("stat -c %a '\(home)/network-run.lock'") == "600\n")
    }

    @Test func aNameThatMeansSomethingToDnsmasq() throws {
        let machine = try machine(["--name", "ignore", "--net", "nat"])
        #expect(machine.errors.text.contains("the guest of ignore has no name in its network"), "\(machine.story)")
        #expect(try machine.ask("net eth0 dhcp").first?.contains("gateway 10.213.0.1") == true, "\(machine.story)")
        try end(machine)
        #expect(try eventually { try isClean() })
    }

    @Test func theLastMachineTakesItDown() throws {
        let first = try machine(["--name", "one", "--net", "nat"]),
            second = try machine(["--name", "two", "--net", "nat"])
        #expect(second.errors.lines == [], "\(second.story)")
        #expect(try states == ["default up swkvm0 10.213.0.0/24 2"])
        try end(first)
        #expect(try eventually { try states == ["default up swkvm0 10.213.0.0/24 1"] })
        second.send(signal: SIGKILL)
        try second.waitForEnd()
        #expect(try eventually { try isClean() })
        #expect(try states == ["default down swkvm0 - -"])
        #expect(try forwarding == "0")
    }

    @Test func aNetworkThatIsKept() throws {
        try swkvm("network", "define", "lab", "--subnet", "10.20.30.0/28")
        #expect(
            try swkvm("network", "define", "lab", status: 64).errors.text.contains("there is a network lab already"))
        let start = try swkvm("network", "start", "lab").output.text
        #expect(start.hasPrefix("the network lab is up: bridge swkvm1, address 10.20.30.1, guests in 10.20.30.0/28"))
        let machine = try machine(["--name", "web", "--net", "nat=lab"])
        #expect(try machine.ask("net eth0 dhcp").first?.contains("gateway 10.20.30.1") == true, "\(machine.story)")
        try end(machine)
        #expect(try eventually { try states.last == "lab up, kept swkvm1 10.20.30.0/28 0" })
        #expect(try swkvm("network", "delete", "lab", status: 1).errors.text.contains("the network lab is up"))
        try swkvm("network", "stop", "lab")
        #expect(try isClean())
        #expect(try swkvm("network", "stop", "lab", status: 1).errors.text.contains("the network lab is not up"))
        try swkvm("network", "delete", "lab")
        #expect(try states == ["default down swkvm0 - -"])
    }

    /// The lock tells the true state, and the next verb repairs what a killed process has left.
    @Test func aKilledProcessOfANetwork() throws {
        let machine = try machine(["--name", "web", "--net", "nat"])
        let before = try machine.ask("net eth0 dhcp")
        let killed = try pid()
        kill(killed, SIGKILL)
        #expect(
            try eventually {
                try shell("cat /proc/\(killed)/stat 2>/dev/null || true").split(separator: " ").dropFirst(2).first
                    ?? "Z" == "Z"
            })
        let list = try swkvm("network", "list")
        #expect(list.errors.text.contains("repaired the network default, whose process was killed"), "\(list.story)")
        #expect(try states == ["default up swkvm0 10.213.0.0/24 1"])
        #expect(try pid() != killed)
        // Its server serves, and knows the lease.
        #expect(try machine.ask("net eth0 dhcp").first == before.first, "\(machine.story)")
        kill(try pid(), SIGKILL)
        try end(machine)
        #expect(try eventually { try isClean() || swkvm("network", "list").errors.text.contains("removed what") })
        #expect(try isClean() && forwarding == "0")
    }

    /// A repair that fails does not cut off the machines.
    @Test func aRepairThatFails() throws {
        let machine = try machine(["--name", "web", "--net", "nat"])
        _ = try machine.ask("net eth0 dhcp")
        let killed = try pid()
        kill(killed, SIGKILL)
        #expect(try eventually { try !shell("cat /proc/\(killed)/cmdline 2>/dev/null || true").contains("keep") })
        let list = try Program(
            withoutNATPrograms + ["env", "SWKVM_HOME=\(home)", Host.swkvm, "network", "list"], in: host)
        #expect(try list.waitForEnd() == .status(0), "\(list.story)")
        #expect(
            list.errors.lines == [
                "swkvm: the network default could not be repaired: nft is not installed, which --net nat needs: apt install nftables"
            ], "\(list.story)")
        #expect(try machine.ask("ping 10.213.0.1 1").last?.hasPrefix("1 of 1 came back") == true, "\(machine.story)")
        #expect(try swkvm("network", "list").errors.text.contains("repaired the network default"))
        #expect(try states == ["default up swkvm0 10.213.0.0/24 1"])
        try end(machine)
        #expect(try eventually { try isClean() })
    }

    /// Of starts at once, one brings the network up and the others use it.
    @Test func startsAtOnce() throws {
        let machines = try (0..<3).map {
            try program(["run", "--mem", "64M", "--name", "m\($0)", "--net", "nat"], input: .pipe)
        }
        for machine in machines { try machine.wait(for: Program.prompt) }
        #expect(machines.filter { $0.errors.text.contains("the network default is up") }.count == 1)
        #expect(try states == ["default up swkvm0 10.213.0.0/24 3"])
        for machine in machines { machine.send(signal: SIGKILL) }
        for machine in machines { try machine.waitForEnd() }
        #expect(try eventually { try isClean() })
    }

    @Test func theAddressOfAMachine() throws {
        try swkvm("create", "web", "--mem", "64M", "--net", "nat")
        #expect(try swkvm("ip", "web", status: 1).errors.text.contains("web is not running"))
        try swkvm("start", "web")
        defer { _ = try? program(["stop", "--force", "web"]).waitForEnd() }
        #expect(try swkvm("ip", "web", status: 1).errors.text.contains("web has no address yet"))
        #expect(try swkvm("ssh", "web", status: 1).errors.text.contains("web has no address yet"))
        let console = try program(["console", "web"], input: .pipe)
        try console.wait(for: Program.prompt)
        #expect(try console.ask("net eth0 dhcp").first?.contains("gateway 10.213.0.1") == true, "\(console.story)")
        let address = try swkvm("ip", "web").output.text.filter { $0 != "\n" }
        #expect(address.hasPrefix("10.213.0."))
        #expect(try swkvm("list").output.text.contains(" \(address) "))
        #expect(try swkvm("info", "web").output.text.contains("address:      \(address)\n"))
        #expect(try swkvm("list", "--json").output.text.contains("\"\(address)\""))
        // The guest has sent no name: it has its machine's.
        #expect(try swkvm("ip", "--json", "web").output.text.contains("\"host\": \"web\""))
        try swkvm("stop", "--force", "web")
        #expect(try eventually { try isClean() })
        // The same address at the next start.
        try swkvm("start", "web")
        #expect(try swkvm("ip", "web").output.text == address + "\n")
        try swkvm("delete", "--force", "web")
        #expect(try eventually { try isClean() })
    }

    /// As Docker has it, for example.
    @Test func aFirewallThatDropsIsReported() throws {
        try host.shell(
            "nft 'add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }'"
        )
        let lines = try swkvm("network", "start").output.lines
        #expect(
            lines.contains(
                "the firewall of this host drops what is forwarded by default (chain FORWARD of table ip filter): accept packets from and to swkvm0 there, or guests reach the host only"
            ), "\(lines)")
        try swkvm("network", "stop")
        #expect(try host.shell("nft list tables") == "table ip filter\n")
    }

    @Test func whatPreventsANetwork() throws {
        func refused(_ words: [String], _ sentence: String) throws {
            let program = try Program(["env", "SWKVM_HOME=\(home)"] + words, in: host)
            #expect(try program.waitForEnd() == .status(1), "\(program.story)")
            #expect(program.errors.lines == ["swkvm: \(sentence)"], "\(program.story)")
        }
        let start = [Host.swkvm, "network", "start"]
        for (name, package) in [("dnsmasq", "dnsmasq-base"), ("nft", "nftables")] {
            try refused(
                ["unshare", "-m", "sh", "-euc", "mount --bind /dev/null \"$(command -v \(name))\"; exec \"$@\"", "sh"]
                    + start,
                "\(name) is not installed, which --net nat needs: apt install \(package)")
        }
        try host.shell("ip link add swkvm0 type bridge")
        try refused(
            start,
            "the interface swkvm0 is there and does not belong to the network default: remove it with `ip link del swkvm0`, or define a network with another --bridge"
        )
        try host.shell("ip link del swkvm0; ip link add br7 type bridge; ip addr add 10.20.30.77/32 dev br7")
        try swkvm("network", "define", "lab", "--subnet", "10.20.30.0/24")
        try refused(
            start + ["lab"],
            "the addresses 10.20.30.0/24 of the network lab are in use: br7 has 10.20.30.77/32; choose others with `swkvm network delete lab` and `swkvm network define lab --subnet`"
        )
        try refused(
            ["setpriv", "--reuid=65534", "--clear-groups"] + start,
            "the network default needs root: run as root, or give --net user")
        // A server that the host has on all addresses.
        let server = try Program(
            ["dnsmasq", "-k", "-C", "/dev/null", "--user=root", "--pid-file=", "--port=53"], in: host)
        defer { server.send(signal: SIGKILL) }
        #expect(try eventually { try !host.shell("ss -Hltn sport = 53").isEmpty })
        try refused(
            start, "dnsmasq reports: failed to create listening socket for 10.213.0.1: Address already in use")
        #expect(try isClean() && forwarding == "0")
        // No room for the first file.
        let full = try Program(
            [
                "env", "SWKVM_HOME=\(home)/full", "unshare", "-m", "sh", "-euc",
                """
                mkdir "$SWKVM_HOME"; mount -t tmpfs -o size=64k,mode=755 t "$SWKVM_HOME"
                mkdir -p "$SWKVM_HOME/network-run/default"; head -c 70000 /dev/zero >"$SWKVM_HOME/fill" 2>/dev/null || true
                "$@" 2>&1 || true
                """, "sh",
            ] + [Host.swkvm, "run", "--mem", "64M", "--net", "nat"], in: host)
        _ = try full.waitForEnd()
        #expect(full.output.text.contains("No space left on device"), "\(full.story)")
        _ = try shell("echo 'bridge = broken' >'\(home)/networks/bad.toml'")
        let list = try swkvm("network", "list", status: 1)
        #expect(list.errors.text.contains("bad.toml is no definition of a network"), "\(list.story)")
        #expect(list.output.text.contains("default") && list.output.text.contains("lab"), "\(list.story)")
        #expect(try swkvm("network", "start", "nope", status: 64).errors.text.contains("there is no network nope"))
        #expect(
            try swkvm("network", "define", "x", "--subnet", "10.0.0.0/30", status: 64).errors.text.contains("8 to 29"))
    }

    @Test func aBridgeWithATAPOfItsOwn() throws {
        try host.shell("ip link add br0 type bridge; ip link set br0 up; ip addr add 192.0.2.1/24 dev br0")
        let machine = try machine(["--name", "web", "--net", "bridge=br0", "--cmdline", "ip=192.0.2.2/24"])
        try host.shell("ping -c 1 -W 5 192.0.2.2")
        #expect(try host.link("swtap0").master == host.link("br0").index)
        try end(machine)
        #expect(try eventually { try host.linkNames() == ["br0"] })
    }

    /// A macvtap is made on the interface of the host, and removed at the end, also after a kill.
    @Test(arguments: [false, true]) func aMacvtap(isKilled: Bool) throws {
        let other = try Namespace()
        try host.shell("ip link add up0 type veth peer name up1; ip link set up0 up")
        try move("up1", to: other)
        try other.shell("ip link set up1 up; ip addr add 192.0.2.1/24 dev up1")
        let machine = try machine(["--name", "web", "--net", "macvtap=up0", "--cmdline", "ip=192.0.2.2/24"])
        try other.shell("ping -c 1 -W 5 192.0.2.2")
        // The interface has the guest's address, which is the same at the next start.
        let address = try #require(try host.link("swmac0").address)
        #expect(try machine.ask("net").first?.contains("MAC \(address), link up") == true, "\(machine.story)")
        if isKilled {
            machine.send(signal: SIGKILL)
            try machine.waitForEnd()
        } else {
            try end(machine)
        }
        #expect(try eventually { try host.linkNames() == ["up0"] })
        let missing = try program(["run", "--net", "macvtap=nope"])
        #expect(try missing.waitForEnd() != .status(0))
        #expect(missing.errors.lines == ["swkvm: there is no interface nope: `ip link` lists those of this host"])
    }

    /// A TAP and its bridge in a namespace that has a name.
    @Test func aTAPInANamedNamespace() throws {
        let name = "swkvm-test-\(getpid())"
        try shell("ip netns add \(name)")
        defer { _ = try? shell("ip netns del \(name)") }
        try shell(
            "ip netns exec \(name) sh -euc 'ip link add br0 type bridge; ip link set br0 up; ip addr add 192.0.2.1/24 dev br0'"
        )
        let machine = try machine([
            "--name", "web", "--net", "tap=swtap9,bridge=br0,netns=\(name)", "--cmdline", "ip=192.0.2.2/24",
        ])
        try shell("ip netns exec \(name) ping -c 1 -W 5 192.0.2.2")
        #expect(try host.linkNames() == [])
        try end(machine)
        #expect(try eventually { try shell("ip -n \(name) -o link").contains("swtap9") == false })
        let missing = try program(["run", "--net", "tap=t,netns=swkvm-nope"])
        #expect(try missing.waitForEnd() != .status(0))
        #expect(
            missing.errors.lines == [
                "swkvm: there is no network namespace swkvm-nope: `ip netns` lists them, `ip netns add` makes one"
            ])
    }
}
