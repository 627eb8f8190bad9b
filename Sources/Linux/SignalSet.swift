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

    private init(set: sigset_t) { self.set = set }

    /// The signals of the given numbers (`SIGINT`, …).
    public init(_ numbers: [Int32]) {
        set = sigset_t()
        unsafe sigemptyset(&set)
        for number in numbers { unsafe sigaddset(&set, number) }
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
        var set = self.set
        var noTime = timespec()
        while unsafe sigtimedwait(&set, nil, &noTime) > 0 {}
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
        let count = unsafe withUnsafeMutableBytes(of: &info) { unsafe read(descriptor.rawValue, $0.baseAddress, $0.count) }
        return count == MemoryLayout<signalfd_siginfo>.size ? Int32(bitPattern: info.ssi_signo) : nil
    }

    private func changeMask(_ how: Int32) -> SignalSet {
        var set = self.set
        var before = sigset_t()
        unsafe pthread_sigmask(how, &set, &before)
        return SignalSet(set: before)
    }
}
