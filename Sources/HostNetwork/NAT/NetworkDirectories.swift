// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Where networks are. They belong to the host, and so to root.
///
///     /etc/swkvm/networks        definitions, NAME.toml
///     /var/lib/swkvm/networks    NAME.leases, and NAME.subnet: the range that was chosen last
///     /run/swkvm-networks        NAME/: what exists only while the network is up
///
/// `SWKVM_HOME` replaces them by `networks`, `network-data` and `network-run` below it.
public struct NetworkDirectories: Equatable, Sendable {
    public let definitions: String
    public let data: String
    public let runtime: String

    /// The file whose lock keeps others from bringing networks up and taking them down. Nobody else can open it: who
    /// can open a file can lock it.
    var lock: String { runtime + ".lock" }

    public init(definitions: String, data: String, runtime: String) {
        (self.definitions, self.data, self.runtime) = (definitions, data, runtime)
    }

    /// - Parameter home: the value of `SWKVM_HOME`, which counts if it is an absolute path.
    public init(home: String?) {
        guard let home, home.utf8.first == UInt8(ascii: "/") else {
            self.init(
                definitions: "/etc/swkvm/networks", data: "/var/lib/swkvm/networks", runtime: "/run/swkvm-networks")
            return
        }
        self.init(
            definitions: home + "/networks", data: home + "/network-data", runtime: home + "/network-run")
    }

    /// Those of this process.
    public static var current: NetworkDirectories {
        NetworkDirectories(home: environmentVariable("SWKVM_HOME"))
    }

    /// Creates a directory and those above it.
    /// - Parameter mode: of the last one; those above it get it, too.
    static func create(_ path: String, mode: mode_t) throws(NetworkError) {
        var prefix = ""
        for part in path.split(separator: "/") {
            prefix += "/" + part
            let status = prefix.withRawCString { unsafe mkdir($0, mode) }
            guard status == 0 || errno == EEXIST || errno == EROFS || errno == EACCES else {
                throw .system(purpose: "create the directory", path: prefix, .last("mkdir"))
            }
        }
        guard let status = fileStatus(ofPath: path), status.st_mode & S_IFMT == S_IFDIR,
            status.st_uid == geteuid(), status.st_mode & 0o022 == 0
        else { throw .unsafeDirectory(path) }
    }
}

/// The files of a network.
struct NetworkFiles: Equatable, Sendable {
    let name: NetworkName
    let directories: NetworkDirectories

    var definition: String { "\(directories.definitions)/\(name).toml" }
    /// Written by dnsmasq (dnsmasq(8), dhcp-leasefile).
    var leases: String { "\(directories.data)/\(name).leases" }
    /// The subnet that was chosen last, which is used again as long as it is free.
    var chosenSubnet: String { "\(directories.data)/\(name).subnet" }
    /// The directory of what exists only while the network is up. dnsmasq's user reads in it.
    var runtime: String { "\(directories.runtime)/\(name)" }
    /// Locked by the network's process (``ProcessFile``).
    var process: String { runtime + "/pid" }
    /// What is in force on the host (``NetworkState``): there from before the first change until after the last.
    var state: String { runtime + "/state" }
    /// Present if the network stays up without machines.
    var kept: String { runtime + "/kept" }
    var rules: String { runtime + "/rules.nft" }
    var dnsmasqConfiguration: String { runtime + "/dnsmasq.conf" }
    var dnsmasqProcess: String { runtime + "/dnsmasq.pid" }
    /// What dnsmasq printed at its start.
    var dnsmasqErrors: String { runtime + "/dnsmasq.log" }
    /// A file for each machine: its address and its name (dnsmasq(8), dhcp-hostsdir).
    var hosts: String { runtime + "/hosts" }
}
