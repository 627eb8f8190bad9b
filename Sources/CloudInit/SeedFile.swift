// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// The contents of a file that an option names, which may be a pipe: `--password-file <(pass show web1)`.
enum SeedFile {
    static func read(_ path: String, option: String, limit: Int) throws(SeedError) -> [UInt8] {
        do throws(SystemCallError) {
            return try readStream(try FileDescriptor.open(path, O_RDONLY), limit: limit)
        } catch {
            throw error.errno == EFBIG
                ? .tooLarge(option: option, path: path, limit: limit) : .file(option: option, path: path, error)
        }
    }
}
