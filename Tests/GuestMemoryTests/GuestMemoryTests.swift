// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import Synchronization
import TestSupport
import Testing

@testable import GuestMemory

/// A guest's size and those of its regions.
private let layouts: [(UInt64, [UInt64])] = [
    (4096, [4096]),
    (64 << 20, [64 << 20]),
    (0xbfff_f000, [0xbfff_f000]),
    (3 << 30, [3 << 30]),
    (0xc000_1000, [3 << 30, 4096]),
    (5 << 30, [3 << 30, 2 << 30]),
]

@Suite(.timed) struct GuestMemoryTests {
    @Test("Regions around the hole", arguments: layouts)
    func layout(size: UInt64, sizes: [UInt64]) throws {
        guard size <= HostMemory().ram else { return }  // refused there, which is another test
        let memory = try GuestMemory(size: size)
        #expect(memory.size == size)
        #expect(memory.regions.map(\.size) == sizes)
        #expect(memory.regions.map(\.start) == Array([GuestAddress(0), GuestAddress(4 << 30)].prefix(sizes.count)))
        // The last byte of each region is there; the one behind it is not.
        for region in memory.regions {
            try memory.ram.write(UInt8(0xa5), at: GuestAddress(region.end.rawValue - 1))
            #expect(try memory.ram.readUInt8(at: GuestAddress(region.end.rawValue - 1)) == 0xa5)
            #expect(!memory.ram.contains(region.end, count: 1))
        }
        // One touched page for each region: memory costs nothing before it is used.
        #expect(try memory.usage().resident == UInt64(sizes.count) * 4096)
        #expect(try memory.usage().dirty == UInt64(sizes.count) * 4096)
        #expect(unsafe UInt(bitPattern: memory.regions[0].host) % (2 << 20) == 0)
    }

    @Test(arguments: [(MemoryBacking.anonymous, false), (.anonymous, true), (.transparent, false), (.automatic, false)])
    func clearingMakesAllZeroAndGivesThePagesBack(backing: MemoryBacking, shared: Bool) throws {
        let memory = try GuestMemory(
            layout: [(GuestAddress(0), 8 << 20), (GuestAddress(4 << 30), 8 << 20)], backing: backing, shared: shared)
        let touched: [UInt64] = [0, 4097, (8 << 20) - 1, 4 << 30, (4 << 30) + (8 << 20) - 1]
        for address in touched { try memory.ram.write(UInt8(0xa5), at: GuestAddress(address)) }
        #expect(try memory.usage().resident > 0)
        try memory.clear()
        #expect(try memory.usage().resident == 0)
        for address in touched { #expect(try memory.ram.readUInt8(at: GuestAddress(address)) == 0) }
        #expect(throws: GuestMemoryError.interrupted) { try memory.clear(isInterrupted: { true }) }
    }

    @Test func sizesThatMakeNoSense() {
        #expect(throws: GuestMemoryError.empty) { try GuestMemory(size: 0) }
        #expect(throws: GuestMemoryError.notPageMultiple(size: 4097, pageSize: 4096)) { try GuestMemory(size: 4097) }
        #expect(throws: GuestMemoryError.notPageMultiple(size: 3 << 20, pageSize: 2 << 20)) {
            try GuestMemory(size: 3 << 20, backing: .hugePages(.twoMiB))
        }
        #expect(
            GuestMemoryError.notPageMultiple(size: 3 << 20, pageSize: 2 << 20).description
                == "3145728 bytes of guest memory is not a multiple of its 2 MiB pages; the next multiple is 4 MiB")
        #expect(GuestMemoryError.notPageMultiple(size: .max, pageSize: 2 << 20).description.contains("multiple"))
    }

    @Test func moreThanTheHostHas() throws {
        let host = HostMemory()
        try #require(host.ram > 0)
        let sizes: [UInt64] = [(host.ram + host.swap) / 4096 * 4096 + 4096, 1 << 60, 0xffff_ffff_ffff_f000]
        for size in sizes {
            for backing in [MemoryBacking.anonymous, .transparent] {
                let error = #expect(throws: GuestMemoryError.self) { try GuestMemory(size: size, backing: backing) }
                #expect(error == .largerThanHost(size: size, ram: host.ram, swap: host.swap))
            }
        }
        #expect(
            GuestMemoryError.largerThanHost(size: 64 << 30, ram: 24105 << 20, swap: 0).description
                == "64 GiB of guest memory exceeds what this host has (24105 MiB of RAM, no swap); request less")
    }

    @Test func memoryIsUnmappedAtTheEnd() throws {
        var numbers: [UInt] = []
        for _ in 0..<50 {
            let memory = try GuestMemory(size: 256 << 20)
            try memory.ram.write(UInt8(1), at: GuestAddress(0))
            unsafe numbers.append(UInt(bitPattern: memory.regions[0].host))
        }
        let maps = String(decoding: try readFile("/proc/self/maps", limit: 1 << 24), as: UTF8.self)
        for number in Set(numbers) {
            #expect(!maps.contains(String(number, radix: 16) + "-" + String(number + (256 << 20), radix: 16)))
        }
    }

    @Test func preallocGivesUpWhenItIsTold() throws {
        let memory = try GuestMemory(size: 256 << 20)
        #expect(throws: GuestMemoryError.interrupted) { try memory.prealloc(isInterrupted: { true }) }
        #expect(try memory.usage().resident == 0)
        // After some steps of each of two threads.
        let asked = Atomic<Int>(0)
        #expect(throws: GuestMemoryError.interrupted) {
            try memory.prealloc(threads: 2, isInterrupted: { asked.wrappingAdd(1, ordering: .relaxed).newValue > 4 })
        }
        let resident = try memory.usage().resident
        #expect(resident > 0 && resident < 256 << 20)
        try memory.prealloc()
        #expect(try memory.usage().resident == 256 << 20)
    }

    @Test func memoryIsFramedByAddressesThatFault() async {
        await #expect(processExitsWith: .signal(SIGSEGV)) {
            let memory = try GuestMemory(size: 4096)
            unsafe (memory.regions[0].host + 4096).storeBytes(of: 1, as: UInt8.self)
        }
        await #expect(processExitsWith: .signal(SIGSEGV)) {
            let memory = try GuestMemory(size: 4096)
            unsafe (memory.regions[0].host - 1).storeBytes(of: 1, as: UInt8.self)
        }
    }

    @Test func sharedMemoryIsSeenThroughItsDescriptor() throws {
        let memory = try GuestMemory(
            layout: [(GuestAddress(0), 8192), (GuestAddress(4 << 30), 4096)], backing: .anonymous, shared: true)
        let descriptor = try #require(memory.descriptor)
        #expect(memory.regions.map(\.offset) == [0, 8192])
        try memory.ram.write([1, 2, 3], at: GuestAddress(4 << 30))
        // A second mapping, as a back-end in another process makes it.
        let other = try Mapping(size: 4096, flags: MAP_SHARED, descriptor: descriptor, offset: memory.regions[1].offset)
        #expect(unsafe UnsafeRawBufferPointer(start: other.start, count: 3).elementsEqual([1, 2, 3]))
        unsafe other.start.storeBytes(of: 77, as: UInt8.self)
        #expect(try memory.ram.readUInt8(at: GuestAddress(4 << 30)) == 77)
        #expect(try GuestMemory(size: 4096).descriptor == nil)
    }

    /// Nobody who has the descriptor takes pages away: the next access would end the process.
    @Test func sharedMemoryKeepsItsSize() throws {
        let memory = try GuestMemory(size: 8192, shared: true)
        let descriptor = try #require(memory.descriptor)
        for size in [0, 4096, 16384] {
            #expect(ftruncate(descriptor, off_t(size)) == -1 && errno == EPERM)
        }
        try memory.ram.write([1, 2, 3], at: GuestAddress(8000))
    }

    @Test("prealloc", arguments: [1, 3, 200])
    func prealloc(threads: Int) throws {
        for shared in [false, true] {
            let memory = try GuestMemory(
                layout: [(GuestAddress(0), 5 << 20), (GuestAddress(4 << 30), 4096)], backing: .anonymous, shared: shared
            )
            #expect(try memory.usage().resident == 0)
            try memory.prealloc(threads: threads)
            #expect(try memory.usage().resident == memory.size)
        }
    }

    /// Never less after more, from none of it to all of it.
    @Test(arguments: [1, 3]) func preallocTellsHowFarItIs(threads: Int) throws {
        let told = Guarded<[UInt64]>([])
        let memory = try GuestMemory(size: 100 << 20)
        try memory.prealloc(
            threads: threads,
            progress: { done, total in
                #expect(total == 100 << 20)
                told.withLock { $0.append(done) }
            })
        let steps = told.withLock { $0 }
        #expect(steps.first == 0 && steps.last == 100 << 20 && steps.count > 3)
        #expect(zip(steps, steps.dropFirst()).allSatisfy { $0 < $1 }, "\(steps)")
    }

    @Test func preallocWithMoreThreadsThanPages() throws {
        let memory = try GuestMemory(size: 4096)
        try memory.prealloc(threads: 8)
        #expect(try memory.usage().resident == 4096)
    }

    @Test func preallocReportsPagesThatCannotBeHad() throws {
        let memory = try GuestMemory(size: 1 << 20, shared: true)
        // A file without pages in its place: a store would be SIGBUS.
        let empty = FileDescriptor(owning: clinux_memfd_create("empty", 0))
        let start = memory.regions[0].host
        #expect(
            unsafe mmap(start, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, empty.rawValue, 0) == start)
        let error = #expect(throws: GuestMemoryError.self) { try memory.prealloc(threads: 2) }
        guard case .prealloc(let size, _)? = error else { Issue.record("\(String(describing: error))"); return }
        #expect(size == 1 << 20)
        #expect(throws: SystemCallError("read", errno: EFAULT)) { try memory.populateByReading(offset: 0, count: 8192) }
    }

    @Test func preallocOnAnOlderKernel() throws {
        let memory = try GuestMemory(size: 1 << 20)
        try memory.populateByReading(offset: 4096, count: 8192)
        #expect(try memory.usage().resident == 8192)
    }

    @Test func transparentHugePagesAreReported() throws {
        let memory = try GuestMemory(size: 8 << 20, backing: .transparent)
        #expect(try memory.usage() == MemoryUsage())
        try memory.prealloc()
        let usage = try memory.usage()
        #expect(usage.resident == 8 << 20)
        // The kernel gives huge ones when it has them: all, some or none, in whole ones.
        #expect(usage.transparentHuge <= 8 << 20 && usage.transparentHuge % (2 << 20) == 0)
        let ordinary = try GuestMemory(size: 8 << 20)
        try ordinary.prealloc()
        let mode = String(
            decoding: try readFile("/sys/kernel/mm/transparent_hugepage/enabled", limit: 100), as: UTF8.self)
        if mode.contains("[madvise]") { #expect(try ordinary.usage().transparentHuge == 0) }
    }

    /// A guest that touches a little of its first 4 MiB has ordinary pages there, whatever comes behind.
    @Test func onlyWhatComesBehindTheFirstHugePagesIsToBeHuge() throws {
        let mode = String(
            decoding: try readFile("/sys/kernel/mm/transparent_hugepage/enabled", limit: 100), as: UTF8.self)
        guard mode.contains("[madvise]") else { return }
        let memory = try GuestMemory(size: 8 << 20, backing: .automatic)
        try memory.ram.write(UInt8(1), at: GuestAddress(0x30_0000))
        #expect(try memory.usage() == MemoryUsage(resident: 4096, dirty: 4096))
        try memory.prealloc()
        let usage = try memory.usage()
        #expect(usage.resident == 8 << 20 && usage.transparentHuge <= 4 << 20)
        // Less than what is left out.
        let small = try GuestMemory(size: 4096, backing: .automatic)
        try small.ram.write(UInt8(1), at: GuestAddress(0))
        #expect(try small.usage().resident == 4096)
    }

    @Test func twoGuestsHaveTheirOwnFigures() throws {
        let guests = try (0..<4).map { _ in try GuestMemory(size: 2 << 20) }
        for (index, guest) in guests.enumerated() {
            try guest.ram.fill(at: GuestAddress(0), count: UInt64(index) * 8192, with: 1)
        }
        for (index, guest) in guests.enumerated() { #expect(try guest.usage().resident == UInt64(index) * 8192) }
    }
}
