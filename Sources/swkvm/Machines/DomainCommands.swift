// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import DomainXML
internal import Glibc
internal import HostNetwork
internal import Inventory
internal import Linux

/// `swkvm define`: a machine of a document of libvirt's.
struct DefineCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "define",
        abstract: "Define a machine by libvirt's XML.",
        discussion: """
            FILE is a domain of libvirt, as virt-install --print-xml and virsh dumpxml print it. Each part of it that has no effect here is \
            reported in one line, and so is what libvirt would have done differently. Disks stay where they are: nothing is copied, and \
            `swkvm delete` does not remove them. The definition of a stopped machine of this name is replaced.

            EXAMPLES
              virsh dumpxml --inactive web >web.xml
              swkvm define web.xml && swkvm start web
              virsh dumpxml --inactive db | swkvm define -

            \(MachineTool.exitStatuses)
            """)

    @Flag(help: "Define nothing if anything has to be reported.")
    var strict = false

    @Argument(help: "The XML file; - for standard input.", completion: .file())
    var file: String

    func run() throws {
        let domain: Domain
        do { domain = try read() } catch {
            StandardError().say("\(source): \(error)")
            throw ExitCode(MachineTool.failure)
        }
        let inventory = try inventory()
        let name: MachineName
        do throws(InventoryError) { name = try MachineName(domain.name) } catch {
            StandardError().say("\(source), name: \(error.description)")
            throw ExitCode(MachineTool.failure)
        }
        for note in domain.notes { StandardError().say("\(source): \(note)") }
        guard domain.notes.isEmpty || !strict else {
            StandardError().say("\(name) was not defined: --strict requires that nothing is reported")
            throw ExitCode(MachineTool.failure)
        }
        let definition = Definition(domain.definition.options.map(DefinitionPaths.absolute))
        do throws(Failure) {
            if (try? inventory.files(of: name)) != nil {
                try inventory.redefine(name, failure: Failure.inventory) { files, old throws(Failure) in
                    try Self.checked(definition, files, replaces: old)
                }
            } else {
                try inventory.create(name, failure: Failure.inventory) { files throws(Failure) in
                    try Self.checked(definition, files, replaces: nil)
                }
            }
        } catch {
            StandardError().say("\(name) was not defined: \(error.description)")
            throw ExitCode(MachineTool.failure)
        }
        print("\(name): defined")
    }

    /// What messages begin with.
    private var source: String { file == "-" ? "standard input" : file.printable }

    private func read() throws -> Domain {
        let bytes: [UInt8]
        do throws(SystemCallError) {
            let file =
                file == "-" ? try FileDescriptor.duplicate(of: STDIN_FILENO) : try FileDescriptor.open(file, O_RDONLY)
            bytes = try readStream(file, limit: XMLReader.maximumSize)
        } catch {
            if error.errno == EFBIG { throw DomainError.tooLong }
            throw ArgumentProblem("could not read it: \(error.reason)")
        }
        return try Domain(bytes, network: Networks.areAvailable ? "nat" : "user")
    }

    private enum Failure: Error, CustomStringConvertible {
        case inventory(InventoryError)
        case definition(String)
        case otherUUID(String)

        var description: String {
            switch self {
            case .inventory(let error): error.description
            case .definition(let problem): problem
            case .otherUUID(let uuid):
                "there is a machine of this name with another UUID, \(uuid.printable): delete it first, or give the XML that UUID"
            }
        }
    }

    private static func checked(
        _ definition: Definition, _ files: MachineFiles, replaces old: Definition?
    ) throws(Failure) -> Definition {
        // As libvirt has it: one UUID is one machine.
        if let before = old?.value(of: "uuid"), before != "none", let uuid = definition.value(of: "uuid"),
            before.lowercased() != uuid.lowercased()
        {
            throw .otherUUID(before)
        }
        guard definition.statesWhatBoots else {
            throw .definition("there is nothing to boot: expected a disk, or os/kernel")
        }
        if let problem = DefinitionCheck.problem(definition, files) { throw .definition(problem) }
        return definition
    }
}

/// `swkvm dumpxml`.
struct DumpXMLCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "dumpxml",
        abstract: "Print the definition of a machine as libvirt's XML.",
        discussion: """
            Options of swkvm that libvirt has no element for are in the metadata, where `swkvm define` finds them. Paths are absolute.

            EXAMPLES
              swkvm dumpxml web >web.xml
              virt-xml-validate web.xml

            \(MachineTool.exitStatuses)
            """)

    @Argument(help: "The machine.", completion: MachineCompletion.names)
    var name: String

    func run() throws {
        let (inventory, files) = try machine(self.name)
        let name = files.name
        let definition = try attempt { () throws(InventoryError) in try inventory.definition(of: name) }
        if let problem = DefinitionCheck.problem(definition, files) {
            StandardError().say("\(files.definition.printable): \(problem)")
            throw ExitCode(MachineTool.failure)
        }
        // Relative paths of the definition begin there, if there is anything there.
        _ = files.directory.withRawCString { unsafe chdir($0) }
        let size = definition.value(of: "mem").flatMap { ByteSize(argument: $0) } ?? RunCommand.defaultMemory
        let writer = DomainWriter(
            name: "\(name)", Definition(definition.options.map(DefinitionPaths.absolute)), memory: size.bytes)
        do throws(DomainError) { print(try writer.xml(), terminator: "") } catch {
            StandardError().say("\(name) cannot be written as XML: \(error.description)")
            throw ExitCode(MachineTool.failure)
        }
    }
}
