/// What the loader says: `hvm_start_info` of the PVH boot ABI, version 0 or 1.
struct BootInformation {
    /// The words of the kernel's command line.
    let words: [Text]
    /// Where the ACPI tables begin, 0 if the loader does not say.
    let rootPointer: UInt64
    /// Bytes of RAM in the memory map.
    let memory: UInt64
    /// Where the highest RAM ends.
    let memoryEnd: UInt64

    private static let magic: UInt32 = 0x336e_c578
    private static let ram: UInt32 = 1
    private static let mapped: UInt64 = 1 << 39

    /// Reads it, and gives all RAM above the kernel's image to the page allocator.
    init(at start: UInt64) {
        let info = Address(physical: start)
        guard start != 0, start < Self.mapped, info.load() as UInt32 == Self.magic else {
            (words, rootPointer, memory, memoryEnd) = ([], 0, 0, 0)
            unsafe pages.add(Core.imageEnd.value, Core.imageEnd.value + 16 << 20)  // the least that any machine has
            return
        }
        let version: UInt32 = info.load(4)
        (memory, memoryEnd) = version >= 1 ? Self.addMemory(map: info.load(40), entries: info.load(48)) : (0, 0)
        if memory == 0 { unsafe pages.add(Core.imageEnd.value, Core.imageEnd.value + 16 << 20) }
        words = Self.line(at: info.load(24)).split(UInt8(ascii: " "))
        let pointer: UInt64 = info.load(32)
        rootPointer = pointer < Self.mapped ? pointer : 0
    }

    private static func addMemory(map: UInt64, entries: UInt32) -> (total: UInt64, end: UInt64) {
        guard map != 0, map < mapped, entries <= 1024 else { return (0, 0) }
        var total: UInt64 = 0
        var highest: UInt64 = 0
        for index in 0..<UInt64(entries) {
            let entry = Address(physical: map &+ index &* 24)
            let start: UInt64 = entry.load(0)
            let size: UInt64 = entry.load(8)
            let (end, overflow) = start.addingReportingOverflow(size)
            guard entry.load(16) as UInt32 == ram, !overflow else { continue }
            total &+= size
            highest = max(highest, end)
            unsafe pages.add(max(start, Core.imageEnd.value), end)  // low memory stays the platform's
        }
        return (total, highest)
    }

    private static func line(at start: UInt64) -> Text {
        guard start != 0, start < mapped else { return Text() }
        let line = Address(physical: start)
        var text = Text()
        for offset in 0..<UInt64(4096) {
            let byte: UInt8 = line.load(offset)
            if byte == 0 { break }
            text.append(byte)
        }
        return text
    }

    /// The value of the last `name=value` on the command line.
    func value(_ name: StaticString) -> Text? {
        var found: Text?
        for word in words where word.starts(with: name) && word.bytes.count > name.utf8CodeUnitCount
            && word.bytes[name.utf8CodeUnitCount] == UInt8(ascii: "=") { found = word.dropFirst(name.utf8CodeUnitCount + 1) }
        return found
    }

    /// Whether the word `name` is on the command line.
    func has(_ name: StaticString) -> Bool { words.contains { $0.equals(name) } }
}

extension Address {
    /// A physical address to be read; below 2 MiB through the window at the end of the device pages, since page 0 is absent.
    init(physical: UInt64) { self.init(physical < 0x20_0000 ? 0xffe0_0000 + physical : physical) }
}
