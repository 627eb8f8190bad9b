// SPDX-License-Identifier: Apache-2.0

internal import Devices
internal import Glibc
internal import Linux
internal import Logging
internal import Virtio

extension Configuration {
    /// A virtio socket device: the guest's address, and the UNIX sockets that are its ports on the host.
    public struct Vsock: Sendable, Equatable {
        /// The guest's CID, of ``Devices/VsockDevice/possibleCIDs``.
        public let cid: UInt32
        /// The UNIX socket that clients of the host connect to; with `_PORT` behind it, that of a port of the host's.
        /// At most ``Devices/VsockDevice/longestPath`` bytes.
        public let path: String

        /// - Throws: when the CID cannot be a guest's, or the path is empty or too long.
        public init(cid: UInt64, path: String) throws(VsockProblem) {
            guard let number = UInt32(exactly: cid), VsockDevice.possibleCIDs.contains(number) else {
                throw .impossibleCID(cid)
            }
            try Self.check(path)
            (self.cid, self.path) = (number, path)
        }

        /// The path from the root: it is looked up while the machine runs.
        func absolutePath() throws(VsockProblem) -> String {
            guard path.utf8.first != UInt8(ascii: "/") else { return path }
            // The kernel's own text, which is freed.
            guard let here = unsafe getcwd(nil, 0) else { return path }
            defer { unsafe free(here) }
            let bytes = unsafe UnsafeBufferPointer(start: here, count: strlen(here)).map { UInt8(bitPattern: $0) }
            let whole = String(raw: bytes) + "/" + path
            try Self.check(whole)
            return whole
        }

        private static func check(_ path: String) throws(VsockProblem) {
            let bytes = path.rawBytes
            guard !bytes.isEmpty, !bytes.contains(0) else { throw .emptyPath }
            guard bytes.count <= VsockDevice.longestPath else { throw .longPath(path) }
        }
    }

    /// Why there is no such socket device.
    public enum VsockProblem: Error, Equatable, Sendable, CustomStringConvertible {
        case impossibleCID(UInt64)
        case emptyPath
        case longPath(String)

        public var description: String {
            switch self {
            case .impossibleCID(let cid):
                "a guest's CID is from \(VsockDevice.possibleCIDs.lowerBound) to \(VsockDevice.possibleCIDs.upperBound), not \(cid)"
            case .emptyPath: "the path of a vsock device's socket is empty"
            case .longPath(let path):
                "the path of a vsock device's socket has \(path.rawBytes.count) bytes, the limit is \(VsockDevice.longestPath) (with _PORT behind it, it must fit into the address of a socket): \(path.printable); choose a shorter one"
            }
        }
    }
}

extension VirtioSlot {
    /// Binds the socket, and makes the device.
    static func makeVsock(
        _ vsock: Configuration.Vsock, _ configuration: Configuration, log: Logger
    ) throws(MachineError) -> (device: VsockDevice, listener: Listener) {
        let path: String
        do throws(Configuration.VsockProblem) { path = try vsock.absolutePath() } catch { throw .vsock(error) }
        let listener: Listener
        do throws(SystemCallError) { listener = try Listener(path: path, backlog: 128) } catch {
            throw .vsockSocket(path: vsock.path, error)
        }
        raiseDescriptorLimit()
        let device = try Machine.host("create the descriptors of vsock0") { () throws(SystemCallError) in
            try VsockDevice(
                name: "vsock0", guestCID: vsock.cid, path: path, listener: listener.descriptor.duplicate(),
                events: events(log.of("vsock0"), configuration))
        }
        return (device, listener)
    }

    /// Has the process get more descriptors, best effort: a guest's connections must not use up those that the rest of
    /// the machine needs.
    private static func raiseDescriptorLimit() {
        var limit = rlimit()
        // It writes no more than the structure.
        guard unsafe getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 else { return }
        let wanted = rlim_t(VsockDevice.maximumConnections + 1024)
        guard limit.rlim_cur < wanted else { return }
        limit.rlim_cur = min(wanted, limit.rlim_max)
        _ = unsafe setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
    }
}
