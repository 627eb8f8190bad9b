// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The number of threads that can run concurrently.
var usableProcessors: Int { Int(clinux_usable_processors()) }

/// The RAM of one guest: its mappings, and the table of regions that every ``GuestRAM`` view points to.
///
/// One stretch of host memory serves the regions on both sides of the hole [3 GiB, 4 GiB). It lies within a
/// reservation that cannot be accessed, so that an overrun faults, the start is aligned for huge pages, and no
/// neighbour's figures are counted as the guest's.
@safe public final class GuestMemory: Sendable {
    /// Bytes of RAM in all.
    public let size: UInt64
    public let backing: MemoryBacking
    /// The regions by ascending address: RAM from 0 up to the hole, and the rest from 4 GiB up.
    public let regions: [MemoryRegion]

    /// The memfd of shared memory, for a back-end in another process; ``MemoryRegion/offset`` is where a region starts
    /// in it.
    public let descriptor: Int32?

    /// A view for a thread that works on the memory; valid while this object lives.
    public let ram: GuestRAM

    private let reservation: Mapping
    private let file: FileDescriptor?
    /// What ``usage()`` reads: opened with the memory, so that nothing is opened later. nil where there is no /proc.
    let mappings: FileDescriptor?
    /// /dev/zero, once it was needed: it is open then for the next boot too.
    let zeros = Guarded<FileDescriptor?>(nil)
    // Written once, before any other thread sees it; freed by `deinit`. Views only read it.
    private nonisolated(unsafe) let table: UnsafeMutableBufferPointer<MemoryRegion>

    /// Maps RAM for a guest; the pages come when they are touched, except that huge ones are reserved now.
    /// - Parameters:
    ///   - size: bytes, a multiple of the backing's page size, at most what the host has.
    ///   - shared: whether the memory is a memfd that other processes can map.
    public convenience init(
        size: UInt64, backing: MemoryBacking = .anonymous, shared: Bool = false
    ) throws(GuestMemoryError) {
        let low = min(size, GuestAddress.hole.lowerBound.rawValue)
        try self.init(
            layout: [(GuestAddress(0), low), (GuestAddress.hole.upperBound, size - low)].filter { $0.1 > 0 },
            backing: backing, shared: shared)
    }

    /// Maps RAM in the given regions, each a start and a size, in ascending order and apart from each other.
    package init(
        layout: [(start: GuestAddress, size: UInt64)], backing: MemoryBacking, shared: Bool
    ) throws(GuestMemoryError) {
        let size = layout.reduce(0) { $0 &+ $1.size }
        try Self.check(size: size, backing: backing)
        if shared {
            let file = try Self.makeFile(size: size, backing: backing)
            descriptor = file.rawValue
            self.file = consume file
        } else {
            descriptor = nil
            file = nil
        }
        reservation = try Self.reserve(size: size, alignment: backing.alignment)
        let host = unsafe Self.alignedStart(of: reservation, to: backing.alignment)
        unsafe try Self.map(size: size, at: host, backing: backing, descriptor: descriptor)
        self.size = size
        self.backing = backing
        mappings = try? FileDescriptor.open("/proc/self/smaps", O_RDONLY)

        var regions: [MemoryRegion] = []
        var offset: UInt64 = 0
        for (start, size) in layout {
            unsafe regions.append(MemoryRegion(start: start, size: size, host: host + Int(offset), offset: offset))
            offset &+= size
        }
        self.regions = regions
        unsafe table = .allocate(capacity: regions.count)
        _ = unsafe table.initialize(from: regions)
        unsafe ram = GuestRAM(table: UnsafePointer(table.baseAddress!), count: regions.count)
    }

    deinit {
        unsafe table.deallocate()
    }

    // MARK: Mapping

    private static func check(size: UInt64, backing: MemoryBacking) throws(GuestMemoryError) {
        guard size > 0 else { throw .empty }
        guard size % backing.pageSize == 0 else { throw .notPageMultiple(size: size, pageSize: backing.pageSize) }
        let host = HostMemory()
        guard size <= host.ram &+ host.swap else { throw .largerThanHost(size: size, ram: host.ram, swap: host.swap) }
        if case .hugePages(let page) = backing, let shortage = try HugePagePool(page).shortage(for: size, in: page) {
            throw .hugePages(shortage)
        }
    }

    private static func makeFile(size: UInt64, backing: MemoryBacking) throws(GuestMemoryError) -> FileDescriptor {
        var flags = UInt32(MFD_CLOEXEC | MFD_ALLOW_SEALING)
        if case .hugePages(let page) = backing { flags |= UInt32(MFD_HUGETLB) | page.encoded }
        let number = unsafe clinux_memfd_create("guest-ram", flags)
        guard number >= 0 else { throw .refused(size: size, .last("memfd_create")) }
        let file = FileDescriptor(owning: number)
        guard ftruncate(number, off_t(truncatingIfNeeded: size)) == 0 else {
            throw .refused(size: size, .last("ftruncate"))
        }
        // A back-end that has the descriptor could take the pages away, and the next access would be a SIGBUS.
        guard clinux_seal_size(number) == 0 else { throw .refused(size: size, .last("fcntl(F_ADD_SEALS)")) }
        return file
    }

    /// Address space for the memory, with at least a page before and behind it.
    private static func reserve(size: UInt64, alignment: UInt64) throws(GuestMemoryError) -> Mapping {
        do {
            return try Mapping(
                size: Int(size &+ 2 &* alignment), protection: PROT_NONE, flags: MAP_PRIVATE | MAP_ANONYMOUS)
        } catch {
            throw .refused(size: size, error)
        }
    }

    private static func alignedStart(of reservation: borrowing Mapping, to alignment: UInt64) -> UnsafeMutableRawPointer
    {
        let start = unsafe UInt(bitPattern: reservation.start)
        let aligned = (start &+ UInt(alignment)) & ~UInt(alignment &- 1)
        // At most `alignment` bytes on, of the two that the reservation has besides the memory.
        let offset = Int(aligned &- start)
        return unsafe reservation.start + offset
    }

    /// Puts the memory into the reservation, whose end unmaps it.
    private static func map(
        size: UInt64, at host: UnsafeMutableRawPointer, backing: MemoryBacking, descriptor: Int32?
    ) throws(GuestMemoryError) {
        var flags = MAP_FIXED | (descriptor == nil ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED)
        if case .hugePages(let page) = backing, descriptor == nil { flags |= MAP_HUGETLB | Int32(page.encoded) }
        let result = unsafe mmap(host, Int(size), PROT_READ | PROT_WRITE, flags, descriptor ?? -1, 0)
        guard unsafe result == host else {
            let error = SystemCallError.last("mmap")
            // Another process may have taken the pages since they were counted.
            if case .hugePages(let page) = backing, let shortage = try HugePagePool(page).shortage(for: size, in: page)
            {
                throw .hugePages(shortage)
            }
            throw .refused(size: size, error)
        }
        // Hints: a kernel without transparent huge pages gives none, and ``usage()`` shows that.
        if let first = backing.firstAdvisedByte, first < size {
            // The rest of the mapping of `size` bytes.
            unsafe madvise(host + Int(first), Int(size - first), MADV_HUGEPAGE)
        }
        unsafe madvise(host, Int(size), MADV_DONTDUMP)
        unsafe madvise(host, Int(size), MADV_DONTFORK)
    }
}
