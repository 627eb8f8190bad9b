// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

@Suite(.timed) struct BackgroundWriterTests {
    /// A pipe's ends: for reading, for writing.
    private func pipeEnds() throws -> [Int32] {
        var ends: [Int32] = [0, 0]
        try #require(pipe(&ends) == 0)
        return ends
    }

    /// Several threads write through a small buffer to a pipe whose reader is slower: nothing is lost, none of a
    /// thread's bytes overtakes another, and a refused thread is notified of room.
    @Test func severalThreadsWriteAtOnce() throws {
        let ends = try pipeEnds(), source = ends[0]
        defer { close(source) }
        let count = 3, bytes = 40_000
        let room = Guarded(0), monitor = Monitor(), refusals = Guarded(0)
        let seen = Guarded([UInt8]())
        let reader = try Thread.start(name: "reader") {
            var piece = [UInt8](repeating: 0, count: 997)
            while true {
                let got = read(source, &piece, piece.count)
                if got <= 0 { return }
                seen.withLock { $0 += piece[..<got] }
                Thread.yield()
            }
        }
        do {
            let writer = try BackgroundWriter(FileDescriptor(owning: ends[1]), name: "writer", capacity: 1000) {
                monitor.locked {
                    room.withLock { $0 += 1 }
                    monitor.broadcast()
                }
            }
            var threads: [Holder] = []
            for index in 0..<count {
                threads.append(
                    Holder(
                        try Thread.start(name: "producer") {
                            for step in 0..<bytes {
                                let byte = [UInt8(index << 6 | step % 61)]
                                while writer.take(byte.span) == 0 {
                                    refusals.withLock { $0 += 1 }
                                    Thread.yield()
                                }
                            }
                        }))
            }
            for thread in threads { thread.join() }
            while writer.pending > 0 { Thread.yield() }
            // The one that waits for room is notified, however full it was.
            writer.noticeNextWrite()
            let before = room.withLock { $0 }
            #expect(writer.take([UInt8(255)].span) == 1)
            monitor.locked { while room.withLock({ $0 }) == before { monitor.wait() } }
        }
        reader.join()
        let all = seen.withLock { $0 }
        #expect(all.count == count * bytes + 1 && refusals.withLock { $0 } > 0)
        for index in 0..<count {
            let own = all.dropLast().filter { Int($0 >> 6) == index }.map { Int($0 & 63) }
            #expect(own == (0..<bytes).map { $0 % 61 }, "of thread \(index)")
        }
    }

    /// A writer whose descriptor takes nothing ends all the same.
    @Test func theEndDoesNotWaitForAReader() throws {
        let ends = try pipeEnds()
        defer { close(ends[0]) }
        do {
            let writer = try BackgroundWriter(FileDescriptor(owning: ends[1]), name: "writer", capacity: 1 << 20)
            let piece = [UInt8](repeating: 1, count: 1 << 20)
            #expect(writer.take(piece.span) == 1 << 20)
            while writer.pending > (1 << 20) - 65536 { Thread.yield() }
            #expect(writer.pending > 0)
        }
    }

    /// A thread in an array, which is joined once.
    private final class Holder {
        private var thread: Thread?
        init(_ thread: consuming Thread) { self.thread = consume thread }
        func join() { thread.take()?.join() }
    }
}
