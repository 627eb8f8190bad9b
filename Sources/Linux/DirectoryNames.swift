// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

/// The names in a directory, sorted; none where there is no directory.
public func directoryNames(_ path: String) -> [String] {
    guard let stream = path.withRawCString({ unsafe opendir($0) }) else { return [] }
    defer { unsafe closedir(stream) }
    var names: [String] = []
    // The entry is valid until the next call, and its name ends with a zero.
    while let entry = unsafe readdir(stream) {
        let bytes = unsafe withUnsafeBytes(of: &entry.pointee.d_name) { unsafe Array($0.prefix { $0 != 0 }) }
        let name = String(raw: bytes)
        if name != ".", name != ".." { names.append(name) }
    }
    return names.sorted()
}
