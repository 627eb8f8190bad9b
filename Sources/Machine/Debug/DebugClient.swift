// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Linux

/// A debugger's connection, read and written without waiting.
final class DebugClient {
    let descriptor: FileDescriptor

    init(_ descriptor: consuming FileDescriptor) {
        self.descriptor = descriptor
        var on: Int32 = 1
        // Packets are small and each is waited for. A UNIX socket does without.
        _ = unsafe setsockopt(
            self.descriptor.rawValue, Int32(IPPROTO_TCP), TCP_NODELAY, &on, socklen_t(MemoryLayout<Int32>.size))
    }

    /// At most 4 KiB of what has come: no bytes at the end of the stream, nil when there is nothing now.
    func receive() -> [UInt8]? {
        var isEmpty = false
        let bytes = unsafe [UInt8](unsafeUninitializedCapacity: 4096) { buffer, count in
            count = 0
            // The call writes at most the buffer's size, and returns how much that was.
            do throws(SystemCallError) {
                count = unsafe try descriptor.read(into: UnsafeMutableRawBufferPointer(buffer))
            } catch {
                isEmpty = error.errno == EAGAIN
            }
        }
        return isEmpty ? nil : bytes
    }

    /// Sends as much as the client takes now, and removes it from `output`.
    /// - Returns: false when the client is gone.
    func send(_ output: inout [UInt8]) -> Bool {
        while !output.isEmpty {
            var failure: Int32 = 0
            // The array lives for the call.
            let count = unsafe output.withUnsafeBytes { buffer in
                do throws(SystemCallError) { return try unsafe descriptor.sendNow(buffer) } catch {
                    failure = error.errno
                    return 0
                }
            }
            output.removeFirst(count)
            if failure != 0 { return failure == EAGAIN }
        }
        return true
    }

    /// Sends all of it, and waits for room a second at most after the last byte taken.
    func sendAll(_ output: inout [UInt8]) {
        while send(&output), !output.isEmpty {
            var entry = pollfd(fd: descriptor.rawValue, events: Int16(POLLOUT), revents: 0)
            if unsafe poll(&entry, 1, 1000) <= 0 { return }
        }
    }
}
