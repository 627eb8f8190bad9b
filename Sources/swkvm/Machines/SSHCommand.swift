// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import Glibc
internal import HostNetwork
internal import Inventory
internal import Linux

/// `swkvm ssh`.
struct SSHCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "ssh",
        abstract: "Log in to the guest of a running machine by ssh.",
        usage: "swkvm ssh <name> [<command> ...]",
        discussion: """
            Runs ssh(1) with the user of --user and the port that --net user,publish=PORT:22 forwards, which `swkvm create IMAGE` sets up, or \
            else with the address that the guest has from its network (--net nat). The guest's host key is stored in the machine's own directory, at the first time without a question. What follows NAME is passed to ssh: \
            options of ssh, and a command.

            EXAMPLES
              swkvm ssh web
              swkvm ssh web uptime

            EXIT STATUS
              that of ssh; 1 if it cannot be run, 64 if the command line is wrong
            """)

    @Argument(
        parsing: .captureForPassthrough, help: "Name, and what is passed to ssh.", completion: MachineCompletion.names)
    var words: [String] = []

    func run() throws {
        guard let first = words.first, first != "--help", first != "-h" else { throw CleanExit.helpRequest(self) }
        let inventory = try inventory()
        let name = try machineName(first)
        let (files, definition) = try attempt { () throws(InventoryError) in
            let files = try inventory.files(of: name)
            guard try files.runningProcess() != nil else { throw .notRunning(name) }
            return (files, try inventory.definition(of: name))
        }
        guard let arguments = Self.arguments(name, files, definition) else { throw ExitCode(MachineTool.failure) }
        MachineTool.become("ssh", arguments + words.dropFirst())
        StandardError().say(
            "ssh cannot be run: \(SystemCallError.last("execvp").reason); `apt-get install openssh-client` installs it")
        throw ExitCode(MachineTool.failure)
    }

    /// What ssh gets: options, and at the end the guest's address; nil if there is none, which is reported.
    static func arguments(_ name: MachineName, _ files: MachineFiles, _ definition: Definition) -> [String]? {
        let addresses = MachineAddresses()
        if let port = PublishedPort.all(in: definition).first(where: { $0.guestPort == 22 }) {
            return arguments(port.address, port.port, files, definition)
        }
        if let address = addresses.all(of: name, definition).first {
            return arguments(address.description, 22, files, definition)
        }
        StandardError().say(
            addresses.interfaces(of: name, definition).isEmpty
                ? "no port of the host leads to the guest's port 22: add publish=PORT:22 to --net user (swkvm edit \(name)), or run ssh with the guest's address"
                : "\(name) has no address yet: its guest has not asked for one by DHCP")
        return nil
    }

    static func arguments(
        _ address: String, _ port: UInt16, _ files: MachineFiles, _ definition: Definition
    ) -> [String] {
        var words = [
            "-p", "\(port)", "-o", "HostKeyAlias=\(files.name)", "-o", "StrictHostKeyChecking=accept-new",
            // Quoted: its value is a list of files.
            "-o", "UserKnownHostsFile=\"\(files.knownHosts)\"",
        ]
        if let user = definition.value(of: "user") { words += ["-l", user] }
        return words + [address]
    }
}

/// `swkvm edit`.
struct EditCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "edit",
        abstract: "Change the definition of a machine in an editor.",
        discussion: """
            Opens a copy of the definition in $VISUAL, $EDITOR or vi. It is checked before it replaces the definition; a machine that runs \
            keeps what it was started with.

            \(MachineTool.exitStatuses)
            """)

    @Argument(help: "The machine.", completion: MachineCompletion.names)
    var name: String

    func run() throws {
        let (inventory, files) = try machine(self.name)
        let name = files.name
        // One of this process's own: another edit keeps its text.
        let copy = "\(files.directory)/edited-\(getpid()).toml"
        let before: [UInt8]
        do throws(SystemCallError) {
            before = try readFile(files.definition, limit: Self.limit)
            try FileDescriptor.open(copy, O_WRONLY | O_CREAT | O_EXCL, mode: 0o600).writeAll(before)
        } catch {
            StandardError().say("could not copy \(files.definition.printable): \(error.reason) (\(error.call))")
            throw ExitCode(MachineTool.failure)
        }
        let editor = ["VISUAL", "EDITOR"].compactMap(environmentVariable).first { !$0.isEmpty } ?? "vi"
        // As other programs have it: a command with arguments, which a shell splits.
        let status = MachineTool.run("/bin/sh", ["-c", "\(editor) \"$1\"", "sh", copy])
        let text: [UInt8]
        do throws(SystemCallError) { text = try readFile(copy, limit: Self.limit) } catch {
            StandardError().say("\(copy.printable) cannot be read: \(error.reason); nothing was changed")
            throw ExitCode(MachineTool.failure)
        }
        if status == 0, text == before {
            removeName(copy)
            return print("\(name): not changed")
        }
        let problem =
            status != 0
            ? "the editor, \(editor.printable), did not end with status 0" : Self.problem(text, before, copy, files)
        if let problem {
            if text == before { removeName(copy) }
            let kept = text == before ? "" : ", and your text is in \(copy.printable)"
            StandardError().say("\(problem); nothing was changed\(kept)")
            throw ExitCode(MachineTool.failure)
        }
        do throws(InventoryError) { try inventory.replaceDefinition(of: name, before, by: text) } catch {
            StandardError().say("\(error.description); nothing was changed, and your text is in \(copy.printable)")
            throw ExitCode(MachineTool.failure)
        }
        removeName(copy)
        print("\(name): changed")
    }

    private static let limit = 1 << 20

    /// Why a text cannot be a machine's definition.
    private static func problem(_ text: [UInt8], _ before: [UInt8], _ path: String, _ files: MachineFiles) -> String? {
        do throws(InventoryError) {
            let definition = try Inventory.definition(fromText: text, path: path)
            let had = try? Inventory.definition(fromText: before, path: path)
            if definition.options.isEmpty, had?.options.isEmpty != true {
                return "\(path.printable) has no option left"
            }
            return DefinitionCheck.problem(definition, files)
        } catch { return error.description }
    }
}
