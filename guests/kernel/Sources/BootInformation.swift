// SPDX-License-Identifier: Apache-2.0

/// The loader's `hvm_start_info` (PVH boot ABI, version 0 or 1). Nothing is copied or allocated before it is needed: a
/// guest that only prints a line needs no page.
struct BootInformation {
    private let info: Address?
    private let line: Address?
    /// The address of the ACPI tables; 0 if the loader does not give it.
    let rootPointer: UInt64
    /// Bytes of RAM in the memory map.
    private(set) var memory: UInt64 = 0
    /// The end of the highest RAM.
    private(set) var memoryEnd: UInt64 = 0
    /// The end of the RAM that contains the kernel: the same, or the start of the hole below 4 GiB.
    private(set) var lowMemoryEnd: UInt64 = 0

    private static let magic: UInt32 = 0x336e_c578
    private static let ram: UInt32 = 1
    private static let mapped: UInt64 = 1 << 39
    /// The space that a platform has for it (docs/platform.md, "Physical memory"), with the closing NUL.
    private static let longestLine: UInt64 = 0x1_0000

    init(at start: UInt64) {
        let candidate = Address(physical: start)
        guard start != 0, start < Self.mapped, candidate.load() as UInt32 == Self.magic else {
            (info, line, rootPointer) = (nil, nil, 0)
            return
        }
        let lineStart: UInt64 = candidate.load(24)
        let pointer: UInt64 = candidate.load(32)
        info = candidate
        line = lineStart != 0 && lineStart < Self.mapped - Self.longestLine ? Address(physical: lineStart) : nil
        rootPointer = pointer < Self.mapped ? pointer : 0
    }

    // MARK: Memory

    /// Gives all RAM above the kernel's image to the page allocator.
    mutating func takeMemory() {
        if let info, info.load(4) as UInt32 >= 1 { readMap(at: info.load(40), entries: info.load(48)) }
        // The minimum of any machine.
        if memory == 0 { unsafe pages.add(Core.imageEnd.value, Core.imageEnd.value + 16 << 20) }
    }

    private mutating func readMap(at map: UInt64, entries: UInt32) {
        guard map != 0, map < Self.mapped, entries <= 1024 else { return }
        for index in 0..<UInt64(entries) {
            let entry = Address(physical: map &+ index &* 24)
            let start: UInt64 = entry.load(0)
            let size: UInt64 = entry.load(8)
            let (end, overflow) = start.addingReportingOverflow(size)
            guard entry.load(16) as UInt32 == Self.ram, !overflow else { continue }
            memory &+= size
            memoryEnd = max(memoryEnd, end)
            if start <= Core.gdt.value && end > Core.gdt.value { lowMemoryEnd = end }
            unsafe pages.add(max(start, Core.imageEnd.value), end)  // low memory belongs to the platform
        }
    }

    // MARK: Command line

    /// Whether the word `word` is on the command line.
    func has(_ word: StaticString) -> Bool {
        guard let line else { return false }
        var place: UInt64 = 0
        while let byte = byte(line, place) {
            if byte != UInt8(ascii: " "), matches(line + place, word),
                Self.endsWord(self.byte(line, place + UInt64(word.utf8CodeUnitCount)))
            {
                return true
            }
            while let byte = self.byte(line, place), byte != UInt8(ascii: " ") { place += 1 }
            while let byte = self.byte(line, place), byte == UInt8(ascii: " ") { place += 1 }
        }
        return false
    }

    private func byte(_ line: Address, _ place: UInt64) -> UInt8? {
        guard place < Self.longestLine else { return nil }
        let byte: UInt8 = line.load(place)
        return byte == 0 ? nil : byte
    }

    private func matches(_ place: Address, _ word: StaticString) -> Bool {
        word.withUTF8Buffer { buffer in
            for index in 0..<buffer.count where unsafe buffer[index] != place.load(UInt64(index)) as UInt8 {
                return false
            }
            return true
        }
    }

    private static func endsWord(_ byte: UInt8?) -> Bool { byte == nil || byte == UInt8(ascii: " ") }

    /// The words of the command line. Single quotes enclose a word with spaces.
    var words: [Text] {
        guard let line else { return [] }
        var text = Text()
        var place: UInt64 = 0
        while let byte = byte(line, place) {
            text.append(byte)
            place += 1
        }
        return text.split(UInt8(ascii: " "))
    }

    /// The value of the last `name=value` on the command line.
    func value(_ name: StaticString) -> Text? {
        let length = name.utf8CodeUnitCount
        var found: Text?
        for word in words
        where word.starts(with: name) && word.count > length && word.bytes[length] == UInt8(ascii: "=") {
            found = word.dropFirst(length + 1)
        }
        return found
    }
}

extension Address {
    /// A readable address for a physical one; below 2 MiB in the window at the end of the device pages, since page 0 is
    /// absent.
    init(physical: UInt64) { self.init(physical < 0x20_0000 ? 0xffe0_0000 + physical : physical) }
}
