// SPDX-License-Identifier: Apache-2.0

/// The metadata of one open file in a format: how the disk, or the file's part of it, is stored, and how that is
/// changed. Each kind of format has a type that conforms, in a folder of its own, and a case in ``Layout``.
///
/// It is independent of requests, engines and other files. It returns how a range is stored and leaves the reading to
/// others, so that many requests can be under way: a tool reads an image by ``locate(_:_:_:)`` and the loads that it
/// asks for (``ImageReader``), and an engine does the same for many requests. What it writes itself is small and rare,
/// by a ``MetadataFile``.
///
/// Every entry is checked when it is used; what is damaged fails the requests that need it and nothing else. Offsets
/// are bytes of the disk, or of the part, that the file has.
protocol ImageMetadata: ~Copyable {
    /// Bytes of the unit that is allocated: a cluster, block or grain.
    var clusterSize: UInt64 { get }
    /// The counters of the caches.
    var statistics: FileStatistics { get }
    /// What was first found wrong, and where.
    var damage: FoundDamage? { get }

    // MARK: - Reading

    /// How the range from `offset` is stored; `offset` is below the disk's size and `length` at least 1.
    /// - Parameter compressed: keeps the entry of a compressed cluster from one call for the range to the next; 0 at
    ///   first.
    mutating func locate(_ offset: UInt64, _ length: UInt64, _ compressed: inout UInt64) -> RangeLookup

    /// Decompresses what was read into its slot. Needs no lock, but one with other loads of this file. Returns whether
    /// that could be done.
    func decompress(_ load: MetadataLoad, _ bytes: Int) -> Bool

    /// A load has ended with `bytes` read, or with an errno value. Returns what became of it, an errno value: it may be
    /// too short or broken.
    @discardableResult
    mutating func complete(_ load: MetadataLoad, bytes: Int, error: Int32) -> Int32

    /// Those who waited for a load have been answered.
    mutating func unpin(_ load: MetadataLoad)

    /// Bytes from an offset on that cannot be read for the same reason.
    /// - Parameter isTable: whether a piece of a table could not be read.
    func unreadableLength(at offset: UInt64, isTable: Bool) -> UInt64

    // MARK: - Changes

    /// Indicates whether ``prepareChange(_:)`` has nothing to do, which is so for all changes but the first. It costs a
    /// request nothing to ask.
    var isPrepared: Bool { get }

    /// Comes before every change: what is no longer true once there was one.
    /// - Returns: the names of the bitmaps that the image has no more, if it had any.
    mutating func prepareChange(_ file: MetadataFile) throws(MetadataError) -> [String]?

    /// What is to be done for `operation` on the range from `offset`, which is inside the disk. Of a discard or zeroes,
    /// what concerns the mapping alone is done here.
    /// - Parameters:
    ///   - diskSize: where the last cluster may be cut.
    ///   - sequence: the number of the next operation.
    mutating func target(
        _ operation: DiskOperation, _ offset: UInt64, _ length: UInt64, diskSize: UInt64, sequence: UInt64,
        _ file: MetadataFile
    ) -> WriteTarget

    /// New clusters for at most `count` of the disk's from `offset` on, which a target has asked for, or the one that
    /// `part` is of. What maps them stays in memory until ``link(_:at:sequence:)`` or ``abandon(_:at:sequence:)``.
    mutating func allocate(
        _ count: UInt64, at offset: UInt64, for part: WriteTarget.Part?, _ file: MetadataFile
    ) throws(MetadataError) -> ClusterRun

    /// The byte of the file where new clusters begin.
    func place(of run: ClusterRun) -> UInt64

    /// The data is in the clusters: from now on they are the disk's.
    mutating func link(_ run: ClusterRun, at offset: UInt64, sequence: UInt64)

    /// The data could not be written: the clusters are free again.
    mutating func abandon(_ run: ClusterRun, at offset: UInt64, sequence: UInt64)

    // MARK: - The steps of a commit, in their order

    /// While a commit has written what counts clusters and not yet what refers to them, the mapping does not change.
    var isLocked: Bool { get set }
    /// Why nothing can be written any more, an errno value, or 0: the host may have lost data that it had accepted.
    var failure: Int32 { get set }

    /// Writes what has to be durable before the mapping is written, and locks the mapping. Returns whether there is any
    /// such thing.
    mutating func beginCommit(_ file: MetadataFile) throws(MetadataError) -> Bool

    /// Writes where that is, if it has moved. Returns whether it has.
    mutating func writeAllocationTable(_ file: MetadataFile) throws(MetadataError) -> Bool

    /// Writes the mapping; what it refers to is durable.
    mutating func writeMapping(_ file: MetadataFile) throws(MetadataError)

    /// The mapping is durable: clusters that it no longer refers to are freed. A failure only costs space.
    /// - Parameter sequence: the number of the first operation in flight, which may use clusters that were discarded
    ///   since.
    mutating func release(before sequence: UInt64, _ file: MetadataFile) throws(MetadataError)

    // MARK: - The end

    /// Marks a file as damaged, if its format supports that, and stops all writes.
    mutating func markDamage(_ file: MetadataFile)

    /// Brings everything to the file.
    /// - Parameter data: the file with the data, which may be the same.
    mutating func close(_ file: MetadataFile, _ data: MetadataFile) throws(MetadataError)
}
