// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import Devices
import GuestMemory
import Machine
import TestSupport
import Testing

@testable import swkvm

@Suite(.timed) struct UUIDArgumentTests {
    @Test func aUUIDOrNone() throws {
        let text = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
        #expect(try UUIDArgument(parsing: text).uuid?.description == text)
        #expect(try UUIDArgument(parsing: "none").uuid == nil)
    }

    @Test(arguments: ["", "None", "6ba7b810", "6ba7b810-9dad-11d1-80b4-00c04fd430cx"])
    func mistakes(argument: String) {
        let error = #expect(throws: ArgumentProblem.self) { try UUIDArgument(parsing: argument) }
        #expect(error?.description.hasPrefix("'\(argument)' is not a UUID; expected none or a UUID such as") == true)
    }

    /// On one host the same at every start; machines without a name share none.
    @Test func aNameThatIsGivenHasOne() throws {
        func uuid(_ arguments: String...) throws -> String? {
            let command = try #require(try Command.parseAsRoot(["run"] + arguments) as? RunCommand)
            return command.configuration.uuid?.description
        }
        let given = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
        #expect(try uuid() == nil && uuid("--net", "tap=tap0") == nil)
        #expect(try uuid("--name", "web") == HostIdentity().uuid(ofMachine: "web").description)
        #expect(try uuid("--name", "web") == uuid("--name", "web", "--cpus", "2"))
        #expect(try uuid("--name", "web", "--uuid", given) == given)
        #expect(try uuid("--uuid", given) == given)
        #expect(try uuid("--name", "web", "--uuid", "none") == nil)
    }
}

@Suite(.timed) struct EntropyArgumentTests {
    private func entropy(_ arguments: String...) throws -> Configuration.Entropy? {
        try #require(try Command.parseAsRoot(["run"] + arguments) as? RunCommand).configuration.entropy
    }

    @Test func withAndWithoutALimit() throws {
        #expect(try entropy() == nil)
        #expect(try entropy("--rng") == Configuration.Entropy())
        // The word after it is its own, not the option's.
        #expect(try entropy("--rng", "--cpus", "2") == Configuration.Entropy())
        #expect(
            try entropy("--rng=max-bytes=64K,period=100")
                == Configuration.Entropy(limit: .init(bytes: 65536, period: 100)))
        #expect(
            try entropy("--rng", "max-bytes=1", "--cpus", "2")
                == Configuration.Entropy(limit: .init(bytes: 1, period: 1000)))
    }

    @Test(arguments: [
        ("period=5", "period= requires max-bytes="), ("max-bytes=0", "max-bytes=0 is not a number of bytes"),
        ("max-bytes=x", "max-bytes=x is not a number"),
        ("max-bytes=1,period=0", "period=0 is not a valid period; expected 1 to 60000"),
        ("max-bytes=1,period=60001", "period=60001 is not a valid period"),
        ("max-bytes", "'max-bytes' is not recognized"),
        ("source=/dev/random", "'source=/dev/random' is not recognized; expected max-bytes= or period="),
    ])
    func mistakes(argument: String, sentence: String) {
        let error = #expect(throws: (any Error).self) {
            try Command.parseAsRoot(["run", "--rng=\(argument)", "--cpus", "2"])
        }
        #expect(error.map { Command.message(for: $0) }?.contains(sentence) == true, "\(String(describing: error))")
        #expect(error.map { Command.exitCode(for: $0) } == .validationFailure)
    }
}

@Suite(.timed) struct BalloonArgumentTests {
    private func balloon(_ arguments: String...) throws -> BalloonSettings? {
        try #require(try Command.parseAsRoot(["run"] + arguments) as? RunCommand).configuration.balloon
    }

    @Test func aSizeAndWhatTheDeviceOffers() throws {
        #expect(try balloon() == nil)
        #expect(try balloon("--balloon", "0") == BalloonSettings())
        #expect(try balloon("--balloon", "128M") == BalloonSettings(target: 128 << 20))
        #expect(
            try balloon("--balloon", "deflate-on-oom=on,stats=5,reporting=on,hinting=on,target=1M")
                == BalloonSettings(
                    target: 1 << 20, deflatesOnOOM: true, statisticsInterval: 5, reportsFreePages: true,
                    hintsFreePages: true))
        #expect(try balloon("--balloon", "1M,reporting=off") == BalloonSettings(target: 1 << 20))
        #expect(try balloon("--hugepages", "--mem", "1G", "--balloon", "1G") == BalloonSettings(target: 1 << 30))
    }

    @Test(arguments: [
        ("2G", "a balloon of 2 GiB exceeds the guest's 512 MiB of memory"),
        ("4097K", "is not a multiple of 4 KiB; the next one is 4198400"),
        ("512", "did you mean 512M?"), ("x", "'x' is not recognized; expected target="),
        ("1M,2M", "'2M' is not recognized"), ("stats=86401", "stats=86401 is not valid; expected 1 to 86400"),
        ("reporting", "reporting is not recognized; expected reporting=on or reporting=off"),
        ("1M,target=2M", "the size is given twice"),
    ])
    func mistakes(argument: String, sentence: String) {
        let error = #expect(throws: (any Error).self) { try balloon("--balloon", argument) }
        #expect(error.map { Command.message(for: $0) }?.contains(sentence) == true, "\(String(describing: error))")
    }

    @Test func freePagesAreNotThoseOfAPool() {
        let error = #expect(throws: (any Error).self) {
            try balloon("--hugepages", "2M", "--balloon", "reporting=on")
        }
        #expect(error.map { Command.message(for: $0) }?.contains("cannot be combined with huge pages") == true)
    }
}

@Suite(.timed) struct NodeArgumentTests {
    private func node(_ argument: String) throws -> Configuration.Node { try NodeArgument(parsing: argument).node }

    @Test func memoryAlone() throws { #expect(try node("mem=1G") == Configuration.Node(cpus: [], memory: 1 << 30)) }

    @Test func everything() throws {
        #expect(
            try node("cpus=0-2,cpus=7,mem=1G,host=1,host=3-4,policy=interleave,distance=1:15,distance=2:40")
                == Configuration.Node(
                    cpus: [0, 1, 2, 7], memory: 1 << 30, policy: MemoryPolicy(.interleave, hostNodes: [1, 3, 4]),
                    distances: [1: 15, 2: 40]))
        // Who names a node means it.
        #expect(try node("mem=4K,host=0").policy == MemoryPolicy(.bind, hostNodes: [0]))
        #expect(try node("mem=4K,host=2,policy=preferred").policy == MemoryPolicy(.preferred, hostNodes: [2]))
    }

    @Test func theOptionIsGivenForEachNode() throws {
        let command = try #require(
            try Command.parseAsRoot([
                "run", "--cpus", "2", "--mem", "96M", "--numa", "mem=64M,cpus=0", "--numa", "mem=32M,cpus=1",
            ]) as? RunCommand)
        #expect(
            command.configuration.nodes == [.init(cpus: [0], memory: 64 << 20), .init(cpus: [1], memory: 32 << 20)])
    }

    @Test(arguments: [
        ("cpus=0", "a NUMA node needs mem=SIZE"), ("mem=x", "mem=x: expected a size"),
        ("mem=1G,mem=2G", "'mem' is given twice"),
        ("mem=1G,cpus=", "'' does not list CPUs"), ("mem=1G,cpus=2-1", "'2-1' does not list CPUs"),
        ("mem=1G,cpus=0-", "'0-' does not list CPUs"),
        ("mem=1G,cpus=-1", "'-1' does not list CPUs"), ("mem=1G,cpus=0-99999999", "'0-99999999' does not list CPUs"),
        ("mem=1G,cpus=+1", "'+1' does not list CPUs"),
        ("mem=1G,host=a", "'a' does not list the host's nodes"), ("mem=1G,policy=bind", "policy= requires host=N"),
        ("mem=1G,host=0,policy=local", "policy=local is not recognized; expected bind, preferred, interleave"),
        ("mem=1G,host=0-1,policy=preferred", "policy=preferred requires exactly one host node"),
        ("mem=1G,distance=1", "distance=1 is not valid; expected NODE:DISTANCE"),
        ("mem=1G,distance=1:256", "distance=1:256 is not"),
        ("mem=1G,distance=:20", "distance=:20 is not"),
        ("mem=1G,dist=1:20", "'dist=1:20' is not recognized; expected mem=, cpus=, host=, policy= or distance="),
    ])
    func mistakes(argument: String, sentence: String) {
        let error = #expect(throws: ArgumentProblem.self) { try NodeArgument(parsing: argument) }
        #expect(error?.description.hasPrefix(sentence) == true, "\(error?.description ?? "")")
    }

    /// Of two values one would be lost.
    @Test(arguments: [
        ("--net", "tap=a,offload=on,offload=off", "offload"), ("--net", "tap=a,tap=b", "tap"),
        ("--net", "tap=a,rx-bps=1M,rx-bps=2M", "rx-bps"), ("--disk", "a.raw,ro,ro", "ro"),
        ("--disk", "a.raw,cache=none,cache=writeback", "cache"), ("--disk", "a.raw,bps=1M,bps=2M", "bps"),
        ("--rng", "max-bytes=1K,max-bytes=2K", "max-bytes"), ("--console", "file:a,size=1M,size=2M", "size"),
        ("--cgroup", "/sys/fs/cgroup/a,memory=1G,memory=2G", "memory"),
        ("--numa", "mem=1G,policy=bind,policy=bind", "policy"),
    ])
    func aWordThatIsGivenTwice(option: String, value: String, word: String) {
        let error = #expect(throws: (any Error).self) { try Command.parseAsRoot(["run", option, value]) }
        let text = error.map { Command.message(for: $0) } ?? ""
        #expect(text.contains("'\(word)' is given twice"), "\(text)")
    }

    @Test func wordsThatAddToEachOther() throws {
        let disk = try DiskArgument(parsing: "ro,key-file=a,key-file=b,backing-dir=/a,backing-dir=/b,ro").disk
        #expect(disk.path == "ro" && disk.keys.count == 2 && disk.options.readOnly)
        #expect(try NodeArgument(parsing: "mem=1G,cpus=0,cpus=2,distance=1:20,distance=2:30").node.cpus == [0, 2])
    }
}
