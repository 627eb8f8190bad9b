// SPDX-License-Identifier: Apache-2.0

/// A unified kernel image: a PE file with kernel, initrd and command line as sections.
struct UnifiedKernel {
    private var sections: [String: FileContents] = [:]

    private static let maximumSections = 96

    init(_ file: FileContents, _ path: String) throws(FileSystemError) {
        func damaged(_ reason: String) -> FileSystemError { .damaged(what: path, reason: reason) }
        let head = try file.read(at: 0, count: Int(min(file.size, 0x40)))
        let place = UInt64(head.little32(0x3c))
        guard head.matches("MZ", at: 0), place <= file.size, file.size - place >= 24 else {
            throw damaged("it is not an EFI program")
        }
        let header = try file.read(at: place, count: 24)
        let count = Int(header.little16(6))
        guard header.matches("PE", at: 0), header.little16(2) == 0, count <= Self.maximumSections else {
            throw damaged("it is not an EFI program")
        }
        guard header.little16(4) == 0x8664 else { throw damaged("it is not for x86-64") }
        let table = place + 24 + UInt64(header.little16(20))
        guard table <= file.size, file.size - table >= UInt64(count * 40) else {
            throw damaged("its sections are truncated")
        }
        let entries = try file.read(at: table, count: count * 40)
        for index in 0..<count {
            let entry = entries.piece(index * 40, 40)
            let name = entry.text(0, 8)
            // What of the section is in the file; the rest is padding, or zeroes that are not stored.
            let size = UInt64(min(entry.little32(8), entry.little32(16))), start = UInt64(entry.little32(20))
            guard start <= file.size, size <= file.size - start else {
                throw damaged("its section \(name) is truncated")
            }
            // An image with several profiles has the common sections first.
            if sections[name] == nil { sections[name] = file.slice(start, size) }
        }
    }

    subscript(name: String) -> FileContents? { sections[name] }

    func text(_ name: String, _ path: String) throws(FileSystemError) -> String? {
        guard let bytes = try sections[name]?.all(limit: 64 << 10, "\(name) of \(path)") else { return nil }
        return String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
    }
}
