// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import Glibc
internal import Inventory
internal import Linux

/// `swkvm autostart`.
struct AutostartCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "autostart",
        abstract: "Start machines with the host, or no longer.",
        discussion: """
            Enables the systemd unit swkvm-machine@NAME: root's machines start with the host, those of another user with the user's first login, or with the host \
            after `loginctl enable-linger`. It neither starts nor stops a machine now. `swkvm list` and `swkvm info` show it.

            EXAMPLES
              swkvm autostart web
              swkvm autostart --disable web

            \(MachineTool.exitStatuses)
            """)

    @Flag(help: "Do not start them any longer.")
    var disable = false

    @Argument(help: "The machines.", completion: MachineCompletion.names)
    var names: [String]

    func run() throws {
        let inventory = try inventory()
        try forEach(names) { name in
            _ = try attempt { () throws(InventoryError) in try inventory.files(of: name) }
            try Autostart.set(!disable, name)
            print("\(name): \(disable ? "does not start" : "starts") with \(Autostart.occasion)")
        }
    }
}

/// The systemd units that start machines with the host.
enum Autostart {
    private static var isRoot: Bool { geteuid() == 0 }

    static var occasion: String { isRoot ? "the host" : "this user's sessions" }

    private static func unit(_ name: MachineName) -> String { "swkvm-machine@\(name).service" }

    /// The link by which `systemctl enable` starts it: asking systemd would take longer than all of a list.
    static func isEnabled(_ name: MachineName) -> Bool {
        guard environmentVariable("SWKVM_HOME") ?? "" == "", let directory else { return false }
        return fileStatus(ofPath: "\(directory)/\(unit(name))", followsLinks: false) != nil
    }

    private static var directory: String? {
        if isRoot { return "/etc/systemd/system/multi-user.target.wants" }
        let configuration =
            environmentVariable("XDG_CONFIG_HOME") ?? environmentVariable("HOME").map { $0 + "/.config" }
        return configuration.map { $0 + "/systemd/user/default.target.wants" }
    }

    /// - Throws: the status, after the reason was reported.
    static func set(_ isOn: Bool, _ name: MachineName) throws {
        func refuse(_ sentence: String) -> ExitCode {
            StandardError().say(sentence)
            return ExitCode(MachineTool.failure)
        }
        guard environmentVariable("SWKVM_HOME") ?? "" == "" else {
            throw refuse(
                "the systemd unit uses the usual directories, and SWKVM_HOME is set: \(name) cannot be started by it")
        }
        if !isOn, !isEnabled(name) { return }
        let words = (isRoot ? [] : ["--user"]) + ["--quiet", isOn ? "enable" : "disable", unit(name)]
        guard let status = MachineTool.run("systemctl", words) else {
            throw refuse(
                "systemctl cannot be run: \(name) can start with the host only where systemd does; elsewhere, have the host's init run `swkvm start \(name)`"
            )
        }
        // systemctl has reported why.
        guard status == 0 else {
            throw refuse(
                "systemctl \(words.joined(separator: " ")) ended with status \(status): the unit is part of the package of swkvm (packaging/ in its source)"
            )
        }
    }
}
