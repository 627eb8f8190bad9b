// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import CLinux
internal import Glibc
internal import Linux
internal import Logging
internal import Machine

/// `swkvm run --daemon FILE`.
extension RunCommand {
    /// Goes on in a process in the background. The one that was called ends when that has started its guest, or cannot.
    func startInBackground(messages path: String) throws -> BackgroundStart {
        do throws(SystemCallError) {
            // Read by the process that waits, for its user.
            let flags = O_RDWR | O_APPEND | O_CREAT | O_NOCTTY | O_NONBLOCK
            let file = try FileDescriptor.open(path, flags, mode: 0o600)
            // A pipe would have to be read by somebody, and a disk would be overwritten.
            guard FileDescriptor.kind(of: file.rawValue) == S_IFREG else {
                throw SystemCallError("open", errno: EINVAL)
            }
            return try BackgroundStart(messages: file)
        } catch {
            let reason = error.errno == EINVAL ? "it is not a regular file" : "\(error.reason) (\(error.call))"
            StandardError().say("the file for messages cannot be \(path.printable): \(reason)", level: .critical)
            throw ExitCode(error.errno == EINVAL ? ExitStatus.usage : ExitStatus.noInput)
        }
    }
}
