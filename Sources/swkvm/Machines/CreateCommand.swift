// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import CloudInit
internal import DiskImage
internal import Glibc
internal import Inventory
internal import Linux
internal import Machine

/// `swkvm create`: defines a machine, with a disk of its own.
struct CreateCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "create",
        abstract: "Define a machine, with a disk of its own.",
        usage:
            "swkvm create <name> [<image>] [--disk-size <size>] [--copy] [--progress] [--start] [<options of swkvm run> ...]",
        discussion: """
            IMAGE is a disk image with a system, as `swkvm run IMAGE` boots it. The machine gets an overlay over it, which stores what its guest \
            writes: IMAGE itself is never changed, and must stay where it is. All options of `swkvm run` describe the machine \
            (man swkvm-run); they are stored in a file that `swkvm edit` changes.

            The machine of an IMAGE without --net is, for root, in the network default of this host (--net nat), if dnsmasq and nft are installed. \
            Otherwise it has the network of this user (--net user), with a free port of 127.0.0.1 from 2222 on that leads \
            to the guest's port 22, which `swkvm ssh` uses.

            For an IMAGE without --user, --ssh-key, --password-file, --user-data and --meta-data, the public SSH keys of this user are given to the guest, for a user \
            named after its distribution, such as debian.

            OPTIONS OF ITS OWN
            \(HelpTable.text(ownOptions))

            EXAMPLES
              swkvm create web debian-12.qcow2 --cpus 2 --mem 2G --disk-size 20G
              swkvm create test --kernel vmlinux --initrd initrd.img --mem 1G
              swkvm create scratch --start

            \(MachineTool.exitStatuses)
            """)

    private static let ownOptions = [
        (
            "--disk-size SIZE",
            "size of the disk: at least that of IMAGE, which is the default. Without IMAGE, an empty disk of this size is created"
        ),
        ("--copy", "copy IMAGE, instead of creating an overlay over it"),
        (
            "--progress",
            "show how far a copy is: on a terminal, where that is the default, as a line that changes, otherwise as lines"
        ),
        ("--start", "start the machine, too"),
    ]

    @Argument(parsing: .captureForPassthrough, help: "Name, image and options.", completion: .file())
    var words: [String] = []

    func run() throws {
        if ["--help", "-h"].contains(words.first) { throw CleanExit.helpRequest(self) }
        let request = try Request(words)
        let inventory = try inventory()
        let name = try machineName(request.name)
        var report: [String] = []
        do throws(Failure) {
            try inventory.create(name, failure: Failure.inventory) { files throws(Failure) in
                try request.build(files, usedPorts: MachinePorts.used(in: inventory), &report)
            }
        } catch {
            StandardError().say("\(name) was not created: \(error.description)")
            throw error.isUsage ? ExitCode.validationFailure : ExitCode(MachineTool.failure)
        }
        print("\(name): created\(report.isEmpty ? "" : "; " + report.joined(separator: "; "))")
        for path in DefinitionPaths.missing(in: request.definition) {
            StandardError().say("\(name) cannot start before \(path.printable) exists")
        }
        if request.starts { try StartCommand.start(name, inventory, self) }
    }

    /// Why a machine was not created.
    enum Failure: Error, CustomStringConvertible {
        case inventory(InventoryError)
        case disk(DiskImageError)
        case machine(MachineError)
        case seed(SeedError)

        var description: String {
            switch self {
            case .inventory(let error): error.description
            case .disk(let error): error.description
            case .machine(let error): error.description
            case .seed(let error): error.description
            }
        }

        var isUsage: Bool {
            switch self {
            case .inventory(let error): error.isUsage
            case .machine(let error): error.exitStatus == ExitStatus.usage
            case .disk(.formatUnknown), .disk(.formatContradicted), .disk(.impossible): true
            case .disk, .seed: false
            }
        }
    }

    /// What the command line asks for.
    struct Request {
        let name: String
        private(set) var size: ByteSize?
        private(set) var copies = false
        private(set) var starts = false
        private(set) var showsProgress = false
        /// The image with its options.
        private(set) var image: String?
        private(set) var definition: Definition

        init(_ words: [String]) throws {
            guard let name = words.first, !name.hasPrefix("-") else {
                throw ValidationError("expected the machine's name first: swkvm create NAME [IMAGE] [OPTIONS]")
            }
            self.name = name
            var rest: [String] = []
            var iterator = words.dropFirst().makeIterator()
            while let word = iterator.next() {
                let parts = word.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
                switch parts[0] {
                case "--help", "-h": throw CleanExit.helpRequest(CreateCommand.self)
                case "--copy" where parts.count == 1: copies = true
                case "--start" where parts.count == 1: starts = true
                case "--progress" where parts.count == 1: showsProgress = true
                case "--disk-size":
                    guard let text = parts.count == 2 ? String(parts[1]) : iterator.next() else {
                        throw ValidationError("Missing value for '--disk-size <size>'")
                    }
                    do { size = try ByteSize(parsing: text) } catch {
                        throw ValidationError("The value '\(text)' is invalid for '--disk-size <size>': \(error)")
                    }
                default:
                    rest.append(word)
                    // A value is no option, whatever it looks like.
                    let kind = RunCommand.rules.first { "--\($0.name)" == parts[0] }?.kind
                    if parts.count == 1, kind == .value || kind == .repeatableValue, let value = iterator.next() {
                        rest.append(value)
                    }
                }
            }
            _ = try RunCommand.parse(rest)
            (image, definition) = Self.options(rest)
            let disk = image.map { [Definition.Option("disk", $0)] } ?? []
            if let problem = DefinitionCheck.problem(Definition(disk + definition.options)) {
                throw ValidationError(problem)
            }
            guard image != nil || !copies else { throw ValidationError("the option --copy requires an image") }
        }

        /// The options of words that ``RunCommand`` accepts.
        private static func options(_ words: [String]) -> (image: String?, Definition) {
            var image: String?
            var options: [Definition.Option] = []
            var rest = words[...]
            while let word = rest.popFirst() {
                guard word.hasPrefix("--") else {
                    image = word
                    continue
                }
                let parts = word.dropFirst(2).split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
                let kind = RunCommand.rules.first { $0.name == parts[0] }?.kind ?? .value
                var value = parts.count == 2 ? String(parts[1]) : nil
                if value == nil, kind != .flag, let next = rest.first, kind != .optionalValue || !next.hasPrefix("-") {
                    value = next
                    rest.removeFirst()
                }
                options.append(Definition.Option(String(parts[0]), value))
            }
            return (image, Definition(options.map(DefinitionPaths.absolute)))
        }

        // MARK: The machine's directory

        /// Makes the machine's disk.
        /// - Parameters:
        ///   - usedPorts: ports of the host that other machines have.
        ///   - report: gets what the user is to know.
        /// - Returns: the definition.
        func build(
            _ files: MachineFiles, usedPorts: Set<UInt16>, _ report: inout [String]
        ) throws(Failure) -> Definition {
            var definition = definition
            let disk = files.directory + "/disk.qcow2"
            // Said in the definition, so that the start need not explain what boots.
            if image == nil, !definition.statesWhatBoots { definition.set("kernel", to: RunCommand.bundled) }
            if let image {
                let argument: DiskArgument
                // It was parsed before.
                do { argument = try DiskArgument(parsing: image) } catch { return definition }
                if definition.value(of: "kernel") == nil {
                    try GuestLogin.addDefaults(to: &definition, argument.disk, &report)
                    if !definition.statesWhatBoots { definition.set("boot", to: "default") }
                    if !definition.has("net") { MachinePorts.addNetwork(to: &definition, used: usedPorts, &report) }
                }
                let path = DefinitionPaths.absolute(argument.disk.path)
                let bytes = try makeDisk(disk, from: argument.disk, path)
                report.insert(
                    "disk \(ImageTool.size(bytes)), "
                        + (copies
                            ? "a copy of \(path.printable)"
                            : "an overlay over \(path.printable), which must stay as it is"),
                    at: 0)
                var words = ["disk.qcow2"] + Self.kept(image)
                if !copies { words.insert("backing-dir=\(directory(of: path).commaDoubled)", at: 1) }
                let first = Definition.Option("disk", words.joined(separator: ","))
                // The first disk is the one that boots.
                let place = definition.options.firstIndex { $0.name == "disk" } ?? definition.options.count
                definition.options.insert(first, at: place)
            } else if let size {
                do throws(DiskImageError) {
                    let bytes = try ImageCreation(path: disk, format: .qcow2, size: size.bytes).create()
                    report.append("an empty disk of \(ImageTool.size(bytes))")
                } catch { throw .disk(error) }
                let place = definition.options.firstIndex { $0.name == "disk" } ?? definition.options.count
                definition.options.insert(Definition.Option("disk", "disk.qcow2"), at: place)
            }
            try check(definition)
            return definition
        }

        /// Reads the files that the machine's start needs for its seed: mistakes in them are reported now.
        private func check(_ definition: Definition) throws(Failure) {
            // The words were parsed before, and those of the disk are this type's.
            guard let command = try? RunCommand.parse(definition.words + ["--name=\(name)"]) else { return }
            do throws(SeedError) { _ = try command.seed.seed(for: command.configuration, name: name) } catch {
                throw .seed(error)
            }
        }

        private func directory(of path: String) -> String {
            let directory = path.directoryAndName.directory
            return directory == "/" ? directory : String(directory.dropLast())
        }

        /// The words of an image's options that are about the disk, and not about reading the image.
        private static func kept(_ image: String) -> [String] {
            var list = OptionList(image)
            _ = list.takeFirst()
            return list.items.filter { !["format", "ro", "snapshot", "vhd-size", "data-file"].contains($0.key) }
                .map { key, value in DefinitionPaths.absolute(key, value) }
        }

        /// - Returns: bytes of the disk.
        private func makeDisk(
            _ disk: String, from image: Configuration.Disk, _ path: String
        ) throws(Failure) -> UInt64 {
            var options = image.options
            options.readOnly = true
            do throws(DiskImageError) {
                options.keys = try image.keys.map { source throws(DiskImageError) in
                    try DiskKey(source, report: ImageTool.report)
                }
                let smallest = try DiskImage(path: path, options: options).size
                if let size, size.bytes < smallest {
                    throw .impossible(
                        path: path,
                        reason:
                            "its disk has \(ImageTool.size(smallest)), more than --disk-size \(ImageTool.size(size.bytes))"
                    )
                }
                guard copies else {
                    var creation = ImageCreation(path: disk, format: .qcow2, size: size?.bytes ?? smallest)
                    creation.backing = try BackingReference(
                        name: path, stated: options.format, option: "format=")
                    creation.backingOptions = options
                    return try creation.create()
                }
                var conversion = ImageConversion(source: path, target: disk, format: .qcow2)
                conversion.sourceOptions = options
                let line = ProgressLine(isShown: showsProgress ? true : nil)
                defer { line.end() }
                try conversion.run(line.show)
                guard let size, size.bytes > smallest else { return smallest }
                var engine = try DiskEngine(
                    DiskImage(path: disk, options: DiskImageOptions(format: .qcow2)), depth: 1)
                try engine.resize(to: size.bytes, preallocation: .off, shrinks: false)
                return size.bytes
            } catch { throw .disk(error) }
        }
    }
}
