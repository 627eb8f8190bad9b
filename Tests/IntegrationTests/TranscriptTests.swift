// SPDX-License-Identifier: Apache-2.0

import Testing

/// What tests find in the output of a terminal, where swkvm's messages stand among the guest's lines.
@Suite final class TranscriptTests {
    private var transcript = Transcript()

    private func finds(_ text: String) -> Bool { transcript.advance(past: text) }

    @Test func aLineThatAMessageCutsIsFound() {
        transcript.append("sum\r\nreset witswkvm: the machine is running\r\nhin 535 us\r\n> ")
        #expect(finds("reset within"))
        #expect(finds("\n> "))
        #expect(!finds("\n> "))
        #expect(transcript.guestText(from: 5) == "reset within 535 us\r\n> ")
    }

    @Test func aMessageThatIsNotWholeIsWaitedFor() {
        transcript.append("reset sswkvm: the machine")
        #expect(!finds("reset soon"))
        transcript.append(" is running\r\n")
        #expect(!finds("reset soon"))
        transcript.append("oon\r\nnext")
        #expect(finds("reset soon"))
        #expect(finds("next"))
    }

    @Test func messagesOnLinesOfTheirOwnAreFoundInOrder() {
        transcript.append("a\r\nswkvm: one\r\nbswkvm: two\r\nc\r\n")
        #expect(finds("swkvm: one"))
        #expect(finds("swkvm: two"))
        #expect(transcript.guestText(from: 0) == "a\r\nswkvm: one\r\nbc\r\n")
    }

    @Test func twoMessagesInOneWord() {
        transcript.append("reswkvm: one\r\nsetswkvm: two\r\n within\r\nreset within")
        #expect(finds("reset within"))
        #expect(transcript.bytes.count - transcript.position == "\r\nreset within".utf8.count)
    }
}

extension Transcript {
    fileprivate mutating func append(_ text: String) { bytes += text.utf8 }
}
