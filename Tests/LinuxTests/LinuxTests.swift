// SPDX-License-Identifier: Apache-2.0

import CLinux
import Linux
import TestSupport
import Testing

@Suite(.timed) struct PendingSignalTests {
    @Test func aBlockedSignalWaitsUntilItIsTaken() {
        let set = SignalSet([SIGUSR1, SIGUSR2])
        let before = set.block()
        defer { before.restore() }
        #expect(set.pending() == nil && set.takePending() == nil)
        pthread_kill(pthread_self(), SIGUSR2)
        #expect(set.pending() == SIGUSR2 && set.pending() == SIGUSR2)
        #expect(SignalSet([SIGUSR1]).pending() == nil)
        #expect(set.takePending() == SIGUSR2 && set.pending() == nil)
    }
}

@Suite(.timed) struct LinuxTests {
    @Test func errorsNameTheCallAndTheReason() {
        #expect(SystemCallError("open", errno: ENOENT).description == "open: No such file or directory")
        #expect(throws: SystemCallError("open", errno: ENOENT)) {
            _ = try FileDescriptor.open("/no/such/file", O_RDONLY)
        }
    }

    @Test func aDescriptorIsClosedWithItsValue() throws {
        let number: Int32
        do {
            let file = try FileDescriptor.open("/dev/null", O_RDWR)
            number = file.rawValue
            #expect(clinux_fcntl_value(number, F_GETFD, 0) == FD_CLOEXEC)
        }
        #expect(clinux_fcntl_value(number, F_GETFD, 0) == -1)
    }

    @Test func wholeFilesAreReadUpToALimit() throws {
        #expect(try !readFile("/proc/self/status", limit: 1 << 20).isEmpty)
        #expect(throws: SystemCallError("read", errno: EFBIG)) { _ = try readFile("/proc/self/status", limit: 10) }
    }

    @Test func eventsCountAndWake() throws {
        let event = try EventFD()
        let epoll = try Epoll()
        try epoll.add(event.rawValue, .input, token: 42)
        #expect(try epoll.wait(timeout: 0) { _, _ in Issue.record("nothing was rung") } == 0)
        event.signal()
        event.signal()
        var seen: [UInt64] = []
        #expect(try epoll.wait(timeout: -1) { token, _ in seen.append(token) } == 1)
        #expect(seen == [42])
        #expect(event.drain() == 2)
        #expect(event.drain() == 0)
        epoll.remove(event.rawValue)
        event.signal()
        #expect(try epoll.wait(timeout: 0) { _, _ in } == 0)
    }

    @Test func threadsHaveNamesAndAreJoined() throws {
        final class Result: Sendable { let name = Guarded("") }
        let result = Result()
        try Thread.start(name: "a-name-longer-than-15") {
            let name = try? readFile("/proc/thread-self/comm", limit: 64)
            result.name.withLock { $0 = String(decoding: name ?? [], as: UTF8.self) }
        }.join()
        #expect(result.name.withLock { $0 } == "a-name-longer-t\n")
    }

    @Test func pinningToAnAbsentCPUIsRefused() throws {
        let stop = try EventFD()
        let number = stop.rawValue
        let thread = try Thread.start(name: "pinned") {
            var descriptor = pollfd(fd: number, events: Int16(POLLIN), revents: 0)
            _ = unsafe poll(&descriptor, 1, -1)
        }
        try thread.pin(toCPU: 0)
        #expect(throws: SystemCallError("pthread_setaffinity_np", errno: EINVAL)) { try thread.pin(toCPU: 100_000) }
        stop.signal()
        thread.join()
    }

    @Test func blockedSignalsArriveOnTheirDescriptor() throws {
        final class Seen: Sendable { let number = Guarded<Int32?>(nil) }
        let seen = Seen()
        // A thread of its own, since a mask belongs to a thread and the test runner's are shared.
        try Thread.start(name: "signals") {
            let set = SignalSet([SIGUSR2])
            set.block()
            guard let descriptor = try? set.descriptor() else { return }
            pthread_kill(pthread_self(), SIGUSR2)
            seen.number.withLock { $0 = SignalSet.next(from: descriptor) }
        }.join()
        #expect(seen.number.withLock { $0 } == SIGUSR2)
    }

    /// A signal that came while it was blocked would end the process when it is let through again.
    @Test func pendingSignalsAreDiscarded() throws {
        final class Count: Sendable { let value = Guarded(0) }
        let count = Count()
        try Thread.start(name: "signals") {
            let set = SignalSet([SIGPIPE])
            set.block()
            pthread_kill(pthread_self(), SIGPIPE)
            set.discardPending()
            set.unblock()
            count.value.withLock { $0 += 1 }
        }.join()
        #expect(count.value.withLock { $0 } == 1)
    }

    @Test func mappingsAreGivenBack() throws {
        let address: UInt
        do {
            let mapping = try Mapping(
                size: 8192, protection: PROT_READ | PROT_WRITE, flags: MAP_PRIVATE | MAP_ANONYMOUS)
            unsafe mapping.start.storeBytes(of: 7, as: UInt8.self)
            address = unsafe UInt(bitPattern: mapping.start)
        }
        var residency: UInt8 = 0
        // mincore says ENOMEM of a range that is not mapped.
        #expect(unsafe mincore(UnsafeMutableRawPointer(bitPattern: address), 4096, &residency) == -1)
    }
}
