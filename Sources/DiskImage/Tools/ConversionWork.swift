// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// A conversion under way: what its threads share.
///
/// A thread takes a piece of the disk, reads it, looks for zeroes, compresses. Pieces have numbers, and clusters of the
/// new image are given out in the order of these numbers, so that the image is the same whatever the threads' luck.
/// Then the thread writes, while others do.
final class ConversionWork: @unchecked Sendable {
    /// A piece of the disk and its number.
    struct Piece {
        var offset: UInt64
        var length: UInt64
        var number: UInt64
        /// Indicates whether it is known to be zero, so that nothing is read. It may be longer than a buffer then.
        var readsAsZeroes = false
    }

    let conversion: ImageConversion
    let sourceOptions: DiskImageOptions
    let size: UInt64
    /// Bytes of a piece, a multiple of `unit`.
    let pieceSize: UInt64
    /// What is found to be zero as a whole: a cluster, or a page of a raw image.
    let unit: UInt64
    /// Indicates whether also zeroes are dealt with, since they have to be given places, or made.
    let coversZeroes: Bool
    private(set) var file: NewFile
    let identities: [ImageFile.Identity]
    /// The remote disks that the source and what the new image stands on consist of, or stand on.
    let remote: NBDDisk?
    let remoteBase: NBDDisk?
    /// See ``ImagePlan``.
    let flatStart: UInt64?
    let isStream: Bool
    let keepsHoles: Bool
    let extents: NewExtents?
    /// What encrypts the new image.
    let cipher: SectorCipher?
    /// What of the source cannot be read, if that is no error.
    let salvage: SalvageLog?
    /// A test's system calls for reading the source.
    let calls: FileCalls

    // The planner is used within its own monitor, as it may wait for the source; what follows within the other one:
    // hence `Sendable`.
    private let planning = Monitor()
    private var planner: ImageReader
    private let monitor = Monitor()
    private var position: UInt64 = 0
    private var nextNumber: UInt64 = 0
    private var turn: UInt64 = 0
    private var plan: ImagePlan
    private var failure: DiskImageError?
    private var running: Int
    /// Threads that still have pieces.
    private var working: Int

    /// Bytes that a thread's buffer holds: a huge page.
    private static let preferredPiece: UInt64 = 2 << 20
    /// Bytes that are zeroed in one request to the kernel or a server.
    private static let largestClear: UInt64 = 1 << 30

    init(
        _ conversion: ImageConversion, _ sourceOptions: DiskImageOptions, _ planner: consuming ImageReader,
        _ remoteBase: NBDDisk?,
        _ file: consuming NewFile, _ plan: ImagePlan, _ cipher: consuming SectorCipher?, _ salvage: SalvageLog?
    ) {
        self.cipher = cipher
        self.salvage = salvage
        calls = conversion.calls
        let isFlat = plan.flatStart != nil
        size = planner.image.size
        identities = planner.image.identities
        remote = planner.image.remote
        self.remoteBase = remoteBase
        unit = plan.unit
        flatStart = plan.flatStart
        isStream = plan.isStream
        keepsHoles = plan.keepsHoles
        extents = plan.extents
        pieceSize = max(unit, Self.preferredPiece)
        coversZeroes =
            isFlat ? file.deviceSize != nil || conversion.preallocation == .full : conversion.preallocation != .off
        self.plan = plan
        running = conversion.threads
        working = running
        self.conversion = conversion
        self.sourceOptions = sourceOptions
        self.planner = planner
        self.file = file
    }

    /// Does all of it. What was made has its name when this returns.
    func run(_ progress: (ImageProgress) -> Bool) throws(DiskImageError) {
        do throws(DiskImageError) { try runThreads(progress) } catch {
            // Some of them may have started.
            stop(error)
            throw error
        }
        if let failure { throw failure }
        try plan.writeMetadata(file, conversion.preallocation)
        try plan.publish(&file, durably: conversion.durably)
    }

    private func runThreads(_ progress: (ImageProgress) -> Bool) throws(DiskImageError) {
        // Threads are joined when the array goes: whatever happens, none outlives the work.
        let count = conversion.threads
        let threads = ThreadPool()
        for _ in 0..<count {
            do throws(SystemCallError) {
                try threads.add(
                    Thread.start(name: "convert") { [self] in
                        do throws(DiskImageError) {
                            try ConversionWorker(self).run()
                            try flushIfLast()
                        } catch {
                            stop(error)
                        }
                        monitor.locked {
                            running -= 1
                            monitor.broadcast()
                        }
                    })
            } catch {
                throw .system(path: conversion.target, error)
            }
        }
        while true {
            let (isOver, done) = monitor.locked {
                if running > 0 { monitor.wait(milliseconds: 100) }
                return (running == 0, min(position, size))
            }
            if isOver { break }
            if !progress(ImageProgress(done: done, total: size)) { stop(interruption) }
        }
        // Nothing has its name yet.
        if failure == nil, !progress(ImageProgress(done: size, total: size)) { stop(interruption) }
    }

    private var interruption: DiskImageError {
        file.deviceSize == nil ? .interrupted(path: conversion.target) : .interruptedInPlace(path: conversion.target)
    }

    // MARK: - For the threads

    /// The next piece of the disk that has something to be done; nil at the end, or when another thread has failed.
    func nextPiece() throws(DiskImageError) -> Piece? {
        try planning.locked { () throws(DiskImageError) in
            while true {
                let (isOver, position) = monitor.locked { (failure != nil, self.position) }
                guard !isOver, position < size else { return nil }
                // Zeroes may differ from what is below the new image; where they are written in place, long ranges are
                // zeroed together.
                let passesOver = !coversZeroes && conversion.backing == nil
                if passesOver || file.deviceSize != nil {
                    let extent = try planner.extent(at: position, limit: size - position)
                    let whole = extent.offset + extent.length == size ? extent.length : extent.length / unit * unit
                    if extent.readsAsZeroes, whole > 0 {
                        if !passesOver { return take(position, min(whole, Self.largestClear), readsAsZeroes: true) }
                        monitor.locked { self.position += whole }
                        continue
                    }
                }
                // A piece belongs to one file.
                return take(
                    position,
                    min(pieceSize, size - position, extents.map { $0.extentSize - position % $0.extentSize } ?? .max))
            }
        }
    }

    private func take(_ offset: UInt64, _ length: UInt64, readsAsZeroes: Bool = false) -> Piece {
        monitor.locked {
            defer {
                position += length
                nextNumber += 1
            }
            return Piece(offset: offset, length: length, number: nextNumber, readsAsZeroes: readsAsZeroes)
        }
    }

    /// A thread has no more pieces. The last one waits until a remote disk has stored all: a wait for a server can be
    /// cancelled as long as a thread of the work waits.
    private func flushIfLast() throws(DiskImageError) {
        let isLast = monitor.locked {
            working -= 1
            return working == 0 && failure == nil
        }
        if isLast { try file.remote?.flush() }
    }

    /// Gives places in the new image to a piece, after those before it.
    /// - Returns: false if the work was cancelled.
    func place(
        _ piece: Piece, _ body: (inout any ImageBuilder, borrowing NewFile) throws(DiskImageError) -> Void
    ) throws(DiskImageError) -> Bool {
        try monitor.locked { () throws(DiskImageError) in
            while turn != piece.number, failure == nil { monitor.wait() }
            guard failure == nil else { return false }
            if plan.builder != nil { try body(&plan.builder!, file) }
            turn += 1
            monitor.broadcast()
            return true
        }
    }

    /// Writes a buffer at a place that the builder has given, or at its place of the disk where that lies as it is.
    func write(_ bytes: IOMemory, at place: UInt64) throws(DiskImageError) {
        if let extents { try extents.write(bytes, at: place) } else { try file.write(bytes, at: place) }
    }

    /// Makes a range of a disk that lies as it is zero.
    func clear(_ place: UInt64, _ length: UInt64) throws(DiskImageError) {
        if let extents { return try extents.writeZeroes(place, length) }
        if file.deviceSize != nil { try file.clear(place, length) } else { try file.writeZeroes(place, length) }
    }

    /// Stops the work; the first error is reported.
    func stop(_ error: DiskImageError) {
        monitor.locked {
            if failure == nil { failure = error }
            monitor.broadcast()
        }
        // No thread has to wait for a server any more.
        remote?.cancel()
        remoteBase?.cancel()
        file.remote?.cancel()
    }
}

/// Threads that are waited for when this goes.
final class ThreadPool {
    private var threads: [Slot] = []

    private final class Slot {
        let thread: Thread
        init(_ thread: consuming Thread) { self.thread = thread }
    }

    func add(_ thread: consuming Thread) { threads.append(Slot(thread)) }
}
