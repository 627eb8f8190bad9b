// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// A state of the disk that an image keeps beside the current one.
public struct DiskSnapshot: Equatable, Sendable {
    /// The identifier, in images of swkvm and QEMU a number, unique in the image.
    public let id: String
    public let name: String
    /// The creation time: seconds since 1970 and nanoseconds.
    public let seconds: UInt32
    public let nanoseconds: UInt32
    /// Nanoseconds that the guest had run.
    public let guestNanoseconds: UInt64
    /// Bytes of the guest's RAM and devices that were kept with it; 0 for a disk alone.
    public let stateSize: UInt64
    /// Bytes of the disk.
    public let size: UInt64
}

/// The table of an image's snapshots.
struct QCOW2SnapshotTable: Sendable {
    struct Entry: Sendable {
        var snapshot: DiskSnapshot
        /// Id and name as they are in the file, which need not be text.
        var id: [UInt8]
        var name: [UInt8]
        var l1Offset: UInt64
        var l1Size: Int
        /// All of the entry's extra data: what we do not know is kept.
        var extra: [UInt8]
        /// The low half of the state's size, for those who do not know of the extra data.
        var stateSize32: UInt32
    }

    var entries: [Entry] = []
    /// Bytes of the table in the file.
    private(set) var length: UInt64 = 0
    /// Snapshots whose entries are not in the file any more.
    private(set) var lostCount = 0

    static let maximumCount = 65536
    /// The most bytes of the table and of an entry's extra data, as in QEMU.
    private static let maximumLength: UInt64 = 64 << 20
    static let maximumExtra = 1024
    /// Bytes of an entry before its extra data, id and name.
    static let fixedLength = 40

    init() {}

    /// Reads and checks the table that a header names.
    /// - Parameter allowingCut: whether the file may end before the table does; those entries that are whole are read
    ///   then.
    init(_ header: QCOW2Header, _ file: TableFile, fileSize: UInt64, allowingCut: Bool = false) throws(DiskImageError) {
        func require(_ condition: Bool, _ reason: @autoclosure () -> String) throws(DiskImageError) {
            if !condition { throw .invalid(path: file.path, reason: reason()) }
        }
        guard header.snapshotCount > 0 else { return }
        let start = header.snapshotTableOffset
        try require(
            header.snapshotCount <= Self.maximumCount,
            "\(header.snapshotCount) snapshots; \(Self.maximumCount) are possible")
        try require(
            start & (header.clusterSize - 1) == 0, "a snapshot table at byte \(start), which is not cluster-aligned")
        for index in 0..<header.snapshotCount {
            let place = start &+ length
            func part(_ count: Int, at offset: UInt64) throws(DiskImageError) -> [UInt8] {
                guard place < fileSize, offset <= fileSize - place, UInt64(count) <= fileSize - place - offset else {
                    throw .truncated(
                        path: file.path, what: "the snapshot table", needed: place &+ offset &+ UInt64(count),
                        size: fileSize)
                }
                return try file.read(count, at: place + offset)
            }
            if allowingCut, try !Self.isWhole(at: place, file, fileSize) {
                lostCount = header.snapshotCount - index
                return
            }
            let fixed = try part(40, at: 0)
            let idLength = Int(fixed.bigEndian16(at: 12)), nameLength = Int(fixed.bigEndian16(at: 14))
            let extraLength = Int(fixed.bigEndian32(at: 36))
            try require(extraLength <= Self.maximumExtra, "\(extraLength) bytes of extra data in snapshot \(index)")
            try require(
                header.version < 3 || extraLength >= 16, "snapshot \(index) does not record the size of its disk")
            let variable = try part(extraLength + idLength + nameLength, at: 40)
            let extra = Array(variable.prefix(extraLength))
            let l1Size = Int(fixed.bigEndian32(at: 8))
            try require(
                l1Size * 8 <= QCOW2Header.maximumL1Size, "an L1 table of \(l1Size) entries in snapshot \(index)")
            let stateSize32 = fixed.bigEndian32(at: 32)
            let id = Array(variable[extraLength..<extraLength + idLength]),
                name = Array(variable[(extraLength + idLength)...])
            entries.append(
                Entry(
                    snapshot: DiskSnapshot(
                        id: String(raw: id), name: String(raw: name),
                        seconds: fixed.bigEndian32(at: 16), nanoseconds: fixed.bigEndian32(at: 20),
                        guestNanoseconds: fixed.bigEndian64(at: 24),
                        stateSize: extraLength >= 8 ? extra.bigEndian64(at: 0) : UInt64(stateSize32),
                        size: extraLength >= 16 ? extra.bigEndian64(at: 8) : header.size),
                    id: id, name: name, l1Offset: fixed.bigEndian64(at: 0), l1Size: l1Size, extra: extra,
                    stateSize32: stateSize32))
            length += UInt64((40 + variable.count + 7) & ~7)
            try require(length <= Self.maximumLength, "a snapshot table of more than \(Self.maximumLength) bytes")
        }
    }

    /// Indicates whether an entry's end is in the file.
    private static func isWhole(at place: UInt64, _ file: TableFile, _ fileSize: UInt64) throws(DiskImageError) -> Bool
    {
        guard place < fileSize, fileSize - place >= 40 else { return false }
        let fixed = try file.read(40, at: place)
        let variable =
            UInt64(fixed.bigEndian32(at: 36)) + UInt64(fixed.bigEndian16(at: 12)) + UInt64(fixed.bigEndian16(at: 14))
        return variable <= fileSize - place - 40
    }

    /// The snapshot with this id or else, as qemu-img has it, with this name.
    func index(of word: String) -> Int? {
        // As bytes: what Unicode takes for equal are two names.
        let word = word.rawBytes
        return entries.firstIndex { $0.id == word } ?? entries.firstIndex { $0.name == word }
    }

    /// A number that is greater than every one used as an id.
    var freeID: String {
        String((entries.compactMap { UInt64($0.snapshot.id) }.max() ?? 0) &+ 1)
    }

    /// The table in the file's form.
    func encoded() -> [UInt8] { entries.flatMap(\.encoded) }
}

extension QCOW2SnapshotTable.Entry {
    /// The entry in the file's form: whole words of 8 bytes.
    var encoded: [UInt8] {
        var fixed = [UInt8](repeating: 0, count: QCOW2SnapshotTable.fixedLength)
        fixed.store(l1Offset, at: 0)
        fixed.store(UInt32(l1Size), at: 8)
        fixed.store(UInt32(id.count) << 16 | UInt32(name.count), at: 12)
        fixed.store(snapshot.seconds, at: 16)
        fixed.store(snapshot.nanoseconds, at: 20)
        fixed.store(snapshot.guestNanoseconds, at: 24)
        fixed.store(stateSize32, at: 32)
        fixed.store(UInt32(extra.count), at: 36)
        let bytes = fixed + extra + id + name
        return bytes + [UInt8](repeating: 0, count: (8 - bytes.count % 8) % 8)
    }
}
