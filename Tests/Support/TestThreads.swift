// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux

/// Threads that run the tests. `SWKVM_TEST_THREADS` says how many; without it, the concurrency runtime's own do.
///
/// The runtime has one thread for each CPU. A test that waits for a process or a clock keeps its thread, and with it a
/// CPU that nobody uses.
final class TestThreads: TaskExecutor {
    static let shared: TestThreads? = {
        guard let text = unsafe getenv("SWKVM_TEST_THREADS") else { return nil }
        // The value is the environment's, and ends with a zero.
        guard let count = unsafe Int(String(cString: text)), count > 0 else { return nil }
        let threads = TestThreads()
        for number in 0..<count {
            // The main thread's stack size, which the runtime's threads have as well.
            guard let thread = try? Thread.start(name: "test\(number)", stackSize: 8 << 20, { threads.run() }) else {
                break
            }
            thread.detach()
        }
        return threads
    }()

    private let monitor = Monitor()
    /// Changed within the monitor; in the order in which they came.
    private let jobs = Guarded<[UnownedJob]>([])

    func enqueue(_ job: consuming ExecutorJob) {
        let job = UnownedJob(job)
        monitor.locked {
            jobs.withLock { $0.append(job) }
            monitor.broadcast()
        }
    }

    private func run() {
        // As in the runtime's threads: a crash gets its handler.
        SignalSet.all.unblock()
        while true { unsafe next().runSynchronously(on: asUnownedTaskExecutor()) }
    }

    private func next() -> UnownedJob {
        monitor.locked {
            while true {
                if let job = jobs.withLock({ $0.isEmpty ? nil : $0.removeFirst() }) { return job }
                monitor.wait()
            }
        }
    }
}
