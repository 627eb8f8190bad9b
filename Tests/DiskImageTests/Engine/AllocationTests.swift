// SPDX-License-Identifier: Apache-2.0

import CAllocationCounter
import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// The way of a request allocates nothing, in any build.
@Suite(.timed) struct AllocationTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// Runs `rounds` times `depth` requests and returns how many allocations this thread made for them.
    private func allocations(
        _ engine: inout DiskEngine, _ operation: DiskOperation, rounds: Int, length: Int
    ) throws -> UInt {
        let vectors = UnsafeMutableBufferPointer<iovec>.allocate(capacity: 2 * engine.depth)
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: engine.depth * length, alignment: 4096)
        defer {
            unsafe vectors.deallocate()
            unsafe memory.deallocate()
        }
        var failures = 0, done = 0
        let sectors = (engine.image.size - UInt64(length)) / 512
        var before: UInt = 0
        for round in 0...rounds {
            // The first round is for what the runtime makes once in a process.
            if round == 1 { before = allocation_count() }
            while let request = engine.acquire() {
                let place = unsafe memory.baseAddress! + request * length
                unsafe vectors[2 * request] = iovec(iov_base: place, iov_len: 512)
                unsafe vectors[2 * request + 1] = iovec(iov_base: place + 512, iov_len: length - 512)
                let sector = UInt64(round * 7919 + request * 104_729) % sectors
                unsafe engine.start(
                    request, operation, offset: sector * 512, length: UInt64(length),
                    vectors: vectors.baseAddress! + 2 * request, count: 2)
            }
            try engine.submit()
            while engine.inFlight > 0 {
                guard let completion = try engine.waitForCompletion() else { break }
                if completion.error != 0 { failures += 1 }
                done += 1
                engine.release(completion.request)
            }
        }
        // Unoptimized code makes a generic type's metadata when a way is gone first, once for a type: a few are no
        // allocation a request.
        let count = allocation_count() - before
        #expect(failures == 0 && done == (rounds + 1) * engine.depth)
        return count
    }

    @Test(arguments: [true, false]) func rawRequests(usesRing: Bool) throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 1, count: 1 << 20))
        var engine = try DiskEngine(DiskImage(path: path), depth: 32, usesRing: usesRing)
        for operation in [DiskOperation.write, .read] {
            #expect(try allocations(&engine, operation, rounds: 100, length: 8192) < 32, "\(operation)")
        }
    }

    /// Allocated, zero and unallocated clusters, one after the other, with requests that cross them; L2 slices are read
    /// on the way.
    @Test func qcow2Requests() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "4M")
        qemuIO(
            path,
            (0..<100).map { "write -P 5 \($0 * 40960) 4096" } + (0..<100).map { "write -z \($0 * 40960 + 8192) 4096" })
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly), depth: 32)
        #expect(try allocations(&engine, .read, rounds: 100, length: 16384) < 32)
    }

    /// Writes into clusters that are there already are as cheap as those of a raw file.
    @Test(arguments: [true, false]) func qcow2Writes(usesRing: Bool) throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "preallocation=full", path, "4M")
        var engine = try DiskEngine(DiskImage(path: path), depth: 32, usesRing: usesRing)
        #expect(try allocations(&engine, .write, rounds: 100, length: 16384) == 0)
        #expect(try allocations(&engine, .writeZeroes, rounds: 10, length: 16384) == 0)
    }
}
