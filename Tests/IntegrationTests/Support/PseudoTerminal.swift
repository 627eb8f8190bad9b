// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux

/// A terminal for a process, with the test at the keys.
final class PseudoTerminal {
    let master: FileDescriptor
    let path: String
    /// Keeps the terminal alive when the process has gone.
    private let client: FileDescriptor

    init() throws {
        master = try FileDescriptor.open("/dev/ptmx", O_RDWR | O_NOCTTY)
        var locked: Int32 = 0
        try master.ioctl(CLINUX_TIOCSPTLCK, &locked, named: "TIOCSPTLCK")
        var number: UInt32 = 0
        try master.ioctl(CLINUX_TIOCGPTN, &number, named: "TIOCGPTN")
        path = "/dev/pts/\(number)"
        client = try FileDescriptor.open(path, O_RDWR | O_NOCTTY)
    }

    /// The terminal's mode: flags and control characters.
    var mode: [UInt8] {
        var mode = termios()
        tcgetattr(client.rawValue, &mode)
        return withUnsafeBytes(of: &mode) { Array($0) }
    }

    /// Whether keys go to the reader as they are typed, unseen by the terminal.
    var isRaw: Bool {
        var mode = termios()
        tcgetattr(client.rawValue, &mode)
        return mode.c_lflag & tcflag_t(ICANON | ECHO | ISIG) == 0
    }
}
