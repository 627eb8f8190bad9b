// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

/// A set of signals, and the calling thread's mask of blocked ones.
public struct SignalSet: @unchecked Sendable {
    private var set: sigset_t

    /// Every signal.
    public static var all: SignalSet {
        var set = sigset_t()
        unsafe sigfillset(&set)
        return SignalSet(set: set)
    }

    /// Every signal but those by which the kernel reports what the thread itself has done: a fault, or a call that is
    /// refused. If one were blocked, it would end the process without a report.
    public static var allButOwnFaults: SignalSet {
        var others = all
        for number in [SIGSYS, SIGILL, SIGTRAP, SIGSEGV, SIGBUS, SIGFPE, SIGABRT] {
            unsafe sigdelset(&others.set, number)
        }
        return others
    }

    private init(set: sigset_t) { self.set = set }

    /// The signals of the given numbers (`SIGINT`, …).
    public init(_ numbers: [Int32]) {
        set = sigset_t()
        unsafe sigemptyset(&set)
        for number in numbers { unsafe sigaddset(&set, number) }
    }

    /// These signals and others.
    public func union(_ others: SignalSet) -> SignalSet {
        SignalSet((1..<Int32(NSIG)).filter { contains($0) || others.contains($0) })
    }

    /// Indicates whether the process ignores a signal, as one does that was started with it ignored.
    public static func isIgnored(_ number: Int32) -> Bool { clinux_is_ignored(number) != 0 }

    /// Has a blocked signal that was taken do to the process what it does by default, such as stop it. Returns when
    /// that is over.
    public static func applyDefault(of number: Int32) {
        let alone = SignalSet([number])
        let before = alone.unblock()
        raise(number)
        before.restore()
    }

    /// Blocks these signals in the calling thread and returns the mask from before.
    @discardableResult
    public func block() -> SignalSet { changeMask(SIG_BLOCK) }

    /// Lets these signals through to the calling thread.
    @discardableResult
    public func unblock() -> SignalSet { changeMask(SIG_UNBLOCK) }

    /// Makes this the calling thread's mask.
    public func restore() { _ = changeMask(SIG_SETMASK) }

    /// Forgets which of these (blocked) signals are pending for the calling thread or its process.
    public func discardPending() {
        while takePending() != nil {}
    }

    /// The lowest of these (blocked) signals that is pending for the calling thread or its process, or nil. It stays
    /// pending.
    public func pending() -> Int32? {
        var waiting = sigset_t()
        guard unsafe sigpending(&waiting) == 0 else { return nil }
        return (1..<Int32(NSIG)).first { unsafe sigismember(&waiting, $0) == 1 && contains($0) }
    }

    /// Takes one of these (blocked) signals that is pending, or nil.
    public func takePending() -> Int32? {
        var set = self.set
        var noTime = timespec()
        let number = unsafe sigtimedwait(&set, nil, &noTime)
        return number > 0 ? number : nil
    }

    private func contains(_ number: Int32) -> Bool {
        var set = self.set
        return unsafe sigismember(&set, number) == 1
    }

    /// A descriptor that becomes readable when one of these (blocked) signals is pending (signalfd(2)).
    public func descriptor() throws(SystemCallError) -> FileDescriptor {
        var set = self.set
        let number = unsafe signalfd(-1, &set, Int32(SFD_CLOEXEC | SFD_NONBLOCK))
        if number < 0 { throw .last("signalfd") }
        return FileDescriptor(owning: number)
    }

    /// The number of the next pending signal of a descriptor made by ``descriptor()``, or nil.
    public static func next(from descriptor: borrowing FileDescriptor) -> Int32? {
        var info = signalfd_siginfo()
        // A signalfd gives whole records or EAGAIN.
        let count = unsafe withUnsafeMutableBytes(of: &info) {
            unsafe read(descriptor.rawValue, $0.baseAddress, $0.count)
        }
        return count == MemoryLayout<signalfd_siginfo>.size ? Int32(bitPattern: info.ssi_signo) : nil
    }

    private func changeMask(_ how: Int32) -> SignalSet {
        var set = self.set
        var before = sigset_t()
        unsafe pthread_sigmask(how, &set, &before)
        return SignalSet(set: before)
    }
}
