// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import CLinux
internal import DiskImage
internal import FileSystems
internal import GuestMemory
internal import Linux
internal import Sandbox

/// Exit statuses of `swkvm run`. 0 … 63 are the guest's; those below 80 mean what `<sysexits.h>` has them mean.
public enum ExitStatus {
    /// The command line is wrong (EX_USAGE).
    public static let usage: Int32 = 64
    /// A file that was named cannot be read, or is not what it should be (EX_NOINPUT).
    public static let noInput: Int32 = 66
    /// Something that swkvm needs of the host is unavailable (EX_OSERR).
    public static let hostError: Int32 = 71
    public static let tripleFault: Int32 = 100
    public static let internalError: Int32 = 101
    public static let unexpectedExit: Int32 = 102
    public static let reset: Int32 = 103
    public static let quit: Int32 = 104
    public static let killed: Int32 = 105
    public static let stopTimeout: Int32 = 106
    /// Plus the signal's number, as shells have it.
    public static let signalBase: Int32 = 128

    /// One line for each status, or run of them, in their order: what README and `swkvm run --help` show.
    public static let table: [(statuses: String, meaning: String)] = [
        ("0", "the guest powered off, or ended with status 0"),
        ("1 to \(usage - 1)", "the guest's own status, through its exit device (port 0x501)"),
        ("\(usage)", "the command line is wrong"),
        ("\(noInput)", "a given file does not exist, cannot be read, or is not a kernel or a disk image"),
        ("\(Sandbox.faultStatus)", "swkvm itself failed: the address of the fault is printed"),
        ("\(hostError)", "a required host resource is unavailable"),
        ("\(tripleFault)", "triple fault"),
        ("\(internalError)", "KVM internal error: registers and instruction bytes are printed"),
        ("\(unexpectedExit)", "a vCPU stopped with an exit that swkvm does not handle"),
        ("\(reset)", "the guest rebooted, with --on-reboot exit"),
        ("\(quit)", "ended at the console by Ctrl-A x"),
        ("\(killed)", "ended by the debugger"),
        ("\(stopTimeout)", "the guest did not power off within --stop-timeout"),
        ("\(Sandbox.exitStatus)", "a thread made a system call that the sandbox does not allow"),
        ("\(signalBase) + N", "ended by signal N (the second one, if the guest did not react to the first)"),
    ]
}

extension MachineError {
    /// The process's exit status when there is no machine for this reason.
    public var exitStatus: Int32 {
        switch self {
        case .noCPUs, .nodes, .networks, .vsock, .tooManyDevices, .outputFile, .controlGroup(.noName): ExitStatus.usage
        case .memory(.empty), .memory(.notPageMultiple): ExitStatus.usage
        case .boot(let error): error.exitStatus
        case .disk(let error): error.exitStatus
        case .bootDisk(_, .noEntry), .bootDiskIsRemote: ExitStatus.usage
        case .bootDisk: ExitStatus.noInput
        case .metrics(_, let error) where error.errno == ENOTSUP: ExitStatus.usage
        case .metrics(_, let error) where error.errno == EEXIST: ExitStatus.noInput
        case .processFile(_, .foreign): ExitStatus.noInput
        case .processFile(_, .system(let error)) where error.errno == EEXIST: ExitStatus.noInput
        case .console(.file, let error) where error.errno == ENOTSUP: ExitStatus.usage
        case .console(.file, let error), .console(.unix, let error), .debugger(.unix, let error),
            .vsockSocket(_, let error),
            .metrics(_, let error), .processFile(_, .system(let error)):
            error.isAboutName ? ExitStatus.noInput : ExitStatus.hostError
        default: ExitStatus.hostError
        }
    }
}

extension SystemCallError {
    /// The path that was named leads nowhere, to what may not be opened, or to something of another kind.
    fileprivate var isAboutName: Bool {
        [ENOENT, ENOTDIR, EACCES, EISDIR, ELOOP, ENAMETOOLONG].contains(errno)
    }
}

extension DiskImageError {
    /// Of a disk that cannot be used as it was stated.
    fileprivate var exitStatus: Int32 {
        switch self {
        // Another word on the command line changes it.
        case .formatUnknown, .formatContradicted, .sameDisk, .outside, .addressNotStated, .extentNotAllowed,
            .backingNotAllowed, .dataFileNotAllowed, .dataFileUnused, .keyMissing, .keyUnused, .vhdSizeUnused,
            .remoteAddress, .impossible:
            ExitStatus.usage
        // The file is not what a disk has to be.
        case .formatUnsupported, .notAFile, .notQCOW2, .notOfFormat, .extentName, .truncated, .invalid, .unsupported,
            .needsParent, .notWritable, .noSnapshot, .snapshot, .countsTooNarrow, .backingName, .backingLoop,
            .backingTooDeep, .wrongKey, .key, .keyTooSlow:
            ExitStatus.noInput
        case .system(_, let error): error.isAboutName ? ExitStatus.noInput : ExitStatus.hostError
        case .extent(_, let error), .backing(_, let error), .dataFile(_, let error): error.exitStatus
        default: ExitStatus.hostError
        }
    }
}

extension BootError {
    fileprivate var exitStatus: Int32 {
        switch self {
        // The arguments of the system call do not fit together: a matter of the options.
        case .commandLineTooLong, .commandLineHasNUL, .tablesTooLarge, .firmwareTablesTooLarge, .doesNotFit,
            .initrdDoesNotFit,
            .decompressedTooLarge:
            ExitStatus.usage
        case .memory: ExitStatus.hostError
        default: ExitStatus.noInput
        }
    }
}
