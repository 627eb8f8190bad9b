// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import DiskImage
internal import Glibc
internal import Linux

/// The files that a machine writes to besides its disks. None may be another of its files: the output would destroy a
/// disk or a kernel, or two outputs would be mixed.
struct OutputFiles {
    /// A file, and the option that names it.
    private struct File {
        let option: String
        let path: String

        var words: String { "\(option) \(path)" }
    }

    private let outputs: [File]
    private let inputs: [File]

    init(_ configuration: Configuration) {
        var outputs: [File] = []
        if let metrics = configuration.metrics {
            outputs.append(File(option: "--metrics", path: metrics.path))
            if metrics.format == .prometheus {
                outputs.append(File(option: "--metrics", path: MetricsTarget.temporaryPath(metrics.path)))
            }
        }
        switch configuration.console {
        case .file(let path):
            outputs += configuration.consoleLimits.names(path).map { File(option: "--console", path: $0) }
        case .unix(let path):
            outputs.append(File(option: "--console", path: path))
            if let log = configuration.consoleLimits.log {
                outputs += configuration.consoleLimits.names(log).map { File(option: "--console log=", path: $0) }
            }
        case .stdio, .none, .pty: break
        }
        if let path = configuration.messageFile { outputs.append(File(option: "--daemon", path: path)) }
        if let path = configuration.processFile { outputs.append(File(option: "--pid-file", path: path)) }
        if let vsock = configuration.vsock { outputs.append(File(option: "--vsock", path: vsock.path)) }
        if case .unix(let path) = configuration.debugger { outputs.append(File(option: "--gdb", path: path)) }
        // What is written to a device or a pipe is kept nowhere: both may get it.
        self.outputs = outputs.filter { file in
            guard let kind = fileStatus(ofPath: file.path).map({ $0.st_mode & S_IFMT }) else { return true }
            return kind != S_IFCHR && kind != S_IFIFO
        }
        inputs = self.outputs.isEmpty ? [] : configuration.inputFiles.map(File.init)
    }

    /// Compares all that the configuration names; before anything is opened.
    func check() throws(MachineError) {
        for (index, output) in outputs.enumerated() {
            for other in outputs[(index + 1)...] + inputs where DiskImage.areSameFile(output.path, other.path) {
                throw .outputFile(option: output.option, path: output.path, other: other.words)
            }
        }
    }

    /// Compares with all files of disks that are open: backing files and extents are not on the command line.
    func check(_ disks: OpenDisks) throws(MachineError) {
        for output in outputs {
            guard let disk = disks.path(ofDiskUsing: output.path) else { continue }
            throw .outputFile(option: output.option, path: output.path, other: "the disk \(disk)")
        }
    }
}

extension Configuration {
    /// The files that are named and read, or are disks.
    fileprivate var inputFiles: [(option: String, path: String)] {
        var files = seedFiles
        for disk in disks {
            files.append(("the disk", disk.path))
            if let path = disk.options.dataFile { files.append(("the data file", path)) }
            for case .file(let path) in disk.keys { files.append(("the key file", path)) }
            files += DiskImage.server(ofRemote: disk.path).files.map { ("the certificate or key", $0) }
        }
        if case .file(let path) = kernel { files.append(("--kernel", path)) }
        if let initrd { files.append(("--initrd", initrd)) }
        if let firmware { files.append(("--firmware", firmware)) }
        return files
    }
}

extension Configuration.ConsoleLimits {
    /// The console's file and those of older output beside it.
    func names(_ path: String) -> [String] { [path] + (0..<(file?.backups ?? 0)).map { "\(path).\($0 + 1)" } }
}
