internal import CLinux
internal import Glibc
internal import Linux

/// Opens a file that may be something else: a named pipe does not keep us waiting for its other end.
/// - Parameters:
///   - access: `O_RDONLY` or `O_RDWR`.
///   - directory: below which it has to be, when it is found as well as when it is opened; nil for anywhere.
func openFile(_ path: String, _ access: Int32, below directory: String? = nil) throws(DiskImageError) -> FileDescriptor {
    guard let directory else {
        do throws(SystemCallError) {
            return try waitingForLease { () throws(SystemCallError) in try FileDescriptor.open(path, access | O_NONBLOCK) }
        } catch { throw .system(path: path, error) }
    }
    guard let root = resolved(directory) else { throw .system(path: directory, .last("realpath")) }
    guard let parent = resolved(DiskImage.directory(of: path)) else { throw .system(path: path, .last("realpath")) }
    let start = root == "/" ? root : root + "/"
    guard "\(parent)/".hasPrefix(start) else { throw .outside(path: path, directory: directory) }
    let name = path[(path.lastIndex(of: "/").map { path.index(after: $0) } ?? path.startIndex)...]
    // Looked for anew from the root, as what was found may have been replaced.
    let relative = "\(parent)/".dropFirst(start.utf8.count) + name
    do throws(SystemCallError) {
        let top = try FileDescriptor.open(root, CLINUX_O_PATH | O_DIRECTORY)
        return try waitingForLease { () throws(SystemCallError) in try FileDescriptor.open(String(relative), below: top, access | O_NONBLOCK) }
    } catch {
        if error.errno == EXDEV { throw .outside(path: path, directory: directory) }
        throw .system(path: path, error)
    }
}

/// Somebody may have a lease on a file (fcntl(2)): the host's NFS or SMB server for a client, which has locks that nobody else sees yet. The kernel asks for it
/// back, says EAGAIN so long, and takes it after `lease-break-time` (45 seconds, unless the host's administrator says otherwise).
private func waitingForLease(_ open: () throws(SystemCallError) -> FileDescriptor) throws(SystemCallError) -> FileDescriptor {
    let nap: UInt32 = 10_000, longest = 90_000_000 / nap
    var naps: UInt32 = 0
    while true {
        do throws(SystemCallError) { return try open() } catch {
            guard error.errno == EAGAIN, naps < longest else { throw error }
        }
        naps += 1
        usleep(nap)
    }
}

/// Opens an open file once more, with `O_DIRECT`.
func openDirectly(_ file: borrowing FileDescriptor, _ access: Int32, _ path: String) throws(DiskImageError) -> FileDescriptor {
    do throws(SystemCallError) { return try FileDescriptor.open(file.path, access | CLINUX_O_DIRECT) } catch { throw .directUnavailable(path: path, error) }
}

/// A path without symbolic links, or nil when it leads nowhere (errno).
func resolved(_ path: String) -> String? {
    guard let text = unsafe realpath(path, nil) else { return nil }
    defer { unsafe free(text) }
    return unsafe String(cString: text)
}

extension DiskImage {
    /// That of a file.
    static func directory(of path: String) -> String {
        guard let slash = path.lastIndex(of: "/") else { return "." }
        return slash == path.startIndex ? "/" : String(path[..<slash])
    }
}

extension FileDescriptor {
    /// A path of the open file itself, whatever has become of its names.
    var path: String { "/proc/self/fd/\(rawValue)" }
}
