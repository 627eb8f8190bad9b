// SPDX-License-Identifier: Apache-2.0

import CLinux
import CSystemCallFilter
import Glibc
import Linux
import TestSupport
import Testing

@Suite(.timed) struct IORingTests {
    /// A file without a name.
    private func file() throws -> FileDescriptor {
        let number = unsafe clinux_memfd_create("ring", 0)
        try #require(number >= 0)
        return FileDescriptor(owning: number)
    }

    @Test func operationsComeBackWithTheirTokensAndWakeEpoll() throws {
        let file = try file(), epoll = try Epoll(), ring = try IORing(entries: 8)
        try epoll.add(ring.rawValue, .input, token: 7)
        #expect(try epoll.wait(timeout: 0) { _, _ in } == 0)

        var text = Array("0123456789".utf8), answer = [UInt8](repeating: 0, count: 10)
        try unsafe text.withUnsafeMutableBytes { text in
            var vectors = unsafe [
                iovec(iov_base: text.baseAddress, iov_len: 4), iovec(iov_base: text.baseAddress! + 4, iov_len: 6),
            ]
            try unsafe ring.write(file.rawValue, &vectors, count: 2, at: 100, token: 1)
            try ring.submit()
            try ring.wait()
        }
        var seen: [UInt64] = []
        try epoll.wait(timeout: 0) { token, _ in seen.append(token) }
        #expect(seen == [7])
        var completion = ring.nextCompletion()
        #expect(completion?.token == 1 && completion?.result == 10)
        #expect(ring.nextCompletion() == nil)

        try unsafe answer.withUnsafeMutableBytes { answer in
            var vector = unsafe iovec(iov_base: answer.baseAddress, iov_len: 10)
            try unsafe ring.read(file.rawValue, &vector, count: 1, at: 102, token: .max)
            try ring.submit()
            try ring.wait()
        }
        completion = ring.nextCompletion()
        #expect(completion?.token == .max && completion?.result == 8)
        #expect(answer == Array("23456789".utf8) + [0, 0])

        try ring.allocate(file.rawValue, mode: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at: 100, length: 4, token: 2)
        try ring.synchronize(file.rawValue, token: 3)
        try ring.synchronize(-1, token: 4)
        try ring.submit()
        var results: [UInt64: Int32] = [:]
        while results.count < 3 {
            try ring.wait()
            while let completion = ring.nextCompletion() { results[completion.token] = completion.result }
        }
        #expect(results == [2: 0, 3: 0, 4: -EBADF])
    }

    @Test func moreOperationsThanEntriesAreTaken() throws {
        let file = try file(), ring = try IORing(entries: 4)
        for token in 0..<20 as Range<UInt64> { try ring.synchronize(file.rawValue, token: token) }
        try ring.submit()
        var tokens: Set<UInt64> = []
        while tokens.count < 20 {
            try ring.wait()
            while let completion = ring.nextCompletion() { tokens.insert(completion.token) }
        }
        #expect(tokens == Set(0..<20))
    }

    /// Where the kernel fails every call with an error that may pass, it is not asked for ever: what it has not taken
    /// can be taken back, and what it has taken ends all the same.
    @Test(arguments: [EAGAIN, EBUSY, ENOMEM]) func aFailureThatDoesNotPassIsReported(error: Int32) throws {
        let file = try file(), event = try EventFD(), number = file.rawValue
        let failure = Guarded<String?>(nil)
        // The filter is for good: a thread of its own has it.
        let thread = try Thread.start(name: "refused", stackSize: 1 << 20) {
            do {
                let ring = try IORing(entries: 4)
                try ring.poll(event.rawValue, token: 1)
                try ring.submit()
                try #require(fail_system_call(io_uring_enter_number(), error) == 0)
                for token in 2..<6 as Range<UInt64> { try ring.synchronize(number, token: token) }
                for _ in 0..<3 {
                    #expect(throws: SystemCallError("io_uring_enter", errno: error)) { try ring.submit() }
                }
                #expect(throws: SystemCallError("io_uring_enter", errno: error)) { try ring.wait() }
                #expect(throws: SystemCallError.self) { try ring.synchronize(number, token: 6) }
                #expect(ring.queued() == 4)
                #expect([ring.reclaim(), ring.reclaim(), ring.reclaim(), ring.reclaim()] == [5, 4, 3, 2])
                #expect(ring.reclaim() == nil)
                event.signal()
                try ring.submit()
                var ready = pollfd(fd: ring.rawValue, events: Int16(POLLIN), revents: 0)
                #expect(unsafe poll(&ready, 1, -1) == 1)
                try ring.wait()
                #expect(ring.nextCompletion()?.token == 1)
            } catch { failure.withLock { $0 = "\(error)" } }
        }
        thread.join()
        #expect(failure.withLock { $0 } == nil)
    }

    @Test func aRingIsRestrictedWhereTheKernelCan() throws {
        let ring = try IORing(entries: 2), event = try EventFD()
        // An unrestricted ring takes one; Linux 5.10 or later.
        #expect(register_ring_event(ring.rawValue, event.rawValue) == EACCES)
    }
}
