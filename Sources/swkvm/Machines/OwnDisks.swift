// SPDX-License-Identifier: Apache-2.0

internal import DiskImage
internal import Inventory
internal import Linux
internal import Machine

/// A disk of a machine whose file is in the machine's own directory.
struct OwnDisk {
    /// The path from the root.
    let path: String
    let options: DiskImageOptions
    /// Words of the option, after the path.
    let words: [(key: String, value: String?)]
    /// Where it is among the options of the definition.
    let index: Int

    /// The machine's own disks that its guest can write, in their order.
    static func all(in definition: Definition, _ files: MachineFiles) throws(DiskImageError) -> [OwnDisk] {
        var disks: [OwnDisk] = []
        for (index, option) in definition.options.enumerated() where option.name == "disk" {
            // It was parsed when the machine was defined.
            guard let value = option.value, let argument = try? DiskArgument(parsing: value),
                let path = path(argument.disk.path, files), !argument.disk.options.readOnly, !argument.disk.isTransient
            else { continue }
            var options = argument.disk.options
            options.dataFile = options.dataFile.map {
                $0.utf8.first == UInt8(ascii: "/") ? $0 : "\(files.directory)/\($0)"
            }
            options.namedFiles.stated += [path] + (options.dataFile.map { [$0] } ?? [])
            for source in argument.disk.keys { options.keys.append(try DiskKey(source, report: ImageTool.report)) }
            options.report = ImageTool.report
            var list = OptionList(value)
            _ = list.takeFirst()
            disks.append(OwnDisk(path: path, options: options, words: list.items, index: index))
        }
        return disks
    }

    /// The path of a file in the machine's directory; nil for any other one.
    private static func path(_ path: String, _ files: MachineFiles) -> String? {
        if DiskImage.isRemote(path) { return nil }
        guard path.utf8.first == UInt8(ascii: "/") else { return "\(files.directory)/\(path)" }
        return path.hasPrefix(files.directory + "/") ? path : nil
    }

    /// Disks of a definition that are not the machine's own, as they are written there.
    static func others(in definition: Definition, _ files: MachineFiles) -> [String] {
        definition.values(of: "disk").compactMap { value in
            guard let argument = try? DiskArgument(parsing: value), path(argument.disk.path, files) == nil,
                !argument.disk.options.readOnly, !argument.disk.isTransient
            else { return nil }
            return argument.disk.path
        }
    }
}

/// An error of a verb that changes a machine's disks.
enum MachineDiskError: Error {
    case inventory(InventoryError)
    case disk(DiskImageError)
    /// A sentence of the verb's own.
    case refused(String)

    var description: String {
        switch self {
        case .inventory(let error): error.description
        case .disk(let error): error.description
        case .refused(let sentence): sentence
        }
    }

    /// Indicates whether the command line asked for something impossible.
    var isUsage: Bool {
        switch self {
        case .inventory(let error): error.isUsage
        case .disk(.impossible), .disk(.noSnapshot): true
        case .disk, .refused: false
        }
    }
}
