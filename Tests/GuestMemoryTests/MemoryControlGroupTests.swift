// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@testable import GuestMemory

@Suite(.timed) struct MemoryControlGroupTests {
    private func group(_ membership: String, swap: UInt64 = 0, _ files: [String: String]) -> MemoryControlGroup? {
        MemoryControlGroup(membership: Array(membership.utf8), swap: swap) { files[$0].map { Array($0.utf8) } }
    }

    /// The lowest limit counts, whose ever it is.
    @Test func ofVersion2() {
        let files = [
            "/sys/fs/cgroup/system.slice/memory.max": "536870912\n",
            "/sys/fs/cgroup/system.slice/a.service/memory.max": "max\n",
            "/sys/fs/cgroup/memory.max": "max\n",
        ]
        #expect(group("0::/system.slice/a.service\n", files)?.limit == 512 << 20)
        #expect(group("0::/system.slice/a.service\n", files)?.directory == "/sys/fs/cgroup/system.slice")
        #expect(group("0::/other\n", files) == nil && group("", files) == nil && group("nonsense\n0:\n", files) == nil)
        // Swap counts as far as the group may have it, and the host has any.
        #expect(group("0::/system.slice\n", swap: 1 << 30, files)?.limit == 1536 << 20)
        let limited = files.merging(["/sys/fs/cgroup/system.slice/memory.swap.max": "0\n"]) { $1 }
        #expect(group("0::/system.slice\n", swap: 1 << 30, limited)?.limit == 512 << 20)
    }

    @Test func ofVersion1() {
        let files = [
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1073741824\n",
            "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "2147483648\n",
            "/sys/fs/cgroup/memory/a/memory.memsw.limit_in_bytes": "1610612736\n",
        ]
        let membership = "9:name=systemd:/\n4:memory:/a/b\n3:cpuset:/\n0::/\n"
        #expect(group(membership, files) == group("4:cpu,memory:/a\n", files))
        #expect(
            group(membership, files)?.limit == 1 << 30
                && group(membership, files)?.directory == "/sys/fs/cgroup/memory/a")
        #expect(group(membership, swap: 4 << 30, files)?.limit == 1536 << 20)
    }

    /// In a container the path is one that only the host has.
    @Test func whereThePathIsNotMounted() {
        #expect(
            group("4:memory:/docker/0123\n", ["/sys/fs/cgroup/memory/memory.limit_in_bytes": "67108864"])?.limit == 64
                << 20)
    }

    @Test func whatIsTooMuch() throws {
        let group = MemoryControlGroup(membership: Array("0::/a".utf8), swap: 0) {
            $0.hasSuffix("/a/memory.max") ? Array("268435456".utf8) : nil
        }
        try GuestMemory.check(size: 240 << 20, in: group)
        try GuestMemory.check(size: 1 << 40, in: nil)
        let error = #expect(throws: GuestMemoryError.self) { try GuestMemory.check(size: 256 << 20, in: group) }
        #expect(
            error?.description
                == "256 MiB of preallocated guest memory and about 9 MiB of overhead exceed the limit of the control group /sys/fs/cgroup/a (256 MiB): raise its memory limit, or request less"
        )
        #expect(throws: GuestMemoryError.self) { try GuestMemory.check(size: .max, in: group) }
    }
}
