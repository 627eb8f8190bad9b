// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import Inventory
internal import Linux

/// Whether a definition describes a machine that can be started.
enum DefinitionCheck {
    /// Options that the machine's start sets.
    static let reserved = ["name", "daemon", "pid-file"]

    /// The sentence for what is wrong; nil if nothing is.
    static func problem(_ definition: Definition, _ files: MachineFiles) -> String? {
        if let problem = problem(definition) { return problem }
        do { _ = try RunCommand.parse(StartCommand.words(definition, files)) } catch {
            return Command.oneLine(RunCommand.message(for: error))
        }
        return nil
    }

    /// What no machine in the background can have, of options that `swkvm run` may accept.
    static func problem(_ definition: Definition) -> String? {
        for option in definition.options {
            guard RunCommand.rules.contains(where: { $0.name == option.name }) else {
                return "'\(option.name.printable)' is not an option of `swkvm run`"
            }
            if reserved.contains(option.name) {
                return "the option --\(option.name) is set when the machine is started"
            }
            let keys = ["disk", "net"].contains(option.name) ? OptionList(option.value ?? "").items.map(\.key) : []
            for key in ["fd", "key-fd"] where keys.contains(key) {
                return
                    "\(key)= in --\(option.name) is a descriptor of the process that starts the machine, which has none"
            }
        }
        if definition.value(of: "boot") == "list" {
            return "the option --boot list prints a boot menu, and boots nothing"
        }
        if definition.value(of: "console") == "stdio" {
            return "the option --console stdio cannot be used: the machine runs in the background"
        }
        return nil
    }
}
