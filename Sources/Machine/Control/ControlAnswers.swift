// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// Answers of the machine's control on their way to the thread of an event loop, which made the requests.
final class ControlAnswers: Sendable {
    /// Readable when there are some.
    let event: EventFD
    private let lines = Guarded<[String]>([])

    init() throws(SystemCallError) { event = try EventFD() }

    func add(_ answer: MachineControl.Answer) {
        lines.withLock { lines in
            switch answer {
            case .success(let line): lines.append(line)
            case .failure(let error): lines.append(error.description)
            }
        }
        event.signal()
    }

    func take() -> [String] {
        event.drain()
        return lines.withLock { lines in
            defer { lines = [] }
            return lines
        }
    }
}
