// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import Devices
internal import Glibc
internal import HostNetwork
internal import Inventory
internal import Linux
internal import Metadata

/// `--metadata FILE[,version=1|2][,address=ADDRESS]`.
struct MetadataArgument {
    static let completion = ValueCompletion.list(["@file", "version=1/2", "address="])

    let path: String
    private(set) var version = MetadataStore.Version.v1
    private(set) var address = IPv4Address(rawValue: MetadataEndpoint.defaultAddress)

    init(parsing argument: String) throws {
        var list = OptionList(argument)
        path = list.takeFirst()
        guard !path.isEmpty else { throw ArgumentProblem("metadata requires a file") }
        for (key, value) in try list.unique() {
            switch (key, value) {
            case ("version", "1"?): version = .v1
            case ("version", "2"?): version = .v2
            case ("version", let value):
                throw ArgumentProblem("version=\(value ?? "") is not recognized; expected version=1 or version=2")
            case ("address", let value):
                // As Firecracker has it: an address that no other network has.
                guard let value, let address = IPv4Address(value), address.rawValue >> 16 == 0xa9fe,
                    (1...254).contains(address.rawValue >> 8 & 0xff)
                else {
                    throw ArgumentProblem(
                        "address=\(value ?? "") is not a link-local IPv4 address; expected 169.254.1.0 to 169.254.254.255"
                    )
                }
                self.address = address
            default:
                throw ArgumentProblem(
                    "'\(key)\(value.map { "=" + $0 } ?? "")' is not recognized; expected version= or address=")
            }
        }
    }

    /// Reads the file.
    /// - Throws: a sentence.
    func service() throws(ArgumentProblem) -> MetadataService {
        let store = MetadataStore(version: version), bytes: [UInt8]
        do throws(SystemCallError) { bytes = try readFile(path, limit: MetadataStore.defaultLimit) } catch {
            throw ArgumentProblem(
                error.errno == EFBIG
                    ? "metadata \"\(path.printable)\": it is longer than \(MetadataStore.defaultLimit) bytes"
                    : "metadata \"\(path.printable)\": \(error)")
        }
        do throws(MetadataProblem) { try store.put(MetadataValue(parsing: bytes)) } catch {
            throw ArgumentProblem("metadata \"\(path.printable)\": \(error)")
        }
        return MetadataService(store, address: address.rawValue)
    }
}
