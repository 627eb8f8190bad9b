// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

@testable import GuestMemory

/// Runs `body` with more 2 MiB pages in the host's pool, and sets the pool back.
func withHugePages(additional count: UInt64, _ body: () throws -> Void) throws {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
    func set(_ count: UInt64) throws { try FileDescriptor.open(path, O_WRONLY).writeAll(Array("\(count)".utf8)) }
    let before = try #require(decimal(try readFile(path, limit: 64)[...]))
    try set(before + count)
    defer { try? set(before) }
    try body()
}

/// The host's pools are one for all tests of the process: a test that reads or changes them waits for this.
final class HugePageTurn {
    private let lock: FileDescriptor
    init() throws {
        lock = try FileDescriptor.open("/proc/sys/vm/nr_hugepages", O_RDONLY)
        try #require(flock(lock.rawValue, LOCK_EX) == 0)
    }
}

@Suite(.timed, .serialized) struct HugePageTests {
    private let turn = Result { try HugePageTurn() }

    @Test func tooFewIsAnErrorWithTheNumbers() throws {
        let pool = try HugePagePool(.twoMiB)
        let wanted = pool.available + 512
        let error = #expect(throws: GuestMemoryError.self) {
            try GuestMemory(size: wanted * (2 << 20), backing: .hugePages(.twoMiB))
        }
        guard case .hugePages(let shortage)? = error else { Issue.record("\(String(describing: error))"); return }
        #expect(shortage.suggestedTotal == pool.total + 512)
        #expect(
            shortage.description.contains(
                "in 2 MiB pages needs \(wanted) huge pages, \(pool.available) are free: "))
    }

    /// A reset fills huge pages with zeros and keeps them: the pool may have no others by then.
    @Test(arguments: [false, true]) func clearingKeepsThePages(shared: Bool) throws {
        try withHugePages(additional: 8) {
            let memory = try GuestMemory(size: 16 << 20, backing: .hugePages(.twoMiB), shared: shared)
            let touched: [UInt64] = [0, (2 << 20) - 1, 6 << 20, (16 << 20) - 1]
            for address in touched { try memory.ram.write(UInt8(0xa5), at: GuestAddress(address)) }
            let before = try HugePagePool(.twoMiB)
            try memory.clear()
            for address in touched { #expect(try memory.ram.readUInt8(at: GuestAddress(address)) == 0) }
            #expect(try HugePagePool(.twoMiB).available == before.available)
            // Pages that were never touched are not taken for that.
            #expect(try memory.usage().resident <= 8 << 20)
        }
    }

    @Test func oneGiBPagesHaveTheirOwnPool() throws {
        guard let pool = try? HugePagePool(.oneGiB) else {
            #expect(throws: GuestMemoryError.noHugePages(pageSize: 1 << 30)) {
                try GuestMemory(size: 1 << 30, backing: .hugePages(.oneGiB))
            }
            return
        }
        let size = (pool.available + 1) << 30
        let error = #expect(throws: GuestMemoryError.self) { try GuestMemory(size: size, backing: .hugePages(.oneGiB)) }
        // A host with less than one such page says that first.
        if size <= HostMemory().ram {
            #expect(error == .hugePages(try #require(pool.shortage(for: size, in: .oneGiB))))
        }
    }

    @Test func theSuggestionIsACommandThatMendsIt() {
        // 100 pages there, 37 of them free; 1024 wanted: 987 more make 1087.
        let pool = HugePagePool(total: 100, available: 37)
        let shortage = pool.shortage(for: 2 << 30, in: .twoMiB)
        #expect(shortage?.suggestedTotal == 1087)
        #expect(pool.shortage(for: 37 * (2 << 20), in: .twoMiB) == nil)
        let text = HugePageShortage(
            size: 2 << 30, pageSize: 2 << 20, free: 37, suggestedTotal: 1024, isDefaultSize: true)
        #expect(
            GuestMemoryError.hugePages(text).description
                == "2 GiB in 2 MiB pages needs 1024 huge pages, 37 are free: `sysctl vm.nr_hugepages=1024`")
        let large = HugePageShortage(size: 2 << 30, pageSize: 1 << 30, free: 0, suggestedTotal: 2, isDefaultSize: false)
        #expect(
            large.description == "2 GiB in 1 GiB pages needs 2 huge pages, 0 are free: "
                + "`echo 2 > /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages`")
    }

    @Test(.enabled(if: geteuid() == 0, "raising the pool of huge pages needs root"), arguments: [false, true])
    func theyAreReservedUsedAndGivenBack(shared: Bool) throws {
        try withHugePages(additional: 4) { try useAll(shared: shared) }
    }

    private func useAll(shared: Bool) throws {
        let available = try HugePagePool(.twoMiB).available
        try #require(available >= 4, "the host could not raise its pool")
        let size = available * (2 << 20)
        // Each round takes every page: the second succeeds only if the first has given all of them back.
        for _ in 0..<3 {
            let memory = try GuestMemory(size: size, backing: .hugePages(.twoMiB), shared: shared)
            // Reserved before anything is touched: nobody else gets one.
            #expect(try HugePagePool(.twoMiB).available == 0)
            #expect(try memory.usage().resident == 0)
            #expect(throws: GuestMemoryError.self) { try GuestMemory(size: 2 << 20, backing: .hugePages(.twoMiB)) }
            try memory.prealloc()
            #expect(try memory.usage().resident == size)
            try memory.ram.write(UInt64(42), at: GuestAddress(size - 8))
            #expect(try memory.ram.readUInt64(at: GuestAddress(size - 8)) == 42)
        }
        #expect(try HugePagePool(.twoMiB).available == available)
    }

    @Test func sizesInText() {
        #expect(byteText(2 << 30) == "2 GiB")
        #expect(byteText(1536 << 20) == "1536 MiB")
        #expect(byteText(4096) == "4 KiB")
        #expect(byteText(513) == "513 bytes")
        #expect(byteText(0) == "0 bytes")
        #expect(roundedText(24105 << 20) == "24105 MiB")
    }
}
