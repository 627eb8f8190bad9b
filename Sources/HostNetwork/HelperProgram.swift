// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Programs of the host that networks need.
enum HelperProgram {
    /// A program, searched in `PATH`, and in the directories of an administrator's programs, which few users have in
    /// it; nil if it is not installed.
    static func find(_ name: String, more: [Substring] = ["/usr/sbin", "/sbin"]) -> String? {
        let directories = (environmentVariable("PATH") ?? "").split(separator: ":") + more
        for directory in directories where directory.first == "/" {
            let file = "\(directory)/\(name)"
            guard let status = fileStatus(ofPath: file), status.st_mode & S_IFMT == S_IFREG else { continue }
            if file.withRawCString({ unsafe access($0, X_OK) }) == 0 { return file }
        }
        return nil
    }

    /// A pipe whose own end is for reading, without waiting.
    static func pipe() throws(SystemCallError) -> FrameStream.Pair {
        var ends: [Int32] = [-1, -1]
        // Two numbers are written.
        if unsafe clinux_pipe_cloexec(&ends) < 0 { throw .last("pipe2") }
        let pipe = FrameStream.Pair(own: FileDescriptor(owning: ends[0]), peer: FileDescriptor(owning: ends[1]))
        try pipe.own.setNonBlocking(true)
        return pipe
    }

    /// Starts a program with nothing as standard input and output.
    /// - Parameters:
    ///   - arguments: with the program's name first.
    ///   - socket: its descriptor 3.
    ///   - errors: its standard error.
    static func spawn(
        _ program: String, _ arguments: [String], socket: borrowing FileDescriptor, errors: borrowing FileDescriptor
    ) throws(SystemCallError) -> pid_t {
        var words = unsafe arguments.map { unsafe strdup($0) } + [nil]
        defer { unsafe words.forEach { unsafe free($0) } }
        var process: pid_t = 0
        // A list of strings that ends with nil, and lives for the call.
        let status = program.withRawCString { path in
            unsafe clinux_spawn(&process, path, &words, socket.rawValue, errors.rawValue)
        }
        if status != 0 { throw SystemCallError("posix_spawn", errno: status) }
        return process
    }

    /// Runs a program to its end.
    /// - Returns: as ``wait(for:_:patience:isInterrupted:)``.
    static func run(
        _ program: String, _ arguments: [String], patience: Int
    ) throws(SystemCallError) -> (status: Int32?, text: String) {
        let output: FileDescriptor
        let process: pid_t
        do {
            let pipe = try pipe(), nothing = try FileDescriptor.open("/dev/null", O_RDWR)
            process = try spawn(program, arguments, socket: nothing, errors: pipe.peer)
            output = pipe.own
        }
        return wait(for: process, output, patience: patience)
    }

    /// Waits until a program has ended: because it has failed, or goes on in another process.
    /// - Parameters:
    ///   - patience: seconds; after them it is killed.
    ///   - isInterrupted: polled several times a second; true kills it, too.
    /// - Returns: its exit status, or 128 and the number of the signal that killed it, nil if that was done here; and
    ///   what it printed.
    static func wait(
        for process: pid_t, _ output: borrowing FileDescriptor, patience: Int,
        isInterrupted: () -> Bool = { false }
    ) -> (status: Int32?, text: String) {
        var text: [UInt8] = []
        let deadline = TimerFD.now + UInt64(patience) * 1000
        while TimerFD.now < deadline, !isInterrupted() {
            var line = pollfd(fd: output.rawValue, events: Int16(POLLIN), revents: 0)
            // It closes its output, too, when it is ready.
            _ = unsafe poll(&line, 1, 50)
            text += take(output)
            var status: Int32 = 0
            let result = unsafe waitpid(process, &status, WNOHANG)
            // Where SIGCHLD is ignored, as a careless parent leaves it, the kernel keeps no status. Whether it does its
            // work is seen later.
            if result < 0, errno == ECHILD { return (0, "") }
            if result == process {
                text += take(output)
                let code = status & 0x7f == 0 ? status >> 8 & 0xff : 128 + status & 0x7f
                return (code, String(decoding: text, as: UTF8.self))
            }
            if line.revents & Int16(POLLHUP) != 0 { usleep(2_000) }
        }
        kill(process, SIGKILL)
        _ = waitpid(process, nil, 0)
        return (nil, "")
    }

    /// What is there of its output, of which a bounded part is kept.
    private static func take(_ output: borrowing FileDescriptor) -> [UInt8] {
        var room = [UInt8](repeating: 0, count: 4096)
        // As many bytes as the array has room for.
        let count = unsafe room.withUnsafeMutableBytes { unsafe read(output.rawValue, $0.baseAddress, $0.count) }
        return Array(room.prefix(max(0, count)))
    }
}
