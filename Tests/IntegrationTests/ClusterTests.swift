// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// A machine on shared storage in a cluster of two nodes: Debian's corosync and Pacemaker run twice on this host, each
/// in namespaces of its own (Tests/Cluster).
@Suite(.timed, .serialized, .enabled(if: Host.isFit, Host.needed)) struct ClusterTests {
    /// A node that loses its power is confirmed to be off, and the other one starts its machine.
    @Test func aMachineFailsOver() throws {
        let cluster = try Cluster(fencing: true)
        try cluster.waitUntilMachineRuns(on: 1)
        // Nothing but the locks keeps a second one from starting by hand.
        #expect(try cluster.refusal("swkvm start web", on: 2).contains("web runs on another host"))
        let disk = cluster.home + "/machines/web/disk.qcow2"
        #expect(
            try cluster.refusal("swkvm run --mem 64M --disk '\(disk)' </dev/null", on: 2)
                .contains("another process has it open for writing"))
        // A machine that ends is started again where it was.
        let first = try cluster.process(on: 1)
        try cluster.on(1, "kill -KILL \(first)")
        try cluster.wait("a new process on node 1") {
            try cluster.machineRuns(on: 1) && cluster.process(on: 1) != first
        }

        try cluster.cutPower(of: 1)
        try cluster.waitUntilMachineRuns(on: 2)
        #expect(try cluster.powerLog == "node1 off by node2\n")
        #expect(try cluster.on(2, "swkvm info web | sed -n 2p") == "state:        running\n")
    }

    /// A node that cannot be reached still runs its machine: it is switched off before the other one starts it.
    @Test func aSeparatedNodeIsSwitchedOffFirst() throws {
        let cluster = try Cluster(fencing: true)
        try cluster.waitUntilMachineRuns(on: 1)
        try cluster.on(1, "ip link set eth0 down")
        try cluster.waitUntilMachineRuns(on: 2)
        #expect(try cluster.powerLog == "node1 off by node2\n")
        // A start that came too early would have failed.
        #expect(try !cluster.status(on: 2).contains("Failed Resource Actions"))
    }

    /// Without fencing, which no cluster should be, both nodes believe that the machine is theirs: the lock does not.
    @Test func theLockIsTheLastLine() throws {
        let cluster = try Cluster(fencing: false)
        try cluster.waitUntilMachineRuns(on: 1)
        let process = try cluster.process(on: 1)
        try cluster.on(1, "ip link set eth0 down")
        try cluster.wait("node 2 to be refused") {
            try cluster.status(on: 2).contains("web start on node2 returned 'error' (swkvm: web runs on another host")
        }
        #expect(try cluster.process(on: 1) == process)
        #expect(try cluster.on(2, "swkvm list").contains("elsewhere"))
        try cluster.on(1, "ip link set eth0 up")
        try cluster.wait("the nodes to see each other") {
            try cluster.status(on: 2).contains("Online: [ node1 node2 ]") && cluster.isStarted(on: 1, as: 2)
        }
        #expect(try cluster.process(on: 1) == process)
    }
}

/// Two nodes that share a directory, in which a machine `web` is defined.
private final class Cluster {
    private let directory: TemporaryDirectory
    private let program: Program
    let home: String

    /// Starts both nodes; they may not have found each other yet.
    init(fencing: Bool) throws {
        directory = try TemporaryDirectory()
        home = directory("shared")
        let resources = try directory.write(
            Self.resources(home: home, fencing: fencing).utf8, to: "resources.xml")
        _ = try shell("SWKVM_HOME='\(home)' '\(Host.swkvm)' create web --mem 64M --disk-size 64M")
        program = try Program(
            [
                Host.package + "/Tests/Cluster/run", directory.path, Host.swkvm,
                Host.package + "/packaging/ocf/Machine",
                resources,
            ], input: .pipe)
        try program.wait(for: "ready\n")
    }

    deinit {
        program.closeInput()
        _ = try? program.waitForEnd()
    }

    /// Runs a script on a node.
    @discardableResult func on(_ node: Int, _ script: String) throws -> String {
        let program = try start(script, on: node)
        guard try program.waitForEnd() == .status(0) else { throw TestFailure(program.story) }
        return program.output.text
    }

    /// What a script that has to fail says.
    func refusal(_ script: String, on node: Int) throws -> String {
        let program = try start(script, on: node)
        guard try program.waitForEnd() != .status(0) else { throw TestFailure(program.story) }
        return program.errors.text
    }

    private func start(_ script: String, on node: Int) throws -> Program {
        try Program([
            "nsenter", "--target", try pid(of: node), "--all", "env", "SWKVM_HOME=\(home)", "sh", "-euc", script,
        ])
    }

    /// Of the node's first process, as the host has it.
    private func pid(of node: Int) throws -> String { try text("node\(node).pid").filter(\.isNumber) }

    private func text(_ file: String) throws -> String {
        String(decoding: try readFile(directory(file), limit: 1 << 20), as: UTF8.self)
    }

    /// Ends all that runs on a node, without a word to the other one.
    func cutPower(of node: Int) throws {
        guard kill(try #require(pid_t(try pid(of: node))), SIGKILL) == 0 else { throw SystemCallError.last("kill") }
    }

    /// Which nodes were switched off, and on whose request.
    var powerLog: String { get throws { try text("power.log") } }

    /// The cluster as a node has it.
    func status(on node: Int) throws -> String { try on(node, "crm_mon --one-shot --quiet 2>&1 || true") }

    /// Indicates whether a node believes that the machine is started on another one, or on itself.
    func isStarted(on node: Int, as observer: Int) throws -> Bool {
        try status(on: observer).split(separator: "\n").contains {
            $0.contains("ocf:swkvm:Machine") && $0.hasSuffix("Started node\(node)")
        }
    }

    func machineRuns(on node: Int) throws -> Bool { try on(node, "swkvm list").contains("  running  ") }

    func waitUntilMachineRuns(on node: Int) throws {
        try wait("the machine to run on node \(node)") { try isStarted(on: node, as: node) && machineRuns(on: node) }
    }

    /// The number of the machine's process, as its node has it; none if it does not run there.
    func process(on node: Int) throws -> String { try on(node, "swkvm info web | sed -n 's/^process: *//p'") }

    func wait(_ what: String, until condition: () throws -> Bool) throws {
        for _ in 0..<900 {
            if try condition() { return }
            usleep(100_000)
        }
        let logs = try shell("tail -n 30 '\(directory.path)'/*.log; ls '\(directory.path)'")
        throw TestFailure("waited in vain for \(what): \(try status(on: 2))\n\(logs)")
    }

    /// The cluster's options, its power switch and the machine.
    private static func resources(home: String, fencing: Bool) -> String {
        """
        <cib crm_feature_set="3.0.0" validate-with="pacemaker-3.9" admin_epoch="1" epoch="0" num_updates="0">
          <configuration>
            <crm_config><cluster_property_set id="options">
              <nvpair id="fencing" name="stonith-enabled" value="\(fencing)"/>
              <nvpair id="deadtime" name="dc-deadtime" value="2s"/>
            </cluster_property_set></crm_config>
            <nodes><node id="1" uname="node1"/><node id="2" uname="node2"/></nodes>
            <resources>
              <primitive id="power" class="stonith" type="fence_power"><instance_attributes id="power-values">
                <nvpair id="power-nodes" name="pcmk_host_list" value="node1 node2"/>
                <nvpair id="power-delay" name="pcmk_delay_base" value="node1:0s;node2:20s"/>
              </instance_attributes></primitive>
              <primitive id="web" class="ocf" provider="swkvm" type="Machine">
                <instance_attributes id="web-values">
                  <nvpair id="web-machine" name="machine" value="web"/>
                  <nvpair id="web-home" name="home" value="\(home)"/>
                </instance_attributes>
                <operations>
                  <op id="web-start" name="start" interval="0" timeout="\(fencing ? 60 : 12)s"/>
                  <op id="web-stop" name="stop" interval="0" timeout="60s"/>
                  <op id="web-monitor" name="monitor" interval="1s" timeout="60s"/>
                </operations>
              </primitive>
            </resources>
            <constraints><rsc_location id="web-first" rsc="web" node="node1" score="10"/></constraints>
          </configuration>
          <status/>
        </cib>
        """
    }
}
