// SPDX-License-Identifier: Apache-2.0

/// A DHCP client (RFC 2131): DISCOVER, OFFER, REQUEST, ACK. The lease is not renewed: this guest does not run that
/// long.
extension NetworkInterface {
    private enum Message {
        static let discover: UInt8 = 1
        static let offer: UInt8 = 2
        static let request: UInt8 = 3
        static let acknowledge: UInt8 = 5
    }

    private enum Option {
        static let mask: UInt8 = 1
        static let router: UInt8 = 3
        static let requestedAddress: UInt8 = 50
        static let messageType: UInt8 = 53
        static let server: UInt8 = 54
        static let parameters: UInt8 = 55
        static let end: UInt8 = 255
    }

    private struct Lease {
        var address: IPv4Address
        var server: UInt32
        var mask: UInt32
        var router: IPv4Address
    }

    private static let clientPort: UInt16 = 68
    private static let serverPort: UInt16 = 67
    private static let cookie: UInt32 = 0x6382_5363

    /// Requests an address. False if no server answered.
    func configureByDHCP() -> Bool {
        address = .any
        prefix = 0
        gateway = .any
        let transaction = UInt32(truncatingIfNeeded: timestamp())
        for attempt in UInt64(0)..<4 {
            let patience = (1 + attempt) * seconds
            guard let offer = ask(Message.discover, transaction, nil, expecting: Message.offer, patience),
                let lease = ask(Message.request, transaction, offer, expecting: Message.acknowledge, patience)
            else { continue }
            address = lease.address
            prefix = UInt32(lease.mask.nonzeroBitCount)
            gateway = lease.router
            return true
        }
        return false
    }

    private func ask(
        _ type: UInt8, _ transaction: UInt32, _ offer: Lease?, expecting wanted: UInt8, _ patience: Nanoseconds
    ) -> Lease? {
        var message: [UInt8] = [1, 1, 6, 0]
        message.append32(transaction)
        message.append32(0x8000)  // no time elapsed; answer by broadcast, since there is no address yet
        message += [UInt8](repeating: 0, count: 16)
        message += driver.mac
        message += [UInt8](repeating: 0, count: 10 + 192)
        message.append32(Self.cookie)
        message += [Option.messageType, 1, type]
        if let offer {
            message += [Option.requestedAddress, 4]
            message.append32(offer.address.value)
            message += [Option.server, 4]
            message.append32(offer.server)
        }
        message += [Option.parameters, 2, Option.mask, Option.router, Option.end]
        message += [UInt8](repeating: 0, count: max(0, 300 - message.count))

        var lease: Lease?
        _ = exchange(message, from: Self.clientPort, to: .broadcast, port: Self.serverPort, patience: patience) {
            answer in
            lease = read(answer, transaction, wanted)
            return lease != nil
        }
        return lease
    }

    private func read(_ answer: [UInt8], _ transaction: UInt32, _ wanted: UInt8) -> Lease? {
        guard answer.count > 240, answer[0] == 2, answer.big32(4) == transaction,
            [UInt8](answer[28..<34]) == driver.mac,
            answer.big32(236) == Self.cookie
        else { return nil }
        var lease = Lease(address: IPv4Address(value: answer.big32(16)), server: 0, mask: 0xffff_ff00, router: .any)
        var type: UInt8 = 0
        var index = 240
        while index < answer.count && answer[index] != Option.end {
            if answer[index] == 0 {
                index += 1
                continue
            }
            guard index + 2 < answer.count, index + 2 + Int(answer[index + 1]) <= answer.count else { return nil }
            switch answer[index] {
            case Option.messageType: type = answer[index + 2]
            case Option.server: lease.server = answer.big32(index + 2)
            case Option.mask: lease.mask = answer.big32(index + 2)
            case Option.router: lease.router = IPv4Address(value: answer.big32(index + 2))
            default: break
            }
            index += 2 + Int(answer[index + 1])
        }
        return type == wanted && lease.address != .any ? lease : nil
    }
}
