// SPDX-License-Identifier: Apache-2.0

import Metadata

extension FuzzTarget {
    /// Frames of a guest for its metadata. Each has its length in front (2, big-endian); behind a frame with an odd
    /// length time passes. Sequence numbers of the other side are random: with bit 15 of its length a frame
    /// acknowledges what has come.
    static let metadata = FuzzTarget(name: "metadata", seeds: [handshake()]) { bytes in
        let store = MetadataStore()
        guard (try? store.put(.object(["a": .string("b"), "c": .array([.number("1"), .object([:])])]))) != nil else {
            fatalError("the metadata is too long")
        }
        var endpoint = MetadataEndpoint(store)
        var now: UInt64 = 0, place = 0, frames = 0
        var acknowledgment: UInt32 = 0
        var hasResponse = false
        while place + 2 <= bytes.count, frames < 200 {
            let head = Int(bytes[place]) << 8 | Int(bytes[place + 1]),
                count = min(head & 0x7fff, bytes.count - place - 2)
            var frame = Array(bytes[place + 2..<place + 2 + count])
            if head & 0x8000 != 0, count >= 46 {
                for index in 0..<4 {
                    frame[42 + index] = UInt8(truncatingIfNeeded: acknowledgment >> (24 - 8 * UInt32(index)))
                }
            }
            place += 2 + count
            endpoint.receive(frame[...], now: now)
            if head & 1 != 0 {
                now &+= 10_000
                endpoint.expire(now: now)
            }
            var answers = 0
            while endpoint.hasFrame, answers < 100 {
                answers += 1
                guard let answer = endpoint.nextFrame(now: now) else { continue }
                precondition(answer.count >= 42 && answer.count <= 1514, "a frame of \(answer.count) bytes")
                if answer[12] == 8, answer[13] == 0 {
                    let sequence = answer[38..<42].reduce(0 as UInt32) { $0 << 8 | UInt32($1) }
                    let flags = answer[47], size = UInt32(answer.count) &- 34 &- UInt32(answer[46] >> 4) * 4
                    if size > 0 { hasResponse = true }
                    acknowledgment = sequence &+ size &+ UInt32(flags & 1) &+ UInt32(flags >> 1 & 1)
                }
            }
            precondition(answers < 100, "frames without end")
            precondition(endpoint.connectionCount <= MetadataEndpoint.maximumConnections, "too many connections")
            _ = endpoint.deadline(now: now)
            frames += 1
        }
        return hasResponse
    }

    /// Any text as metadata, each line for itself. What is read is written so that the same is read again.
    static let metadataText = FuzzTarget(
        name: "metadata-text",
        seeds: [
            Array("{\"a\":[1,-2.5e3,null,true],\"b\":{\"\\u00e4\":\"\\n\\ud83d\\ude00\"}}\n[0.5,\"c\"]\n".utf8)
        ]
    ) { bytes in
        var isAccepted = false
        for line in bytes.split(separator: 0x0a) {
            guard let value = try? MetadataValue(parsing: Array(line)) else { continue }
            precondition((try? MetadataValue(parsing: value.json)) == value, "another value is read")
            var merged = value
            merged.merge(value)
            isAccepted = true
        }
        return isAccepted
    }

    /// A connection that is opened, asks once, and is closed.
    private static func handshake() -> [UInt8] {
        func frame(_ flags: UInt8, _ sequence: UInt8, _ payload: [UInt8], isAnswer: Bool) -> [UInt8] {
            let count = 54 + payload.count
            var bytes: [UInt8] = [UInt8(count >> 8) | (isAnswer ? 0x80 : 0), UInt8(count & 0xff)]
            bytes += [6, 1, 0x23, 0x45, 0x67, 1, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 8, 0]
            bytes += [
                0x45, 0, 0, UInt8(40 + payload.count), 0, 0, 0x40, 0, 64, 6, 0, 0, 169, 254, 0, 1, 169, 254, 169, 254,
            ]
            bytes += [0x9c, 0x40, 0, 80, 0, 0, 0, sequence, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]
            return bytes + payload
        }
        let request = Array("GET /c HTTP/1.0\r\nAccept: application/json\r\n\r\n".utf8)
        return frame(2, 9, [], isAnswer: false) + frame(0x18, 10, request, isAnswer: true)
            + frame(0x10, 10 + UInt8(request.count), [], isAnswer: true)
            + frame(0x11, 10 + UInt8(request.count), [], isAnswer: true)
    }
}
