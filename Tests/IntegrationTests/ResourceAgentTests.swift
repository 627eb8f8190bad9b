// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// The OCF resource agent, called as Pacemaker calls it. ``ClusterTests`` has a whole cluster.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct ResourceAgentTests {
    /// What an agent ends with (Open Cluster Framework Resource Agent API 1.1, section 4.2).
    private enum Code {
        static let success: Int32 = 0, error: Int32 = 1, arguments: Int32 = 2, unimplemented: Int32 = 3
        static let notInstalled: Int32 = 5, configuration: Int32 = 6, notRunning: Int32 = 7
    }

    private static let agent = Host.package + "/packaging/ocf/Machine"
    private let directory: TemporaryDirectory
    private var home: String { directory("home") }

    init() throws { directory = try TemporaryDirectory() }

    private func swkvm(_ arguments: String...) throws {
        let program = try Program(["env", "SWKVM_HOME=\(home)", Host.swkvm] + arguments)
        #expect(try program.waitForEnd() == .status(0), "\(program.story)")
    }

    private func stopAll() {
        _ = try? Program(["env", "SWKVM_HOME=\(home)", Host.swkvm, "stop", "--force", "web"]).waitForEnd()
    }

    private static let otherNode = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]

    /// Starts an action for the machine `web`.
    /// - Parameters:
    ///   - seconds: the action's timeout.
    ///   - command: what the agent's command line follows.
    private func begin(
        _ action: String, _ parameters: [String] = [], seconds: Int = 60, after command: [String] = []
    ) throws -> Program {
        let values = ["machine=web", "home=\(home)", "binary=\(Host.swkvm)"] + parameters
        return try Program(
            command
                + ["env", "OCF_ROOT=/usr/lib/ocf", "OCF_RESOURCE_INSTANCE=web", "HA_LOGFACILITY=none"]
                + ["OCF_RESKEY_CRM_meta_timeout=\(seconds * 1000)"] + values.map { "OCF_RESKEY_" + $0 }
                + [Self.agent, action])
    }

    /// Runs an action to its end.
    @discardableResult private func agent(
        _ action: String, _ parameters: String..., seconds: Int = 60, after command: [String] = [], code: Int32 = 0,
        sourceLocation: SourceLocation = #_sourceLocation
    ) throws -> String {
        let program = try begin(action, parameters, seconds: seconds, after: command)
        #expect(try program.waitForEnd() == .status(code), "\(program.story)", sourceLocation: sourceLocation)
        return program.errors.text
    }

    private var process: pid_t {
        get throws { try #require(pid_t(try shell("cat '\(home)/machines/web/pid'").filter(\.isNumber))) }
    }

    @Test func ocfTesterPassesIt() throws {
        defer { stopAll() }
        try swkvm("create", "web", "--mem", "64M")
        let tester = try Program([
            "/usr/sbin/ocf-tester", "-n", "web", "-o", "machine=web", "-o", "home=\(home)", "-o",
            "binary=\(Host.swkvm)", Self.agent,
        ])
        #expect(try tester.waitForEnd() == .status(0), "\(tester.story)")
        #expect(tester.output.text.hasSuffix("\(Self.agent) passed all tests\n"), "\(tester.story)")
    }

    @Test func theMetaDataIsValid() throws {
        let text = try shell("'\(Self.agent)' meta-data")
        let lint = "xmllint --nonet --noout"
        _ = try shell("'\(Self.agent)' meta-data | \(lint) --relaxng /usr/share/resource-agents/metadata.rng - 2>&1")
        _ = try shell("'\(Self.agent)' meta-data | \(lint) --dtdvalid /usr/share/resource-agents/ra-api-1.dtd - 2>&1")
        // Pacemaker would otherwise try to migrate.
        #expect(!text.contains("migrate"))
    }

    @Test func aLife() throws {
        defer { stopAll() }
        try swkvm("create", "web", "--mem", "64M")
        try agent("validate-all")
        try agent("monitor", code: Code.notRunning)
        try agent("start")
        try agent("monitor")
        try agent("start")
        // However its process ended.
        let killed = try process
        kill(killed, SIGKILL)
        while kill(killed, 0) == 0 { usleep(10_000) }
        try agent("monitor", code: Code.notRunning)
        try agent("start")
        for action in ["migrate_to", "migrate_from", "promote", "nonsense"] {
            try agent(action, code: Code.unimplemented)
        }
        try agent("monitor")
        try agent("stop")
        try agent("stop")
        try agent("monitor", code: Code.notRunning)
    }

    /// A stop ends the machine before its own time is over, whatever the guest does.
    @Test(arguments: [([], 27), (["shutdown_timeout=1"], 120), (["shutdown_timeout=500"], 26), ([], 20)])
    func aDeafGuestIsEnded(parameters: [String], seconds: Int) throws {
        defer { stopAll() }
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.deaf), to: "kernel")
        try swkvm("create", "web", "--kernel", kernel, "--mem", "16M", "--start")
        let stop = try begin("stop", parameters, seconds: seconds)
        #expect(try stop.waitForEnd() == .status(0), "\(stop.story)")
        try agent("monitor", code: Code.notRunning)
    }

    @Test func whatIsMissing() throws {
        defer { stopAll() }
        // No definition: its storage may not be mounted, which is no reason to stop the resource everywhere.
        try agent("monitor", code: Code.notRunning)
        try agent("stop")
        for action in ["start", "validate-all"] {
            let text = try agent(action, code: Code.notInstalled)
            #expect(text.contains("web is not defined on this node: is its storage mounted?"), "\(text)")
        }
        let text = try agent("start", "binary=/nowhere/swkvm", code: Code.notInstalled)
        #expect(text.contains("/nowhere/swkvm is not installed"), "\(text)")
        try agent("monitor", "binary=/nowhere/swkvm", code: Code.notInstalled)
        try agent("stop", "binary=/nowhere/swkvm")
        for parameter in ["machine=", "machine=../web", "machine=a b", "home=relative", "shutdown_timeout=1m"] {
            for action in ["start", "stop", "monitor", "validate-all"] {
                try agent(action, parameter, code: Code.configuration)
            }
        }
        // Its definition is bad.
        try swkvm("create", "web", "--mem", "64M")
        let definition = home + "/definitions/web.toml"
        try shell("cp '\(definition)' '\(directory("saved"))'; echo 'cpus' >>'\(definition)'")
        #expect(try agent("start", code: Code.arguments).contains("expected '='"))
        try agent("monitor", code: Code.notRunning)
        // A machine that runs is not taken for one that is stopped.
        try shell("cp '\(directory("saved"))' '\(definition)'")
        try agent("start")
        try shell("rm '\(definition)'")
        for action in ["monitor", "stop"] {
            #expect(try agent(action, code: Code.error).contains("web runs here, but its definition is missing"))
        }
        #expect(
            try agent("stop", "binary=/nowhere/swkvm", code: Code.notInstalled).contains("web runs here, and"))
        try shell("cp '\(directory("saved"))' '\(definition)'")
        try agent("stop")
    }

    /// A machine that another node has started runs there, and not here.
    @Test func aMachineOfAnotherNode() throws {
        defer { stopAll() }
        try swkvm("create", "web", "--mem", "64M")
        try agent("start")
        let running = try process
        try agent("monitor", after: Self.otherNode, code: Code.notRunning)
        try agent("stop", after: Self.otherNode)
        let text = try agent("start", seconds: 11, after: Self.otherNode, code: Code.error)
        #expect(text.contains("web runs on another host") && text.contains("waiting for its end"), "\(text)")
        #expect(try process == running && kill(running, 0) == 0)
        try agent("monitor")
    }

    /// The locks of a node that was fenced may outlive it for a while.
    @Test func aStartWaitsForTheLocksOfADeadNode() throws {
        defer { stopAll() }
        try swkvm("create", "web", "--mem", "64M")
        try agent("start")
        let start = try begin("start", seconds: 120, after: Self.otherNode)
        try start.waitForError("waiting for its end")
        kill(try process, SIGKILL)
        #expect(try start.waitForEnd() == .status(0), "\(start.story)")
        #expect(start.errors.text.contains("web: started"), "\(start.story)")
    }
}
