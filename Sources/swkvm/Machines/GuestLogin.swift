// SPDX-License-Identifier: Apache-2.0

internal import DiskImage
internal import FileSystems
internal import Glibc
internal import Inventory
internal import Linux
internal import Machine

/// How the user of a machine logs in to its guest.
enum GuestLogin {
    private static let options = ["ssh-key", "user", "password-file", "user-data", "meta-data"]
    /// Below the home directory, in the order in which ssh itself looks for them.
    private static let keys = [".ssh/id_ed25519.pub", ".ssh/id_ecdsa.pub", ".ssh/id_rsa.pub"]

    /// Checks that an image boots, if that is not left to firmware, and lets this user's keys in unless the options say
    /// who may.
    static func addDefaults(
        to definition: inout Definition, _ disk: Configuration.Disk, _ report: inout [String]
    ) throws(CreateCommand.Failure) {
        if !definition.has("firmware") {
            do throws(MachineError) { _ = try RunCommand.menu(disk) } catch { throw .machine(error) }
        }
        guard !options.contains(where: definition.has) else { return }
        let found = keys.compactMap { key in home.map { $0 + "/" + key } }.filter { fileStatus(ofPath: $0) != nil }
        guard !found.isEmpty else {
            report.append("no SSH key was found in ~/.ssh, so give one with --ssh-key, or --password-file, to log in")
            return
        }
        for key in found { definition.options.append(Definition.Option("ssh-key", key)) }
        let user = distribution(of: disk)
        if let user { definition.options.append(Definition.Option("user", user)) }
        report.append("\(user.map { "user \($0), " } ?? "")SSH key \(found.map(\.printable).joined(separator: ", "))")
    }

    /// The name of an image's distribution, as os-release(5) has it, which is what cloud images name their user after;
    /// nil if that is not found, or no name for a user.
    private static func distribution(of disk: Configuration.Disk) -> String? {
        var options = disk.options
        options.readOnly = true
        guard
            let keys = try? disk.keys.map({ source throws(DiskImageError) in
                try DiskKey(source, report: ImageTool.report)
            })
        else {
            return nil
        }
        options.keys += keys
        guard let image = try? DiskImage(path: disk.path, options: options),
            let contents = try? DiskContents(ImageSource(ImageContents(image))),
            let fileSystem = try? contents.fileSystem(partition: nil)
        else { return nil }
        for path in ["/etc/os-release", "/usr/lib/os-release"] {
            guard let bytes = try? fileSystem.file(path).all(limit: 64 << 10, path) else { continue }
            for line in String(decoding: bytes, as: UTF8.self).split(separator: "\n") where line.hasPrefix("ID=") {
                let name = String(line.dropFirst(3).filter { $0 != "\"" && $0 != "'" })
                return try? SeedOptions.userName(name)
            }
        }
        return nil
    }

    private static var home: String? { environmentVariable("HOME") }
}
