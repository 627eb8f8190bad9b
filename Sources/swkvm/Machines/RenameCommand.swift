// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import Glibc
internal import HostNetwork
internal import Inventory
internal import Linux
internal import Machine

/// `swkvm rename`.
struct RenameCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "rename",
        abstract: "Give a stopped machine another name.",
        discussion: """
            To its guest it stays the same machine: the identifiers that follow from the old name (UUID, MAC addresses) are written to its definition. \
            A guest with cloud-init takes the new name as its host name, unless --hostname says otherwise.

            EXAMPLE
              swkvm rename web web-old

            \(MachineTool.exitStatuses)
            """)

    @Argument(help: "The machine.", completion: MachineCompletion.names)
    var name: String

    @Argument(help: "Its new name.")
    var newName: String

    func run() throws {
        let inventory = try inventory()
        let old = try machineName(name), new = try machineName(newName)
        let starts = Autostart.isEnabled(old)
        try attempt { () throws(InventoryError) in
            try inventory.rename(old, to: new, failure: { $0 }) { (files, definition) throws(InventoryError) in
                Self.renameHostKeys(files, old, new)
                return MachineIdentity.stated(definition, of: old, new: new)
            }
        }
        print("\(old): renamed to \(new)")
        guard starts else { return }
        try Autostart.set(false, old)
        try Autostart.set(true, new)
    }

    /// ssh knows the guest by the machine's name. Best effort: otherwise, it learns its key anew.
    private static func renameHostKeys(_ files: MachineFiles, _ old: MachineName, _ new: MachineName) {
        guard let bytes = try? readFile(files.knownHosts, limit: 1 << 20) else { return }
        let lines = String(raw: bytes).split(separator: "\n", omittingEmptySubsequences: false).map { line in
            line.hasPrefix("\(old) ") ? "\(new) " + line.dropFirst("\(old) ".count) : String(line)
        }
        let text = lines.joined(separator: "\n").rawBytes
        guard text != bytes else { return }
        // A key more than before: also a rename that fails after this loses none.
        guard let file = try? FileDescriptor.open(files.knownHosts, O_WRONLY | O_APPEND) else { return }
        try? file.writeAll(text)
    }
}

/// What a guest knows its machine by.
enum MachineIdentity {
    /// A definition in which what follows from a machine's name is stated.
    static func stated(_ definition: Definition, of name: MachineName, new: MachineName) -> Definition {
        var definition = definition
        let addresses = networkAddresses(definition, name)
        if !definition.has("uuid") {
            definition.options.insert(
                Definition.Option("uuid", HostIdentity().uuid(ofMachine: "\(name)").description), at: 0)
        }
        var index = 0
        for place in definition.options.indices where definition.options[place].name == "net" {
            defer { index += 1 }
            guard let value = definition.options[place].value, index < addresses.count, let address = addresses[index]
            else { continue }
            if !OptionList(value).items.contains(where: { $0.key == "mac" }) {
                definition.options[place] = Definition.Option("net", "\(value),mac=\(address)")
            }
        }
        return definition
    }

    /// Those that a machine of this name has, nil where that depends on more than its name.
    private static func networkAddresses(_ definition: Definition, _ name: MachineName) -> [String?] {
        // The words of a definition that can be started.
        guard let command = try? RunCommand.parse(["--name=\(name)"] + definition.words) else { return [] }
        let configuration = command.configuration
        return configuration.networks.indices.map { configuration.address(ofNetwork: $0)?.description }
    }

    /// A definition without what distinguishes one machine from the others.
    static func removed(from definition: Definition) -> Definition {
        Definition(
            definition.options.filter { $0.name != "uuid" && $0.name != "hostname" }.map { option in
                guard option.name == "net", let value = option.value else { return option }
                var list = OptionList(value)
                let first = list.takeFirst().commaDoubled
                let words = list.items.filter { $0.key != "mac" }.map { key, value in
                    key.commaDoubled + (value.map { "=" + $0.commaDoubled } ?? "")
                }
                return Definition.Option("net", ([first] + words).joined(separator: ","))
            })
    }
}
