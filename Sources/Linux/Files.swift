// SPDX-License-Identifier: Apache-2.0

public import CLinux
internal import Glibc

/// The names in a directory, sorted, without `.` and `..`.
/// - Returns: text whose ``Swift/String/rawBytes`` are the names.
/// - Throws: `ENOENT` where there is no directory.
public func namesInDirectory(_ path: String) throws(SystemCallError) -> [String] {
    guard let stream = path.withRawCString({ unsafe opendir($0) }) else { throw .last("opendir") }
    defer { unsafe closedir(stream) }
    var names: [String] = []
    while true {
        errno = 0
        guard let entry = unsafe readdir(stream) else {
            guard errno == 0 else { throw .last("readdir") }
            return names.sorted()
        }
        // The entry is valid until the next call, and its name ends with a zero.
        let bytes = unsafe withUnsafeBytes(of: &entry.pointee.d_name) { unsafe Array($0.prefix { $0 != 0 }) }
        let name = String(raw: bytes)
        if name != ".", name != ".." { names.append(name) }
    }
}

/// Writes a file under another name and stores it, then gives it its own name: a reader finds all of its contents or
/// what was there before, also after a crash.
/// - Parameters:
///   - mode: the permission bits, whatever the umask is.
///   - replaces: whether the file may exist already.
///   - temporary: the other name, in the same file system; by default, `path` with `.new` behind it. A process that is
///     killed leaves it.
/// - Throws: `EEXIST` of `link` when the file exists and is not replaced.
public func writeFile(
    _ path: String, _ bytes: [UInt8], mode: mode_t = 0o600, replaces: Bool = true, temporary: String? = nil
) throws(SystemCallError) {
    let temporary = temporary ?? path + ".new"
    removeName(temporary)
    do throws(SystemCallError) {
        let file = try FileDescriptor.open(temporary, O_WRONLY | O_CREAT | O_EXCL, mode: mode)
        guard fchmod(file.rawValue, mode) == 0 else { throw .last("fchmod") }
        try file.writeAll(bytes)
        guard fsync(file.rawValue) == 0 else { throw .last("fsync") }
        let status = temporary.withRawCString { from in
            path.withRawCString { to in unsafe replaces ? rename(from, to) : link(from, to) }
        }
        guard status == 0 else { throw .last(replaces ? "rename" : "link") }
    } catch {
        removeName(temporary)
        throw error
    }
    if !replaces { removeName(temporary) }
}
