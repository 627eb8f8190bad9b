// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import DiskImage
internal import FileSystems
internal import Linux
internal import Machine

/// `swkvm run --boot list`.
extension RunCommand {
    /// Refuses what would have no effect, or another one, on a machine with firmware.
    func validateFirmware() throws {
        if boot != nil {
            throw ValidationError(
                "the options --boot and --firmware cannot be combined: firmware finds what boots on a disk by itself")
        }
        if kernel != nil {
            throw ValidationError(
                "the options --kernel and --firmware cannot be combined: firmware boots from a disk; without it, the kernel boots directly"
            )
        }
        if !cmdline.isEmpty || cmdlineRaw != nil || !append.isEmpty {
            throw ValidationError(
                "the options --\(!cmdline.isEmpty ? "cmdline" : cmdlineRaw != nil ? "cmdline-raw" : "append") and --firmware cannot be combined: a kernel on a disk gets the command line of its boot loader"
            )
        }
        if discovery == .cmdline {
            throw ValidationError(
                "the options --discovery cmdline and --firmware cannot be combined: nothing is added to the command line of a boot loader"
            )
        }
    }

    /// Prints the boot menu of the disk that would boot, and boots nothing.
    func listEntries() throws {
        guard let disk = (image ?? self.disk.first)?.disk else { return }
        let menu: BootMenu
        do throws(MachineError) { menu = try Self.menu(disk) } catch {
            StandardError().say(error.description)
            throw ExitCode(error.exitStatus)
        }
        for note in menu.notes { StandardError().say(note.printable) }
        for line in Self.lines(menu) { print(line) }
    }

    /// The boot menu of a disk.
    static func menu(_ disk: Configuration.Disk) throws(MachineError) -> BootMenu {
        let image: ImageContents
        do throws(DiskImageError) {
            var options = disk.options
            options.readOnly = true
            options.keys += try disk.keys.map { source throws(DiskImageError) in
                try DiskKey(source, report: ImageTool.report)
            }
            image = ImageContents(try DiskImage(path: disk.path, options: options))
        } catch { throw .disk(error) }
        do throws(FileSystemError) { return try BootMenu(DiskContents(ImageSource(image))) } catch {
            throw .bootDisk(path: disk.path, error)
        }
    }

    /// A line for each entry: an asterisk at the default, its number, its title, and where it is from.
    static func lines(_ menu: BootMenu) -> [String] {
        let width = "\(menu.entries.count)".count
        return menu.entries.enumerated().map { index, entry in
            let number = "\(index + 1)"
            return (index == menu.defaultIndex ? "* " : "  ") + String(repeating: " ", count: width - number.count)
                + number
                + "  " + entry.title.printable + "  (\(entry.kernel.path.printable), \(entry.source.printable))"
        }
    }
}
