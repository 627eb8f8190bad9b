// SPDX-License-Identifier: Apache-2.0

/// The rules of a network for nft(8): one table of its own, which changes no other.
struct FirewallRules {
    let name: NetworkName
    let bridge: InterfaceName
    let subnet: Subnet

    /// An underscore, as no network's name has one.
    static func table(of name: NetworkName) -> String { "swkvm_\(name)" }

    /// Creates the table, or replaces what is in it, in one step.
    var text: String {
        let table = "table ip \(Self.table(of: name))"
        // The first line creates a table that is not there, so that the second one always has one to remove.
        return """
            \(table)
            delete \(table)
            \(table) {
                chain forward {
                    type filter hook forward priority filter; policy accept;
                    iifname "\(bridge)" oifname "\(bridge)" accept
                    iifname "\(bridge)" ip saddr != \(subnet) drop
                    oifname "\(bridge)" ct state established,related accept
                    oifname "\(bridge)" reject with icmp admin-prohibited
                }
                chain postrouting {
                    type nat hook postrouting priority srcnat; policy accept;
                    ip saddr \(subnet) oifname != "\(bridge)" ip daddr != \(subnet) masquerade
                }
            }

            """
    }

    /// Removes the table, whether it is there or not.
    static func removal(of name: NetworkName) -> String {
        "table ip \(table(of: name))\ndelete table ip \(table(of: name))\n"
    }

    /// What a packet of a guest comes through.
    enum Hook: String {
        /// To the host itself: DHCP and DNS.
        case input
        /// To others.
        case forward
    }

    /// A chain of another table that drops by default what comes through a hook, and so also what this table accepts;
    /// nil if there is none.
    /// - Parameter chains: what `nft list chains` prints.
    static func dropper(in chains: String, at hook: Hook) -> String? {
        var table = "", chain = ""
        for line in chains.split(separator: "\n") {
            let words = line.split { $0 == " " || $0 == "\t" }
            switch words.first {
            case "table" where words.count > 2: table = words[1...2].joined(separator: " ")
            case "chain" where words.count > 1: chain = String(words[1])
            case "type"
            where words.contains(Substring(hook.rawValue)) && words.suffix(2).elementsEqual(["policy", "drop;"]):
                // Those of IPv6 and of bridges are no concern of an IPv4 packet.
                if table.hasPrefix("ip ") || table.hasPrefix("inet ") { return "chain \(chain) of table \(table)" }
            default: break
            }
        }
        return nil
    }
}
