// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

/// A POSIX thread with a name, which its owner joins.
public struct Thread: ~Copyable, @unchecked Sendable {
    // pthread_t is an address in libc, used only as a handle; the `Sendable` above rests on that.
    private let handle: pthread_t

    /// Starts a thread. All signals are blocked in it, except those that `body` itself unblocks, so that
    /// signals for the process reach the thread that waits for them; and except those about what the thread itself
    /// does.
    /// - Parameters:
    ///   - name: what `ps -T` and a debugger show; the kernel keeps the first 15 bytes.
    ///   - stackSize: bytes; 256 KiB is plenty for code that does not recurse.
    public static func start(
        name: String, stackSize: Int = 256 << 10, _ body: @escaping @Sendable () -> Void
    ) throws(SystemCallError) -> Thread {
        final class Start {
            let name: String
            let body: @Sendable () -> Void
            init(_ name: String, _ body: @escaping @Sendable () -> Void) { (self.name, self.body) = (name, body) }
        }
        var attributes = pthread_attr_t()
        unsafe pthread_attr_init(&attributes)
        defer { unsafe pthread_attr_destroy(&attributes) }
        unsafe pthread_attr_setstacksize(&attributes, stackSize)

        let before = SignalSet.allButOwnFaults.block()
        defer { before.restore() }

        // The new thread takes over the retain; if it cannot start, the retain is released here.
        let start = unsafe Unmanaged.passRetained(Start(String(name.utf8.prefix(15)) ?? "swkvm", body))
        var handle = pthread_t()
        let status = unsafe pthread_create(
            &handle, &attributes,
            { argument in
                let start = unsafe Unmanaged<Start>.fromOpaque(argument!).takeRetainedValue()
                unsafe clinux_set_thread_name(start.name)
                start.body()
                return nil
            }, start.toOpaque())
        guard status == 0 else {
            unsafe start.release()
            throw SystemCallError("pthread_create", errno: status)
        }
        return Thread(handle: handle)
    }

    /// Waits for the thread to end.
    public consuming func join() {
        pthread_join(handle, nil)
        discard self
    }

    /// Lets the thread continue by itself: no thread waits for its end.
    public consuming func detach() {
        pthread_detach(handle)
        discard self
    }

    /// Lets other threads that wait for the calling thread's CPU run first (sched_yield(2)).
    public static func yield() { sched_yield() }

    /// Sends the thread a signal; harmless if it has ended but is not joined yet.
    public func send(signal: Int32) {
        _ = pthread_kill(handle, signal)
    }

    /// Restricts the thread to one host CPU.
    /// - Throws: `EINVAL` when the host has no such CPU or may not use it.
    public func pin(toCPU cpu: Int) throws(SystemCallError) {
        let status = clinux_set_thread_cpu(handle, Int32(clamping: cpu))
        if status != 0 { throw SystemCallError("pthread_setaffinity_np", errno: status) }
    }

    private init(handle: pthread_t) { self.handle = handle }

    deinit {
        // A thread never outlives what it works on: an owner that has not joined it waits here.
        pthread_join(handle, nil)
    }
}
