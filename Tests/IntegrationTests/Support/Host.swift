// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import Testing

/// What the machine that runs the tests must have.
enum Host {
    static let needed: Comment = "needs root and a /dev/kvm that opens: machines, TAPs and namespaces are made for real"

    static var isFit: Bool { geteuid() == 0 && (try? FileDescriptor.open("/dev/kvm", O_RDWR)) != nil }

    /// The tree that these tests are in.
    static let package: String = {
        let parts = #filePath.split(separator: "/")
        return "/" + parts.dropLast(4).joined(separator: "/")
    }()

    /// The bundled guest, as a file.
    static let guestKernel = package + "/guests/kernel/build/guest.elf"

    /// The program under test: the one that users get.
    static let swkvm: String = getenv("SWKVM_BINARY").map { String(cString: $0) } ?? package + "/build/swkvm"

    /// Bytes of RAM.
    static var memorySize: UInt64 { UInt64(sysconf(Int32(_SC_PHYS_PAGES))) * UInt64(sysconf(Int32(_SC_PAGESIZE))) }
}

/// Before a command: runs it as on a host without the programs of `--net nat`.
let withoutNATPrograms = [
    "unshare", "-m", "sh", "-euc",
    """
    for name in dnsmasq nft; do
        file=$(command -v $name || true); test -z "$file" || mount --bind /dev/null "$file"
    done
    exec "$@"
    """, "sh",
]

/// A directory of a test's own, removed with the object.
final class TemporaryDirectory {
    let path: String

    init() throws {
        var template = Array("/tmp/swkvm-test.XXXXXX".utf8CString)
        guard mkdtemp(&template) != nil else { throw SystemCallError.last("mkdtemp") }
        path = template.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
    }

    deinit { _ = try? shell("rm -rf '\(path)'") }

    func callAsFunction(_ name: String) -> String { path + "/" + name }

    /// The names of what is in it.
    var contents: [String] { get throws { try shell("ls -A '\(path)'").split(separator: "\n").map(String.init) } }

    /// Makes a file with these bytes.
    @discardableResult
    func write(_ bytes: some Collection<UInt8>, to name: String) throws -> String {
        let path = self(name)
        try FileDescriptor.open(path, O_WRONLY | O_CREAT | O_TRUNC, mode: 0o644).writeAll(bytes)
        return path
    }
}

/// The host's pools of huge pages, which all tests of the process share: one of them at a time.
final class HugePagePool {
    enum Size: String { case twoMiB = "2048", oneGiB = "1048576" }

    private let directory: String
    private let before: Int
    private let lock: FileDescriptor

    /// Waits for its turn and raises the pool to at least `count` free pages.
    init(_ size: Size, free count: Int) throws {
        // Tests of other modules change the pool too, behind the same lock.
        lock = try FileDescriptor.open("/proc/sys/vm/nr_hugepages", O_RDONLY)
        guard flock(lock.rawValue, LOCK_EX) == 0 else { throw SystemCallError.last("flock") }
        directory = "/sys/kernel/mm/hugepages/hugepages-\(size.rawValue)kB"
        before = try Self.number(directory + "/nr_hugepages")
        // Memory in small pieces is joined first.
        try? FileDescriptor.open("/proc/sys/vm/compact_memory", O_WRONLY).writeAll("1".utf8)
        try set(before + max(0, count - available))
        guard try available >= count else {
            try? set(before)
            throw TestFailure("the host could not raise its pool to \(count) free pages of \(size.rawValue) KiB")
        }
    }

    deinit { try? set(before) }

    /// Pages that nobody has taken or reserved.
    var available: Int {
        get throws { try Self.number(directory + "/free_hugepages") - Self.number(directory + "/resv_hugepages") }
    }

    var total: Int { get throws { try Self.number(directory + "/nr_hugepages") } }

    private func set(_ count: Int) throws {
        try FileDescriptor.open(directory + "/nr_hugepages", O_WRONLY).writeAll("\(count)".utf8)
    }

    private static func number(_ path: String) throws -> Int {
        let text = String(decoding: try readFile(path, limit: 64), as: UTF8.self)
        guard let number = Int(text.prefix { $0.isNumber }) else { throw TestFailure("\(path) has no number") }
        return number
    }
}
