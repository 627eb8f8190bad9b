// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The memory limit of the control group that this process is in, the lowest of its own and those above it
/// (cgroups(7)).
struct MemoryControlGroup: Equatable {
    /// Bytes that the group's processes may have, in RAM and in swap.
    let limit: UInt64
    /// The directory of the group that has the limit.
    let directory: String

    /// nil if no group limits this process, or the limit is unknown.
    init?() {
        self.init(
            membership: (try? readFile("/proc/self/cgroup", limit: 64 << 10)) ?? [], swap: HostMemory().swap,
            read: { try? readFile($0, limit: 64) })
    }

    /// - Parameters:
    ///   - membership: what /proc/self/cgroup says.
    ///   - swap: bytes that the host has.
    ///   - read: gives a file's contents, or nil.
    init?(membership: [UInt8], swap: UInt64, read: (String) -> [UInt8]?) {
        var lowest: (limit: UInt64, directory: String)?
        for line in membership.split(separator: UInt8(ascii: "\n")) {
            // ID:CONTROLLERS:PATH, where version 2 has no controllers.
            let fields = line.split(separator: UInt8(ascii: ":"), maxSplits: 2, omittingEmptySubsequences: false)
            guard fields.count == 3 else { continue }
            let controllers = fields[1].split(separator: UInt8(ascii: ","))
            let version: Version
            if fields[1].isEmpty {
                version = .two
            } else if controllers.contains(where: { $0.elementsEqual("memory".utf8) }) {
                version = .one
            } else {
                continue
            }
            let names = fields[2].split(separator: UInt8(ascii: "/")).map { String(decoding: $0, as: UTF8.self) }
            // In a container the path is often not below what is mounted there, but the mounted directory is the
            // process's own.
            for depth in 0...names.count {
                let directory = ([version.root] + names[..<depth]).joined(separator: "/")
                guard let limit = version.limit(of: directory, swap: swap, read: read) else { continue }
                if limit < lowest?.limit ?? .max { lowest = (limit, directory) }
            }
        }
        guard let lowest else { return nil }
        (limit, directory) = lowest
    }

    private enum Version {
        case one, two

        var root: String { self == .one ? "/sys/fs/cgroup/memory" : "/sys/fs/cgroup" }

        /// RAM and swap that a group may have; nil without a limit.
        func limit(of directory: String, swap: UInt64, read: (String) -> [UInt8]?) -> UInt64? {
            func figure(_ name: String) -> UInt64? {
                read(directory + "/" + name).flatMap { decimal($0[...]) }.flatMap { $0 < 1 << 60 ? $0 : nil }
            }
            switch self {
            case .one:
                guard let memory = figure("memory.limit_in_bytes") else { return nil }
                // This one counts both.
                return min(memory &+ swap, figure("memory.memsw.limit_in_bytes") ?? .max)
            case .two:
                guard let memory = figure("memory.max") else { return nil }
                return memory &+ min(swap, figure("memory.swap.max") ?? .max)
            }
        }
    }
}

extension GuestMemory {
    /// Refuses memory that the process's control group does not allow it to have: the kernel ends a process that takes
    /// more, without a word.
    /// - Parameter size: bytes that will be touched, of a guest's RAM in ordinary pages.
    public static func checkControlGroup(size: UInt64) throws(GuestMemoryError) {
        try check(size: size, in: MemoryControlGroup())
    }

    static func check(size: UInt64, in group: MemoryControlGroup?) throws(GuestMemoryError) {
        // Page tables of the process and of KVM, 8 bytes a page each, and the process's own.
        let overhead: UInt64 = size / 256 &+ (8 << 20)
        guard let group, group.limit < overhead || size > group.limit &- overhead else { return }
        throw .controlGroup(size: size, overhead: overhead, limit: group.limit, directory: group.directory)
    }
}
