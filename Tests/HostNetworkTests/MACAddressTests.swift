// SPDX-License-Identifier: Apache-2.0

import HostNetwork
import TestSupport
import Testing

@Suite(.timed) struct MACAddressTests {
    @Test(arguments: ["52:54:00:12:34:56", "52-54-00-12-34-56", "52:54:00:12:34:56".uppercased()])
    func readsTheUsualNotations(_ text: String) throws {
        let address = try MACAddress(parsing: text)
        #expect(address.description == "52:54:00:12:34:56")
        #expect(address.bytes == [0x52, 0x54, 0, 0x12, 0x34, 0x56])
        #expect(address.rawValue == 0x5254_0012_3456)
        #expect(address.bytes[0] & 2 != 0)
    }

    @Test func lettersAreDigitsInBothCases() throws {
        #expect(try MACAddress(parsing: "aC:De:fa:00:0b:FF").description == "ac:de:fa:00:0b:ff")
    }

    @Test(arguments: [
        "", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:5", "52:54:00:12:34:5g", "525400123456",
        "52:54-00:12:34:56",
        "5:254:00:12:34:56", "52.54.00.12.34.56", " 52:54:00:12:34:5", "52:54:00:12:34:56 ", "52:54:00:12:34:5é",
        "+2:54:00:12:34:56",
    ])
    func refusesOtherText(_ text: String) {
        #expect(throws: HostNetworkError.badMACAddress(text, .notation)) { try MACAddress(parsing: text) }
    }

    @Test(arguments: ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "53:54:00:12:34:56"])
    func refusesGroups(_ text: String) {
        #expect(throws: HostNetworkError.badMACAddress(text, .multicast)) { try MACAddress(parsing: text) }
    }

    @Test func refusesZero() {
        #expect(throws: HostNetworkError.badMACAddress("00:00:00:00:00:00", .zero)) {
            try MACAddress(parsing: "00:00:00:00:00:00")
        }
        #expect(throws: HostNetworkError.badMACAddress("00:00:00:00:00:00", .zero)) {
            try MACAddress(rawValue: 1 << 48)
        }
    }

    @Test func sentencesSayWhatToDo() {
        #expect(
            HostNetworkError.badMACAddress("x", .notation).description
                == "'x' is not a MAC address: expected six pairs of hexadecimal digits, such as 52:54:00:12:34:56")
        #expect(
            HostNetworkError.badMACAddress("01:00:5e:00:00:01", .multicast).description
                == "01:00:5e:00:00:01 is a multicast address and cannot be a network card's: its first byte must be even, such as 52"
        )
        #expect(
            HostNetworkError.badMACAddress("00:00:00:00:00:00", .zero).description
                == "00:00:00:00:00:00 cannot be a network card's address: give another, such as 52:54:00:12:34:56")
    }

    @Test func localAddressesAreStations() {
        for value: UInt64 in [0, .max, 0x0123_4567_89ab, 0x0100_0000_0000] {
            let address = MACAddress(locallyAdministered: value)
            #expect(address.bytes[0] & 2 != 0 && address.byte(at: 0) & 1 == 0)
            #expect(address.rawValue | 0x0300_0000_0000 == value & 0xffff_ffff_ffff | 0x0300_0000_0000)
        }
    }
}

@Suite(.timed) struct InterfaceNameTests {
    @Test(arguments: ["a", "swtap0", "br-lan", "eth0.100", "x_y", "exactly15bytes_"])
    func takesNames(_ text: String) throws {
        #expect(try InterfaceName(text).text == text)
    }

    @Test(arguments: [
        ("", InterfaceName.Problem.empty), ("sixteen_bytes_16", .tooLong(16)), ("ééééééééé", .tooLong(18)),
        (".", .reserved), ("..", .reserved),
        ("a b", .character(" ")), ("a/b", .character("/")), ("a:1", .character(":")), ("tap%d", .character("%")),
        ("tüp", .character("ü")),
        ("a\n", .character("\n")), ("a\0b", .character("\0")), ("a\u{7f}", .character("\u{7f}")),
    ])
    func refusesWhatTheKernelWould(_ text: String, _ problem: InterfaceName.Problem) {
        #expect(throws: HostNetworkError.badInterfaceName(text, problem)) { try InterfaceName(text) }
    }

    @Test func sentencesSayWhatToDo() {
        #expect(
            HostNetworkError.badInterfaceName("sixteen_bytes_16", .tooLong(16)).description
                == "the interface name 'sixteen_bytes_16' has 16 bytes, the kernel allows at most 15")
        #expect(
            HostNetworkError.badInterfaceName("a/b", .character("/")).description
                == "the interface name 'a/b' has the character \"/\", which is not allowed: use letters, digits, '-', '_' and '.'"
        )
        #expect(
            HostNetworkError.badInterfaceName("", .empty).description
                == "the name of a network interface is empty: give 1 to 15 characters")
        #expect(
            HostNetworkError.badInterfaceName("..", .reserved).description
                == "'..' cannot be the name of a network interface: use letters, digits, '-', '_' and '.'")
    }
}
