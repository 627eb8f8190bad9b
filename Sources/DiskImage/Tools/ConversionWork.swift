internal import Glibc
internal import Linux

/// A conversion under way: what its threads share.
///
/// A thread takes a piece of the disk, reads it, looks for zeroes, compresses. Pieces have numbers, and clusters of the new image are given out in
/// the order of these numbers, so that the image is the same whatever the threads' luck. Then the thread writes, while others do.
final class ConversionWork: @unchecked Sendable {
    /// A piece of the disk and its number.
    struct Piece {
        var offset: UInt64
        var length: UInt64
        var number: UInt64
    }

    let conversion: ImageConversion
    let sourceOptions: DiskImageOptions
    let size: UInt64
    /// Bytes of a piece, a multiple of `unit`.
    let pieceSize: UInt64
    /// What is found to be zero as a whole: a cluster, or a page of a raw image.
    let unit: UInt64
    /// Whether also zeroes are dealt with, since they have to be given places, or made.
    let coversZeroes: Bool
    private(set) var file: NewFile
    let identities: [ImageFile.Identity]
    /// What encrypts the new image.
    let cipher: SectorCipher?

    // What follows is used within the monitor only: hence `Sendable`.
    private let monitor = Monitor()
    private var planner: ImageReader
    private var position: UInt64 = 0
    private var nextNumber: UInt64 = 0
    private var turn: UInt64 = 0
    private var builder: QCOW2Builder?
    private var failure: DiskImageError?
    private var running: Int

    /// Bytes that a thread's buffer holds: a huge page.
    private static let preferredPiece: UInt64 = 2 << 20

    init(_ conversion: ImageConversion, _ sourceOptions: DiskImageOptions, _ planner: consuming ImageReader, _ file: consuming NewFile) throws(DiskImageError) {
        let isRaw = conversion.format == .raw
        let volume = try conversion.options.encryption?.makeVolume(conversion.target)
        cipher = try volume?.cipher(path: conversion.target)
        size = planner.image.size
        identities = planner.image.identities
        unit = isRaw ? 4096 : conversion.options.clusterSize
        pieceSize = max(unit, Self.preferredPiece)
        coversZeroes = isRaw ? file.deviceSize != nil || conversion.preallocation == .full : conversion.preallocation != .off
        builder = isRaw ? nil : QCOW2Builder(conversion.options, size: planner.image.size, backing: nil, volume: volume)
        running = conversion.threads
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
        if builder != nil {
            let end = try builder?.finish(file) ?? 0
            if conversion.preallocation == .falloc { try file.reserve(0, end) }
        }
        try file.publish(durably: conversion.durably)
    }

    private func runThreads(_ progress: (ImageProgress) -> Bool) throws(DiskImageError) {
        // Threads are joined when the array goes: whatever happens, none outlives the work.
        let count = conversion.threads
        let threads = ThreadPool()
        for _ in 0..<count {
            do throws(SystemCallError) {
                try threads.add(Thread.start(name: "convert") { [self] in
                    do throws(DiskImageError) {
                        try ConversionWorker(self).run()
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
            if !progress(ImageProgress(done: done, total: size)) { stop(.interrupted(path: conversion.target)) }
        }
        _ = progress(ImageProgress(done: size, total: size))
    }

    // MARK: - For the threads

    /// The next piece of the disk that has something to be done; nil at the end, or when another thread has failed.
    func nextPiece() throws(DiskImageError) -> Piece? {
        try monitor.locked { () throws(DiskImageError) in
            while failure == nil, position < size {
                if !coversZeroes {
                    let extent = try planner.extent(at: position, limit: size - position)
                    let whole = extent.offset + extent.length == size ? extent.length : extent.length / unit * unit
                    if extent.readsAsZeroes, whole > 0 {
                        position += whole
                        continue
                    }
                }
                let length = min(pieceSize, size - position)
                let piece = Piece(offset: position, length: length, number: nextNumber)
                position += length
                nextNumber += 1
                return piece
            }
            return nil
        }
    }

    /// Gives places in the new image to a piece, after those before it.
    /// - Returns: false when the work has been given up.
    func place(_ piece: Piece, _ body: (inout QCOW2Builder, borrowing NewFile) throws(DiskImageError) -> Void) throws(DiskImageError) -> Bool {
        try monitor.locked { () throws(DiskImageError) in
            while turn != piece.number, failure == nil { monitor.wait() }
            guard failure == nil else { return false }
            if builder != nil { try body(&builder!, file) }
            turn += 1
            monitor.broadcast()
            return true
        }
    }

    /// Gives the work up; the first reason is the one that is told.
    func stop(_ error: DiskImageError) {
        monitor.locked {
            if failure == nil { failure = error }
            monitor.broadcast()
        }
    }
}

/// Threads that are waited for when this goes.
private final class ThreadPool {
    private var threads: [Slot] = []

    private final class Slot {
        let thread: Thread
        init(_ thread: consuming Thread) { self.thread = thread }
    }

    func add(_ thread: consuming Thread) { threads.append(Slot(thread)) }
}
