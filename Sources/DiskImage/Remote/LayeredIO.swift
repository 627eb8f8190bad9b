// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Linux

/// The queue of an engine whose image has a remote backing file: the host's for the files, and the remote disk for what
/// is read below them. It belongs to the engine's thread.
final class LayeredIO: @unchecked Sendable {
    // One thread uses it all: hence `Sendable`.
    let files: IOQueue
    let remote: NBDDisk
    /// What stands for the remote disk among the descriptors of files.
    private let number: Int32
    private let epoll: Epoll

    private static let filesToken: UInt64 = 0, remoteToken: UInt64 = 1

    init(_ files: consuming IOQueue, _ remote: NBDDisk, number: Int32) throws(SystemCallError) {
        epoll = try Epoll()
        try epoll.add(files.rawValue, .input, token: Self.filesToken)
        try epoll.add(remote.descriptor, .input, token: Self.remoteToken)
        self.files = files
        self.remote = remote
        self.number = number
    }

    /// Readable while one of the two has something.
    var descriptor: Int32 { epoll.rawValue }

    var hasCompletion: Bool { files.hasCompletion || !remote.ended.isEmpty }

    func allowsCall(_ file: Int32) -> Bool { file != number && files.allowsCall(file) }

    /// The segments and their memory stay until the completion.
    func read(
        _ file: Int32, _ segments: IOSegments, at offset: UInt64, token: UInt64, isAside: Bool
    ) throws(SystemCallError) {
        if file == number {
            try remote.transfer(.read, segments, at: offset, token: token)
        } else {
            try files.read(file, segments, at: offset, token: token, isAside: isAside)
        }
    }

    func submit() throws(SystemCallError) {
        defer { remote.submit() }
        try files.submit()
    }

    /// Looks at the files alone, as long as nothing else is under way.
    func spin(nanoseconds: UInt32) -> Bool { remote.inUse == 0 && files.spin(nanoseconds: nanoseconds) }

    /// Waits for a completion of either, of which at least one is outstanding.
    func wait() throws(SystemCallError) {
        remote.goOn()
        while !hasCompletion {
            if remote.inUse == 0 { return try files.wait() }
            var isReady = false
            try epoll.wait { token, _ in
                if token == Self.remoteToken { remote.handle(remote.look(timeout: 0)) } else { isReady = true }
            }
            if isReady { return }
        }
    }

    func nextCompletion() -> IORing.Completion? { files.nextCompletion() ?? remote.nextCompletion() }
}

extension DiskImage {
    /// Where an engine carries out its operations on this image.
    /// - Parameter operations: how many can be under way.
    func makeQueue(_ operations: Int, usesRing: Bool, calls: FileCalls) throws(SystemCallError) -> IOQueue {
        remote?.reserve(operations)
        if isRemote, let remote { return .remote(remote) }
        let files: IOQueue
        // No ring, for whatever reason, is no reason to have no disk. One entry is for the wakeup.
        if usesRing, let ring = try? IORing(entries: operations + 1) {
            files = .ring(ring)
        } else {
            files = .synchronous(try SynchronousIO(capacity: operations, calls: calls))
        }
        guard let remote else { return files }
        return .layered(try LayeredIO(files, remote, number: descriptor(chainLength - 1)))
    }
}
