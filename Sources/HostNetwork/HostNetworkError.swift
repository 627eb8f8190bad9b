// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import Linux

/// An error while setting up the host's network.
public enum HostNetworkError: Error, Equatable, CustomStringConvertible {
    case badMACAddress(String, MACAddress.Problem)
    case badInterfaceName(String, InterfaceName.Problem)
    /// An MTU that such an interface cannot have.
    case badMTU(Int, possible: ClosedRange<Int> = NetworkBackend.possibleMTU)
    /// /dev/net/tun is not there, or no driver is behind it.
    case tunMissing(SystemCallError)
    /// /dev/net/tun is there but may not be opened.
    case tunDenied(SystemCallError)
    /// Missing permission to create a TAP of that name (nil: any name).
    case tapCreationDenied(InterfaceName?)
    /// A TAP that belongs to another user.
    case tapDenied(InterfaceName)
    /// A TAP that was found and is no multi-queue interface.
    case oneQueueOnly(InterfaceName, wanted: Int)
    /// Another process holds the TAP.
    case tapBusy(InterfaceName)
    /// The name is taken by something else; `kind` as `ip -d link` says it.
    case notATAP(InterfaceName, kind: String)
    case bridgeMissing(InterfaceName)
    case bridgeDown(InterfaceName)
    /// The interface that a macvtap is to be on.
    case interfaceMissing(InterfaceName)
    /// A macvtap without its device file.
    case nodeMissing(InterfaceName, index: Int32)
    /// A network namespace by its name.
    case namespaceMissing(String)
    case notABridge(InterfaceName, kind: String)
    /// The TAP was found as a port of `current`, another bridge than the one wanted.
    case portOfAnother(tap: InterfaceName, current: InterfaceName, wanted: InterfaceName)
    /// An inherited descriptor that cannot be used.
    case badDescriptor(Int32, DescriptorProblem)
    /// The network namespace's lock was not available.
    case namespaceLocked
    /// An action that needs CAP_NET_ADMIN; `command` does it beforehand as an administrator.
    case notPermitted(action: String, command: String)
    /// There is no passt in PATH.
    case passtMissing
    /// passt did not start; the sentence after its name.
    case passtFailed(String)
    /// passt found nothing on the host that leads anywhere.
    case noExternalInterface
    /// passt cannot listen on a port; nil when this process could.
    case cannotPublish(PublishedPort, errno: Int32?)
    case badPublishedPort(String, PublishedPort.Problem)
    /// A socket that cannot be connected to.
    case streamUnavailable(String, SystemCallError)
    /// A network of machines could not be set up.
    case nat(NetworkError)
    /// The kernel refused for another reason; `explanation` is its own text, if it gave one.
    case refused(action: String, SystemCallError, explanation: String)

    /// A problem of an inherited descriptor.
    public enum DescriptorProblem: Equatable, Sendable {
        case notOpen, notATAP
        /// A TUN interface: IP packets without Ethernet.
        case isTUN
        /// Opened without IFF_NO_PI.
        case packetInformation
        /// Opened without IFF_VNET_HDR, though offloads were requested.
        case noHeader
        /// Opened by this process itself, or taken over already: two owners would share the frames out, and both close
        /// it.
        case notInherited
        /// Not of the interface of the descriptors before it.
        case otherInterface(InterfaceName)
        /// One of several, and no queue of its own.
        case oneQueue(InterfaceName)
    }

    public var description: String {
        switch self {
        case .badMACAddress(let text, .notation):
            "'\(text)' is not a MAC address: expected six pairs of hexadecimal digits, such as 52:54:00:12:34:56"
        case .badMACAddress(let text, .multicast):
            "\(text) is a multicast address and cannot be a network card's: its first byte must be even, such as 52"
        case .badMACAddress(let text, .zero):
            "\(text) cannot be a network card's address: give another, such as 52:54:00:12:34:56"
        case .badInterfaceName(_, .empty):
            "the name of a network interface is empty: give 1 to \(InterfaceName.maximumLength) characters"
        case .badInterfaceName(let text, .tooLong(let length)):
            "the interface name '\(text)' has \(length) bytes, the kernel allows at most \(InterfaceName.maximumLength)"
        case .badInterfaceName(let text, .character(let character)):
            "the interface name '\(text)' has the character \(String(reflecting: character)), which is not allowed: use letters, digits, '-', '_' and '.'"
        case .badInterfaceName(let text, .reserved):
            "'\(text)' cannot be the name of a network interface: use letters, digits, '-', '_' and '.'"
        case .badMTU(let mtu, let possible):
            "an MTU of \(mtu) is not possible: give \(possible.lowerBound) to \(possible.upperBound)"
        case .tunMissing(let error):
            "TAPs are unavailable: /dev/net/tun is missing (\(error.reason)): load the driver with `modprobe tun`"
        case .tunDenied(let error):
            "/dev/net/tun cannot be opened (\(error.reason)): give this user read and write permission on it"
        case .tapCreationDenied(let name):
            "creating the TAP \(name?.text ?? "interface") needs CAP_NET_ADMIN: run as root, or have an administrator create one for this user, "
                + "`ip tuntap add dev \(name?.text ?? "swtap0") mode tap user NAME`"
        case .tapDenied(let name):
            "the TAP \(name) belongs to another user: run with CAP_NET_ADMIN, or recreate it with `ip tuntap add dev \(name) mode tap user NAME`"
        case .oneQueueOnly(let name, let wanted):
            "the TAP \(name) has one queue, not \(wanted): give queues=1, or recreate it with `ip tuntap add dev \(name) mode tap multi_queue`"
        case .tapBusy(let name):
            "the TAP \(name) is in use by another process: end that one or name another TAP"
        case .notATAP(let name, let kind):
            "\(name) exists but is not a TAP (it is \(kind)): name another interface"
        case .bridgeMissing(let name):
            "there is no bridge \(name): add `,create`, or create it with `ip link add \(name) type bridge` and `ip link set \(name) up`"
        case .interfaceMissing(let name):
            "there is no interface \(name): `ip link` lists those of this host"
        case .nodeMissing(let name, let index):
            "the macvtap \(name) has no device file /dev/tap\(index): mount devtmpfs on /dev, or use bridge= or tap="
        case .namespaceMissing(let name):
            "there is no network namespace \(name.printable): `ip netns` lists them, `ip netns add` makes one"
        case .bridgeDown(let name):
            "the bridge \(name) is down: `ip link set \(name) up`"
        case .notABridge(let name, let kind):
            "\(name) exists but is not a bridge (it is \(kind)): name another interface"
        case .portOfAnother(let tap, let current, let wanted):
            "the TAP \(tap) is a port of \(current), not of \(wanted): give bridge=\(current), or free it with `ip link set \(tap) nomaster`"
        case .badDescriptor(let number, .notOpen):
            "descriptor \(number) is not open: the parent process must pass it on, without close-on-exec"
        case .badDescriptor(let number, .notATAP):
            "descriptor \(number) is not a TAP: open /dev/net/tun with TUNSETIFF, or a macvtap's /dev/tapN"
        case .badDescriptor(let number, .isTUN):
            "descriptor \(number) is a TUN, which carries no Ethernet: open a TAP (IFF_TAP)"
        case .badDescriptor(let number, .packetInformation):
            "descriptor \(number) is a TAP that puts packet information before each frame: open it with IFF_NO_PI"
        case .badDescriptor(let number, .noHeader):
            "descriptor \(number) does not support offloads: open it with IFF_VNET_HDR, or give offload=off"
        case .badDescriptor(let number, .notInherited):
            "descriptor \(number) was not passed on by the parent process, or is already in use: give each interface its own"
        case .badDescriptor(let number, .otherInterface(let name)):
            "descriptor \(number) is not of \(name), as those before it are: give each interface a --net of its own"
        case .badDescriptor(let number, .oneQueue(let name)):
            "descriptor \(number) is not a queue of its own of \(name): open each with IFF_MULTI_QUEUE"
        case .namespaceLocked:
            "another process holds the lock of the network namespace (flock on /proc/self/ns/net): end it and try again"
        case .notPermitted(let action, let command):
            "\(action) needs CAP_NET_ADMIN: run as root, or have an administrator do it beforehand: `\(command)`"
        case .passtMissing:
            "passt is not installed, which --net user needs: apt install passt"
        case .passtFailed(let what):
            "passt \(what)"
        case .noExternalInterface:
            "passt found no network interface of this host with a default route: connect the host to a network, or give --net tap= or --net none"
        case .cannotPublish(let port, let errno):
            Self.sentence(port, errno)
        case .badPublishedPort(let text, .notation):
            "publish=\(text) is not a port to publish; expected [ADDRESS:]PORT:GUESTPORT[/udp], such as publish=2222:22"
        case .badPublishedPort(let text, .address):
            "publish=\(text) has no valid address; expected an IPv4 address of this host, an IPv6 address in brackets, or none for \(PublishedPort.usualAddress)"
        case .badPublishedPort(let text, .port):
            "publish=\(text) has no valid ports; expected two numbers from 1 to 65535, such as publish=2222:22"
        case .streamUnavailable(let path, let error):
            switch error.errno {
            case ENOENT: "there is no socket \(path.printable): start the program that listens there first"
            case ECONNREFUSED: "no program listens on the socket \(path.printable): start it first"
            case ENAMETOOLONG: "the path of a socket has 1 to 107 bytes, \(path.printable) has \(path.utf8.count)"
            default: "connecting to the socket \(path.printable) failed: \(error.reason)"
            }
        case .nat(let error): error.description
        case .refused(let action, let error, let explanation):
            "\(action) failed: \(error.reason)" + (explanation.isEmpty ? "" : " (\(explanation))")
        }
    }

    private static func sentence(_ port: PublishedPort, _ error: Int32?) -> String {
        let start = "port \(port.port) (\(port.isUDP ? "UDP" : "TCP")) of \(port.address) cannot be published: "
        switch error {
        case EADDRINUSE?: return start + "another program uses it"
        case EACCES?: return start + "ports below 1024 need CAP_NET_BIND_SERVICE; use a higher one"
        case EADDRNOTAVAIL?: return start + "no interface of this host has that address"
        case let error?: return start + SystemCallError("bind", errno: error).reason
        case nil where port.isIPv6: return start + "passt uses IPv6 only on a host with a default route for it"
        case nil: return start + "passt was not allowed to listen there"
        }
    }

    /// The error number, where a system call failed.
    var errno: Int32? {
        if case .refused(_, let error, _) = self { error.errno } else { nil }
    }
}
