// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// The text that describes the parts of a VMDK image: a file of its own, or a part of its only file.
struct VMDKDescriptor: Equatable {
    /// The most bytes of one.
    static let maximumSize = 1 << 20
    /// The most files of an image.
    static let maximumExtents = 512
    static let firstLine = "# Disk DescriptorFile"

    struct Extent: Equatable {
        enum Kind: Equatable {
            case flat(place: UInt64)
            case sparse
            case zero
        }

        let kind: Kind
        /// Bytes of the disk.
        let size: UInt64
        let isReadOnly: Bool
        /// The file, as written; empty for zeroes.
        let name: String
        /// The same name in UTF-8, where it is written in another encoding: what the file is called once it came to
        /// this host.
        let converted: String?
    }

    let type: String
    let extents: [Extent]
    /// Where the eight digits of the content ID are, from the start of the text.
    let contentIDPlace: Int?

    /// Reads and checks a descriptor as others write it: with blanks and tabs around everything, any end of lines, a
    /// byte-order mark, words in any case, and names in the encoding of their host.
    /// - Parameter path: for errors.
    init(_ bytes: [UInt8], path: String) throws(DiskImageError) {
        func invalid(_ reason: String) -> DiskImageError {
            .invalid(path: path, reason: "its descriptor has \(reason)")
        }
        var type = "", contentIDPlace: Int?, encoding: TextEncoding?
        var lines: [ArraySlice<UInt8>] = []
        for line in Self.lines(bytes) {
            if Self.isExtent(line) {
                guard lines.count < Self.maximumExtents else {
                    throw .unsupported(path: path, feature: "more than \(Self.maximumExtents) extents")
                }
                lines.append(line)
                continue
            }
            guard let (key, value) = Self.assignment(line) else { continue }
            let word = String(decoding: value, as: UTF8.self)
            switch key {
            case "cid":
                if value.count == 8, word.allSatisfy(\.isHexDigit) { contentIDPlace = value.startIndex }
            case "parentcid":
                guard word.lowercased() == "ffffffff" else {
                    throw .needsParent(path: path, kind: "a link to another image")
                }
            case "createtype":
                type = word
            case "encoding":
                encoding = TextEncoding(named: word.lowercased())
            case "version":
                guard ["1", "2", "3"].contains(word) else {
                    throw .unsupported(path: path, feature: "VMDK descriptor version \(String(word.prefix(32)))")
                }
            default: break
            }
        }
        self.type = type
        extents = try lines.map { line throws(DiskImageError) in try Self.extent(line, encoding, path) }
        self.contentIDPlace = contentIDPlace
        var total: UInt64 = 0
        for extent in extents { total += extent.size }
        guard total <= DiskImage.maximumSize else { throw invalid("\(total) bytes of extents") }
    }

    /// Indicates whether a text begins as a descriptor does. Some have no blanks there, or more of them, and some begin
    /// with
    /// what has to come somewhere.
    static func begins(_ bytes: [UInt8]) -> Bool {
        let text = Self.text(bytes)
        let first = text.split(whereSeparator: isEndOfLine).map(trimmed).first { !$0.isEmpty }
        guard let first else { return false }
        if lowercase(first.filter { !isBlank($0) }) == "#diskdescriptorfile" { return true }
        return lines(bytes).contains { line in assignment(line)?.key == "createtype" }
    }

    // MARK: - Its text

    /// The text without a byte-order mark, up to the first zero.
    private static func text(_ bytes: [UInt8]) -> ArraySlice<UInt8> {
        (bytes.starts(with: [0xef, 0xbb, 0xbf]) ? bytes.dropFirst(3) : bytes[...]).prefix { $0 != 0 }
    }

    /// What says something: lines that are neither empty nor comments, without the blanks around them.
    private static func lines(_ bytes: [UInt8]) -> [ArraySlice<UInt8>] {
        let lines = text(bytes).split(whereSeparator: isEndOfLine).map(trimmed)
        return lines.filter { !$0.isEmpty && $0.first != UInt8(ascii: "#") }
    }

    private static func isEndOfLine(_ byte: UInt8) -> Bool { byte == 0x0a || byte == 0x0d }
    private static func isBlank(_ byte: UInt8) -> Bool { byte == 0x20 || byte == 0x09 || byte == 0x0b || byte == 0x0c }

    private static func trimmed(_ text: ArraySlice<UInt8>) -> ArraySlice<UInt8> {
        let start = text.drop(while: isBlank)
        return start.prefix((start.lastIndex { !isBlank($0) } ?? start.startIndex - 1) - start.startIndex + 1)
    }

    private static func lowercase(_ word: some Sequence<UInt8>) -> String {
        String(decoding: Array(word), as: UTF8.self).lowercased()
    }

    /// `key = value` or `key = "value"`: the key in lower case, the value without its quotation marks.
    private static func assignment(_ line: ArraySlice<UInt8>) -> (key: String, value: ArraySlice<UInt8>)? {
        // A name with an equals sign is no assignment.
        let mark = line.firstIndex { $0 == UInt8(ascii: "=") || $0 == UInt8(ascii: "\"") }
        guard let sign = mark, line[sign] == UInt8(ascii: "=") else { return nil }
        var value = trimmed(line[(sign + 1)...])
        if value.first == UInt8(ascii: "\"") { value = trimmed(value.dropFirst().prefix { $0 != UInt8(ascii: "\"") }) }
        return (lowercase(trimmed(line[..<sign])), value)
    }

    private static let accesses = ["rw", "rdonly", "noaccess"]

    private static func isExtent(_ line: ArraySlice<UInt8>) -> Bool {
        let word = line.prefix { !isBlank($0) }
        return word.count < line.count && word.count <= 8 && accesses.contains(lowercase(word))
    }

    /// `RW 4192256 SPARSE "name"`, with a number behind it for flat ones.
    private static func extent(
        _ line: ArraySlice<UInt8>, _ encoding: TextEncoding?, _ path: String
    ) throws(DiskImageError) -> Extent {
        func invalid(_ what: String) -> DiskImageError {
            .invalid(path: path, reason: "\(what) in the extent \(String(decoding: line.prefix(200), as: UTF8.self))")
        }
        func number(_ word: ArraySlice<UInt8>) -> UInt64? { UInt64(String(decoding: word, as: UTF8.self)) }
        let words = line.split(maxSplits: 3, whereSeparator: isBlank), access = lowercase(words[0])
        guard words.count >= 3, let sectors = number(words[1]), sectors > 0, sectors <= DiskImage.maximumSize >> 20
        else {
            throw invalid("an invalid size")
        }
        guard access != "noaccess" else { throw .unsupported(path: path, feature: "an extent without access") }
        let size = sectors * 512, isReadOnly = access == "rdonly", kind = lowercase(words[2])
        if kind == "zero" { return Extent(kind: .zero, size: size, isReadOnly: isReadOnly, name: "", converted: nil) }
        guard words.count == 4 else { throw invalid("no name") }
        let rest = trimmed(words[3])
        guard rest.first == UInt8(ascii: "\""), let end = rest.dropFirst().firstIndex(of: UInt8(ascii: "\"")) else {
            throw invalid("no name")
        }
        let bytes = rest[(rest.startIndex + 1)..<end]
        let name = String(raw: bytes), converted = TextEncoding.converted(bytes, encoding)
        switch kind {
        case "sparse":
            return Extent(kind: .sparse, size: size, isReadOnly: isReadOnly, name: name, converted: converted)
        case "flat", "vmfs":
            var place: UInt64 = 0
            if let word = rest[(end + 1)...].split(whereSeparator: isBlank).first {
                guard let number = number(word), number <= DiskImage.maximumSize >> 9 else {
                    throw invalid("an invalid offset")
                }
                place = number * 512
            }
            return Extent(
                kind: .flat(place: place), size: size, isReadOnly: isReadOnly, name: name, converted: converted)
        default:
            throw .unsupported(path: path, feature: "an extent of the kind \(String(kind.uppercased().prefix(32)))")
        }
    }

    /// The path of an extent: a file in or below the directory of the image, and nothing else.
    static func path(_ name: String, of image: String) throws(DiskImageError) -> String {
        let parts = name.utf8.split(separator: UInt8(ascii: "/"), omittingEmptySubsequences: false)
        guard !name.utf8.contains(0), !parts.contains(where: { $0.elementsEqual("..".utf8) || $0.isEmpty }) else {
            throw .extentName(path: image, name: name)
        }
        return name.beside(image)
    }

    /// Eight random digits.
    static func newContentID() -> [UInt8] {
        // 2^32 - 1 means none, 2^32 - 2 is the initial value of other programs.
        hexadecimal(UInt32.random(in: 1...0xffff_fff0))
    }

    private static func hexadecimal(_ value: UInt32) -> [UInt8] {
        let digits = Array("0123456789abcdef".utf8)
        return (0..<8).map { digits[Int(value >> UInt32(28 - 4 * $0)) & 15] }
    }

    /// The text of a new image.
    /// - Parameter extents: lines such as `RW 2048 SPARSE "disk.vmdk"`.
    static func text(type: String, extents: [String], sectors: UInt64) -> [UInt8] {
        ("""
        \(firstLine)
        version=1
        CID=\(String(decoding: newContentID(), as: UTF8.self))
        parentCID=ffffffff
        createType="\(type)"

        # Extent description
        \(extents.joined(separator: "\n"))

        # The Disk Data Base
        #DDB

        ddb.virtualHWVersion = "4"
        ddb.geometry.cylinders = "\(min(sectors / (16 * 63), 16383))"
        ddb.geometry.heads = "16"
        ddb.geometry.sectors = "63"
        ddb.adapterType = "ide"

        """.rawBytes)
    }

    /// Bytes of the disk in each file of an image in several: 2 GiB less a grain, as in other programs.
    static let splitSize: UInt64 = 0x7fff_0000

    /// The text of a new image at `path`, and the names of the other files that it consists of.
    static func text(
        of kind: ImageSubformat, _ path: String, size: UInt64
    ) throws(DiskImageError) -> (text: [UInt8], names: [String]) {
        let own = String(Substring(path.utf8.split(separator: UInt8(ascii: "/")).last ?? Substring().utf8))
        guard !own.unicodeScalars.contains(where: { $0 == "\"" || $0.properties.generalCategory == .control }) else {
            throw .impossible(
                path: path,
                reason: "its name has a quotation mark or a control character, which a VMDK descriptor cannot represent"
            )
        }
        let base = own.lowercased().hasSuffix(".vmdk") ? String(own.dropLast(5)) : own
        var lines: [String] = [], names: [String] = []
        switch kind {
        case .twoGbMaxExtentSparse, .twoGbMaxExtentFlat:
            let letter = kind == .twoGbMaxExtentFlat ? "f" : "s", count = (size + splitSize - 1) / splitSize
            for index in 0..<count {
                let number = String(index + 1),
                    digits = String(repeating: "0", count: max(0, 3 - number.count)) + number
                names.append("\(base)-\(letter)\(digits).vmdk")
                let sectors = min(splitSize, size - index * splitSize) / 512
                lines.append(
                    "RW \(sectors) \(kind == .twoGbMaxExtentFlat ? "FLAT" : "SPARSE") \"\(base)-\(letter)\(digits).vmdk\"\(kind == .twoGbMaxExtentFlat ? " 0" : "")"
                )
            }
        case .monolithicFlat:
            names.append("\(base)-flat.vmdk")
            lines.append("RW \(size / 512) FLAT \"\(base)-flat.vmdk\" 0")
        default:
            lines.append("RW \(size / 512) SPARSE \"\(own)\"")
        }
        return (text(type: kind.rawValue, extents: lines, sectors: size / 512), names)
    }
}
