// SPDX-License-Identifier: Apache-2.0

import Glibc
import HostNetwork
import Linux
import TestSupport
import Testing

@testable import Machine

/// What is derived from the host's machine-id: the same at every start, and nobody else's.
@Suite(.timed) struct HostIdentityTests {
    /// A host with this machine-id.
    private func host(_ text: String?) throws -> HostIdentity {
        var template = Array("/tmp/machine-id.XXXXXX".utf8CString)
        let file = FileDescriptor(owning: mkstemp(&template))
        let path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
        defer { unlink(path) }
        if let text { try file.writeAll(Array(text.utf8)) }
        return HostIdentity(files: ["/nonexistent", path])
    }

    private static let one = "0123456789abcdef0123456789abcdef\n", other = "0123456789abcdef0123456789abcdee\n"

    private func address(_ host: HostIdentity, _ name: String, _ tap: String) throws -> MACAddress {
        try host.address(ofMachine: name, interface: InterfaceName(tap).text)
    }

    @Test func neverChanges() throws {
        // Written down: leases, licences and rules depend on them across versions of swkvm. Checked with Python's hmac.
        let host = try host(Self.one)
        #expect(try address(host, "swkvm", "swtap0").description == "42:5f:d2:56:cf:ea")
        #expect(host.uuid(ofMachine: "web").description == "5773454d-2bd3-881b-959e-672282d50876")
        #expect(host.uuid(ofDisk: "/none/a.raw").description == "3e5b3e04-28c2-8f58-a13c-9d0f9d49ddea")
    }

    /// Machines without a name have different TAPs, hosts different machine-ids.
    @Test func twoMachinesWithoutANameDiffer() throws {
        let (one, other) = (try host(Self.one), try host(Self.other))
        var addresses: Set<MACAddress> = []
        for host in [one, other] {
            for machine in ["swkvm", "web", "we"] {
                for tap in (0..<500).map({ "swtap\($0)" }) + ["b0", "0"] {
                    let address = try address(host, machine, tap)
                    #expect(addresses.insert(address).inserted && address.bytes[0] & 2 != 0)
                }
            }
        }
        #expect(one.uuid(ofMachine: "web") != other.uuid(ofMachine: "web"))
        #expect(one.uuid(ofMachine: "web") != one.uuid(ofMachine: "db"))
        // The words are kept apart.
        #expect(try address(one, "ab", "c") != address(one, "a", "bc"))
    }

    /// Without a machine-id the host's name is taken, so that there is something.
    @Test(arguments: [nil, "", "\n", "uninitialized\n"]) func aHostWithoutMachineID(text: String?) throws {
        let (host, again) = (try host(text), try host(text))
        #expect(host.uuid(ofMachine: "web") == again.uuid(ofMachine: "web"))
        #expect(try host.uuid(ofMachine: "web") != self.host(Self.one).uuid(ofMachine: "web"))
    }
}

@Suite(.timed) struct NetworkTogethernessTests {
    private func problem(_ networks: Configuration.Network...) -> String? {
        do { try Configuration(networks: networks).checkNetworks() } catch { return "\(error)" }
        return nil
    }

    @Test func oneTAPDescriptorOrAddressTwiceIsNamed() throws {
        let tap = Configuration.Network(.tap(try InterfaceName("tap0")))
        let bridged = Configuration.Network(.tap(try InterfaceName("tap0"), bridge: .init(try InterfaceName("br0"))))
        #expect(problem(tap, bridged) == "two network interfaces use the TAP tap0: give each a TAP of its own")
        let five = Configuration.Network(.descriptor(5))
        #expect(problem(five, tap, five) == "two network interfaces use the descriptor 5: give each one of its own")
        let mac = try MACAddress(parsing: "52:54:00:12:34:56")
        #expect(
            problem(.init(.descriptor(5), mac: mac), .init(.descriptor(6), mac: mac))
                == "two network interfaces have the MAC address 52:54:00:12:34:56: give each one of its own with mac=")
    }

    @Test func othersAreTaken() throws {
        let other = Configuration.Network(
            .tap(try InterfaceName("tap1")), mac: try MACAddress(parsing: "52:54:00:12:34:57"))
        let mac = try MACAddress(parsing: "52:54:00:12:34:56")
        #expect(
            problem(
                .init(.tap(try InterfaceName("tap0")), mac: mac), other, .init(.descriptor(5)), .init(.descriptor(6)),
                .init(.tap(nil)), .init(.tap(nil))) == nil)
    }
}
