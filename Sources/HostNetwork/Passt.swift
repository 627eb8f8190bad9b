// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Starts passt, which gives a guest the network of the user who starts it: no interface is created and no privilege
/// needed, since it carries the guest's connections over sockets of its own (passt(1)).
///
/// passt listens on the published ports, confines itself, and only then leaves its starter, whose exit status therefore
/// says that all is ready. It ends with the other end of its connection, however that is closed.
public enum Passt {
    /// Seconds that it may take to start.
    private static let patience = 20
    /// The MTU that it gives the guest where no other one is specified, its largest.
    static let usualMTU = FrameStream.possibleMTU.upperBound

    /// The program, searched in `PATH`; nil if it is not installed.
    public static func find() -> String? { HelperProgram.find("passt", more: []) }

    /// - Parameter isInterrupted: polled several times a second while it starts; true ends it.
    /// - Returns: a connection to it, when it is ready.
    /// - Throws: `passtMissing`, `passtFailed`, `cannotPublish`, `refused`.
    static func start(
        publishing ports: [PublishedPort], mtu: Int, isInterrupted: () -> Bool = { false }
    ) throws(HostNetworkError) -> FrameStream {
        guard let program = find() else { throw .passtMissing }
        let own: FileDescriptor, output: FileDescriptor
        let process: pid_t
        do throws(SystemCallError) {
            // The other ends are closed with these values: they are the program's alone, whose end is then seen.
            let sockets = try FrameStream.pair(), pipe = try HelperProgram.pipe()
            process = try HelperProgram.spawn(
                program, arguments(ports, mtu, nameServers: nameServers), socket: sockets.peer, errors: pipe.peer)
            own = sockets.own
            output = pipe.own
        } catch { throw .refused(action: "starting \(program)", error, explanation: "") }
        let (status, text) = HelperProgram.wait(
            for: process, output, patience: patience, isInterrupted: isInterrupted)
        switch status {
        case 0?: return FrameStream(own, name: "passt")
        case nil where isInterrupted(): throw .passtFailed("was ended by a signal before it was ready")
        case nil: throw .passtFailed("did not start within \(patience) seconds")
        default: throw explanation(of: text, status: status ?? 0, ports)
        }
    }

    /// The name servers to give the guest in place of the host's; empty where those are of use to it.
    ///
    /// Where the host's own are on its loopback interface, as systemd-resolved is, passt has none for a guest that does
    /// not reach that. The ones behind systemd-resolved are in a file of its own (systemd-resolved.service(8)).
    private static var nameServers: [String] {
        func servers(_ path: String) -> [String] {
            nameServers(of: String(decoding: (try? readFile(path, limit: 64 << 10)) ?? [], as: UTF8.self))
        }
        let own = servers("/etc/resolv.conf")
        guard !own.isEmpty, own.allSatisfy(isLoopback) else { return [] }
        return servers("/run/systemd/resolve/resolv.conf").filter { !isLoopback($0) }
    }

    /// Those of a resolv.conf(5) that are addresses for any interface.
    static func nameServers(of text: String) -> [String] {
        text.split(separator: "\n").compactMap { line in
            let words = line.split { $0 == " " || $0 == "\t" }
            guard words.count >= 2, words[0] == "nameserver", !words[1].utf8.contains(UInt8(ascii: "%")) else {
                return nil
            }
            return PublishedPort.isAddress(String(words[1])) ? String(words[1]) : nil
        }
    }

    static func isLoopback(_ address: String) -> Bool { address.hasPrefix("127.") || address == "::1" }

    static func arguments(_ ports: [PublishedPort], _ mtu: Int, nameServers: [String] = []) -> [String] {
        // --no-map-gw: the gateway's address would be the host's loopback interface, with all that listens there.
        var words = ["passt", "--quiet", "--stderr", "--no-map-gw", "--fd", "3", "--mtu", "\(mtu)"]
        words += nameServers.flatMap { ["--dns", $0] }
        let tcp = ports.filter { !$0.isUDP }, udp = ports.filter(\.isUDP)
        // Without -u, each TCP port would be forwarded by UDP, too.
        words += tcp.isEmpty ? ["-t", "none"] : tcp.flatMap { ["-t", $0.forPasst] }
        words += udp.isEmpty ? ["-u", "none"] : udp.flatMap { ["-u", $0.forPasst] }
        return words
    }

    /// The sentence for a failure, out of what passt printed about it.
    static func explanation(of text: String, status: Int32, _ ports: [PublishedPort]) -> HostNetworkError {
        let lines = text.split(separator: "\n").map { $0.drop { $0 == " " } }
            .filter { line in !noise.contains { line.hasPrefix($0) } }
        if lines.contains(where: { $0.hasPrefix("External interface not usable") }) { return .noExternalInterface }
        for line in lines {
            guard line.hasPrefix("Failed to bind any port for '-") else { continue }
            let words = line.split(separator: "'")
            guard words.count > 1, let port = ports.first(where: { words[1].hasSuffix(" \($0.forPasst)") }) else {
                break
            }
            return .cannotPublish(port, errno: port.refusal)
        }
        if let last = lines.last(where: { !$0.isEmpty }) { return .passtFailed("reports: \(String(last).printable)") }
        return .passtFailed(status > 128 ? "was killed by signal \(status - 128)" : "ended with status \(status)")
    }

    /// Beginnings of lines that are no reasons.
    private static let noise = ["Failed to send ", "Don't run as root", "No external routable interface"]
}
