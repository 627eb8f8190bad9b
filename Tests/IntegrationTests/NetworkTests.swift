// SPDX-License-Identifier: Apache-2.0

import Glibc
import HostNetwork
import Linux
import TestSupport
import Testing

/// The network: TAPs and bridges of the host, each test in a namespace of its own.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct NetworkTests {
    private let host: Namespace

    /// A namespace with a bridge `br0`, at which the host has the address 192.168.77.1.
    init() throws {
        host = try Namespace()
        try host.shell("ip link add br0 type bridge; ip addr add 192.168.77.1/24 dev br0; ip link set br0 up")
    }

    private func machine(_ net: String, address: Int, _ arguments: [String] = []) throws -> Program {
        try Program.machineAtPrompt(
            ["--net", net] + arguments, words: "ip=192.168.77.\(address)/24,192.168.77.1", in: host)
    }

    // MARK: Packets

    @Test func hostAndGuestReachEachOtherOverTheBridge() throws {
        let machine = try machine("tap=tap0,bridge=br0,mac=52:54:00:12:34:56", address: 2)
        #expect(try host.shell("ping -c 3 -i 0.2 -W 10 192.168.77.2").contains("3 received"))
        // In fragments, one frame exactly, and no payload at all.
        for size in [0, 1, 1472] {
            #expect(try host.shell("ping -c 1 -W 10 -s \(size) 192.168.77.2").contains("1 received"))
        }
        #expect(try host.shell("ip neigh show 192.168.77.2").contains("52:54:00:12:34:56"))
        #expect(try machine.ask("ping 192.168.77.1 3").last == "3 of 3 came back")
        #expect(try machine.ask("net").first?.contains("MAC 52:54:00:12:34:56, link up, MTU 1500") == true)
        try machine.powerOff()
    }

    @Test func withoutABridgeTheTAPIsTheLink() throws {
        let machine = try machine("tap=tap0", address: 2)
        try host.shell("ip addr del 192.168.77.1/24 dev br0; ip addr add 192.168.77.1/24 dev tap0")
        #expect(try host.shell("ping -c 2 -i 0.2 -W 10 192.168.77.2").contains("2 received"))
        try machine.powerOff()
        #expect(try host.linkNames() == ["br0"])
    }

    /// Echoed by the guest, all of them: nothing is lost or changed on the way.
    @Test func manyPacketsFromTheHost() throws {
        let machine = try machine("tap=tap0,bridge=br0", address: 2)
        #expect(try host.shell("ping -q -c 500 -i 0.002 -W 10 192.168.77.2").contains("500 received"))
        try machine.powerOff()
    }

    @Test func twoGuestsReachEachOtherOverOneBridge() throws {
        let first = try machine("tap=tap0,bridge=br0", address: 2, ["--name", "first"])
        let second = try machine("tap=tap1,bridge=br0", address: 3, ["--name", "second"])
        #expect(try first.ask("ping 192.168.77.3 5").last == "5 of 5 came back")
        #expect(try second.ask("ping 192.168.77.2 5").last == "5 of 5 came back")
        try first.powerOff()
        #expect(try second.ask("ping 192.168.77.2 1").last == "0 of 1 came back")
        try second.powerOff()
    }

    /// Their addresses come from their TAPs.
    @Test func twoMachinesWithoutANameOnOneBridge() throws {
        let machines = try (0...1).map { try machine("tap=tap\($0),bridge=br0", address: 2 + $0) }
        let addresses = try machines.map { machine in
            try #require(try machine.ask("net").first).split(separator: " ").drop { $0 != "MAC" }.dropFirst().first
        }
        #expect(addresses[0] != nil && addresses[0] != addresses[1])
        #expect(try machines[0].ask("ping 192.168.77.3 3").last == "3 of 3 came back")
        #expect(try machines[1].ask("ping 192.168.77.2 3").last == "3 of 3 came back")
        for machine in machines { try machine.powerOff() }
        // The same TAP has the same one at the next start.
        let again = try machine("tap=tap1,bridge=br0", address: 2)
        #expect(try again.ask("net").first?.contains(try #require(addresses[1])) == true)
        try again.powerOff()
    }

    @Test func theGuestsOwnNetworkTests() throws {
        let peer = try machine("tap=tap0,bridge=br0", address: 2, ["--name", "peer"])
        let machine = try Program.machine(
            ["--net", "tap=tap1,bridge=br0", "--cmdline", "test=net,hostile ip=192.168.77.3/24 peer=192.168.77.2"],
            in: host)
        try machine.expectSelfTestsPassed()
        // Whatever the other has done, this one still works.
        #expect(try peer.ask("ping 192.168.77.1 1").last == "1 of 1 came back")
        try peer.powerOff()
    }

    /// The guest uses two of three pairs, and sends by both in turn; the TAP is an administrator's, or ours.
    @Test(arguments: ["mmio", "pci"], [false, true]) func severalQueues(bus: String, isFound: Bool) throws {
        if isFound { try host.shell("ip tuntap add dev tap1 mode tap multi_queue") }
        let peer = try machine("tap=tap0,bridge=br0", address: 2, ["--name", "peer"])
        let machine = try Program.machine(
            [
                "--net", "tap=tap1,bridge=br0,queues=3", "--bus", bus, "--cmdline",
                "test=net,hostile ip=192.168.77.3/24 peer=192.168.77.2",
            ], in: host)
        try machine.expectSelfTestsPassed()
        try peer.powerOff()
        #expect(try host.linkNames() == (isFound ? ["br0", "tap1"] : ["br0"]))
    }

    @Test func severalQueuesNeedATAPThatHasThem() throws {
        try host.shell("ip tuntap add dev tap1 mode tap")
        let machine = try Program.machine(["--net", "tap=tap1,queues=2"], in: host)
        try machine.waitForError("ip tuntap add dev tap1 mode tap multi_queue")
        #expect(try machine.waitForEnd() != .status(0))
    }

    @Test func severalInterfaces() throws {
        try host.shell("ip link add br1 type bridge; ip addr add 192.168.78.1/24 dev br1; ip link set br1 up")
        let machine = try Program.machineAtPrompt(
            ["--net", "tap=tap0,bridge=br0", "--net", "tap=tap1,bridge=br1"],
            words: "ip=192.168.77.2/24 ip=192.168.78.2/24", in: host)
        for network in [77, 78] {
            #expect(try host.shell("ping -c 1 -W 10 192.168.\(network).2").contains("1 received"))
        }
        try machine.powerOff()
        #expect(try host.linkNames() == ["br0", "br1"])
    }

    @Test func theMACAddressStaysTheSameFromRunToRun() throws {
        func address(name: String, tap: String) throws -> String {
            let machine = try machine("tap=\(tap)", address: 2, ["--name", name])
            defer { try? machine.powerOff() }
            let line = try #require(try machine.ask("net").first)
            return try #require(
                line.split(separator: " ").first { $0.count == 18 && $0.hasSuffix(",") }.map(String.init))
        }
        let first = try address(name: "one", tap: "tap0")
        #expect(try address(name: "one", tap: "tap0") == first)
        #expect(try address(name: "one", tap: "tap1") != first)
        #expect(try address(name: "two", tap: "tap0") != first)
    }

    @Test func theMTUIsTheGuestsToo() throws {
        let machine = try machine("tap=tap0,mtu=1280", address: 2)
        #expect(try host.link("tap0").mtu == 1280)
        #expect(try machine.ask("net").first?.contains("MTU 1280") == true)
        try machine.powerOff()
    }

    @Test func aDescriptorFromTheStarter() throws {
        let tap = try host.run { Holder(try TAPDevice.create(InterfaceName("given0"))) }
        try host.shell("ip link set given0 master br0 up")
        let machine = try Program.machineAtPrompt(
            ["--net", "fd=7,mac=52:54:00:00:00:07"], words: "ip=192.168.77.2/24", in: host,
            passing: [(tap.value.descriptor, 7)])
        #expect(try host.shell("ping -c 2 -i 0.2 -W 10 192.168.77.2").contains("2 received"))
        try machine.powerOff()
        // It is the starter's.
        #expect(try host.linkNames() == ["br0", "given0"])
    }

    @Test func theTAPIsTheGuestsCable() throws {
        let machine = try machine("tap=tap0,bridge=br0", address: 2)
        func link(is state: String) throws -> Bool { try machine.ask("net").first?.contains(" link \(state),") == true }
        #expect(try link(is: "up"))
        for command in ["down", "carrier off"] {
            try host.shell("ip link set tap0 \(command)")
            #expect(try eventually { try link(is: "down") }, "\(command)")
            if command == "down" {
                try machine.waitForError("warning: net0: the link is down: tap0 is down, or has no carrier")
            }
            try host.shell("ip link set tap0 \(command == "down" ? "up" : "carrier on")")
            #expect(try eventually { try link(is: "up") }, "\(command)")
            if command == "down" { try machine.waitForError("notice: net0: the link is up again: tap0 is up") }
            #expect(try host.shell("ping -c 1 -W 10 192.168.77.2").contains("1 received"))
        }
        try machine.powerOff()
    }

    // MARK: What is left

    /// It was down before.
    @Test func aTAPThatIsSetDownAgainAtTheEndIsNoLostLink() throws {
        try host.shell("ip tuntap add tap0 mode tap")
        let machine = try machine("tap=tap0", address: 2)
        #expect(try host.link("tap0").isUp)
        try machine.powerOff()
        #expect(try eventually { try !host.link("tap0").isUp })
        #expect(!machine.errors.text.contains("link is down"), "\(machine.errors.text)")
    }

    @Test func aCreatedTAPIsGoneAtTheEnd() throws {
        let machine = try machine("tap=tap0,bridge=br0", address: 2)
        let link = try host.link("tap0")
        #expect(link.tun?.isTAP == true && link.tun?.isPersistent == false && link.isUp)
        #expect(link.master == (try host.link("br0").index))
        try machine.powerOff()
        #expect(try eventually { try host.linkNames() == ["br0"] })
    }

    @Test(arguments: ["poweroff", "kill", "panic"]) func aFoundTAPIsLeftAsItWas(end: String) throws {
        try host.shell("ip tuntap add tap0 mode tap vnet_hdr; ip link set tap0 mtu 1400")
        let before = try look()
        let machine = try machine("tap=tap0,bridge=br0,mtu=1300", address: 2)
        #expect(try host.link("tap0").isUp)
        if end == "kill" { machine.send(signal: SIGKILL) } else { try machine.type(end + "\n") }
        try machine.waitForEnd()
        #expect(try eventually { try look() == before })
    }

    /// What can be set of the TAP.
    private func look() throws -> String {
        let link = try host.link("tap0")
        return
            "\(link.index) mtu \(link.mtu) up \(link.isUp) master \(link.master) \(link.alias) \(String(describing: link.tun))"
    }

    @Test func killLeavesNoTAP() throws {
        let terminal = try PseudoTerminal()
        let machine = try Program.machineAtPrompt(["--net", "tap=tap0,bridge=br0"], in: host, terminal: terminal)
        machine.send(signal: SIGKILL)
        #expect(try machine.waitForExit() == .signal(SIGKILL))
        #expect(try eventually { try host.linkNames() == ["br0"] })
    }

    @Test func aCreatedBridgeGoesWithItsLastMachine() throws {
        let first = try machine("tap=tap0,bridge=new0,create", address: 2, ["--name", "first"])
        let second = try machine("tap=tap1,bridge=new0,create", address: 3, ["--name", "second"])
        #expect(try first.ask("ping 192.168.77.3 2").last == "2 of 2 came back")
        try first.powerOff()
        #expect(try eventually { try host.linkNames() == ["br0", "new0", "tap1"] })
        try second.powerOff()
        #expect(try eventually { try host.linkNames() == ["br0"] })
    }

    @Test func aFoundBridgeStaysThoughCreateWasGiven() throws {
        try machine("tap=tap0,bridge=br0,create", address: 2).powerOff()
        #expect(try eventually { try host.linkNames() == ["br0"] })
    }

    @Test func aTAPIsOneMachines() throws {
        let first = try machine("tap=tap0,bridge=br0", address: 2)
        let second = try Program.machine(["--net", "tap=tap0,bridge=br0"], in: host)
        try second.expectEnd(71)
        #expect(
            second.errors.text == "swkvm: the TAP tap0 is in use by another process: end that one or name another TAP\n"
        )
        #expect(try first.ask("ping 192.168.77.1 1").last == "1 of 1 came back")
        try first.powerOff()
    }
}
