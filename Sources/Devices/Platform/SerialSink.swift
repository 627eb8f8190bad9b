// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import Linux

/// The destination of a serial port's output.
public protocol SerialSink: AnyObject, Sendable {
    /// Takes bytes from the front without waiting, and returns how many.
    ///
    /// A sink that takes fewer than all calls ``SerialPort/flush()`` when there is room again. It must not call the
    /// port from here.
    func take(_ bytes: Span<UInt8>) -> Int

    /// Bytes that were taken, and lost since the host failed to write them.
    var lostBytes: UInt64 { get }
}

extension SerialSink {
    public var lostBytes: UInt64 { 0 }
}

extension BackgroundWriter: SerialSink {}

/// A sink that writes to a terminal, pipe or socket.
public final class DescriptorSink: SerialSink {
    private let descriptor: FileDescriptor
    /// The descriptor's number, to wait until it is writable.
    public var rawValue: Int32 { descriptor.rawValue }
    private let isSocket: Bool
    private let onFull: @Sendable () -> Void

    /// - Parameters:
    ///   - descriptor: non-blocking for sure, or a socket. For others there is `BackgroundWriter`.
    ///   - onFull: reports that the rest waits for the descriptor to become writable; called by a vCPU thread.
    public init(_ descriptor: consuming FileDescriptor, onFull: @escaping @Sendable () -> Void) {
        isSocket = (FileDescriptor.kind(of: descriptor.rawValue) ?? 0) == S_IFSOCK
        self.descriptor = descriptor
        self.onFull = onFull
    }

    public func take(_ bytes: Span<UInt8>) -> Int {
        var done = 0
        while done < bytes.count {
            do {
                // The rest of the span, which lives throughout the call.
                done += unsafe try bytes.withUnsafeBytes { buffer throws(SystemCallError) in
                    let rest = unsafe UnsafeRawBufferPointer(rebasing: buffer[done...])
                    return isSocket ? unsafe try descriptor.sendNow(rest) : unsafe try descriptor.write(rest)
                }
            } catch {
                // There is no reader (EPIPE, EIO of a closed terminal), or the disk is full: the guest continues
                // without.
                guard error.errno == EAGAIN else { return bytes.count }
                onFull()
                return done
            }
        }
        return done
    }
}
