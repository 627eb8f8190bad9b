internal import Glibc

/// The text that says what a VMDK image consists of: a file of its own, or a part of its only file.
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
    }

    let type: String
    let extents: [Extent]
    /// Where the eight digits of the content ID are, from the start of the text.
    let contentIDPlace: Int?

    /// Reads and checks a descriptor.
    /// - Parameter path: for errors.
    init(_ bytes: [UInt8], path: String) throws(DiskImageError) {
        func invalid(_ reason: String) -> DiskImageError { .invalid(path: path, reason: "its descriptor has \(reason)") }
        let text = bytes.prefix { $0 != 0 }
        var type = "", extents: [Extent] = [], contentIDPlace: Int?
        for line in text.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: true) {
            let trimmed = line.drop { $0 == 0x20 || $0 == 0x09 }
            guard let first = trimmed.first, first != UInt8(ascii: "#"), first != 0x0d else { continue }
            guard let string = String(validating: trimmed, as: UTF8.self) else {
                // Names may be written in any encoding, those of extents have to be known.
                if trimmed.starts(with: "RW ".utf8) || trimmed.starts(with: "RDONLY ".utf8) { throw invalid("an extent whose name is no UTF-8") }
                continue
            }
            if let (key, value) = Self.assignment(string) {
                switch key.lowercased() {
                case "cid":
                    if let sign = trimmed.firstIndex(of: UInt8(ascii: "=")), value.utf8.count == 8, value.allSatisfy(\.isHexDigit) {
                        contentIDPlace = trimmed[sign...].firstIndex { $0 != UInt8(ascii: "=") && $0 != 0x20 }
                    }
                case "parentcid":
                    guard value.lowercased() == "ffffffff" else { throw .needsParent(path: path, kind: "a link to another image") }
                case "createtype":
                    type = value
                case "version":
                    guard ["1", "2", "3"].contains(value) else { throw .unsupported(path: path, feature: "VMDK descriptor version \(value)") }
                default: break
                }
                continue
            }
            guard let extent = try Self.extent(string, path) else { continue }
            guard extents.count < Self.maximumExtents else { throw .unsupported(path: path, feature: "more than \(Self.maximumExtents) extents") }
            extents.append(extent)
        }
        self.type = type
        self.extents = extents
        self.contentIDPlace = contentIDPlace
        var total: UInt64 = 0
        for extent in extents { total += extent.size }
        guard total <= DiskImage.maximumSize else { throw invalid("\(total) bytes of extents") }
    }

    private static func assignment(_ line: String) -> (key: String, value: String)? {
        guard let sign = line.firstIndex(of: "=") else { return nil }
        let key = line[..<sign].filter { !$0.isWhitespace }
        // A name with an equals sign is no assignment.
        guard !line[..<sign].contains("\"") else { return nil }
        let value = line[line.index(after: sign)...].filter { $0 != "\"" && !$0.isNewline }
        return (String(key), String(value.drop { $0 == " " }))
    }

    /// `RW 4192256 SPARSE "name"`, with a number behind it for flat ones; nil for a line that is no extent.
    private static func extent(_ line: String, _ path: String) throws(DiskImageError) -> Extent? {
        let words = line.split(maxSplits: 3, omittingEmptySubsequences: true) { $0.isWhitespace }
        guard let access = words.first, ["RW", "RDONLY", "NOACCESS"].contains(access) else { return nil }
        func invalid(_ what: String) -> DiskImageError { .invalid(path: path, reason: "\(what) in the extent \(String(line.prefix(200)))") }
        guard words.count >= 3, let sectors = UInt64(words[1]), sectors > 0, sectors <= DiskImage.maximumSize >> 20 else { throw invalid("no size that can be") }
        guard access != "NOACCESS" else { throw .unsupported(path: path, feature: "an extent without access") }
        let size = sectors * 512, isReadOnly = access == "RDONLY"
        if words[2] == "ZERO" { return Extent(kind: .zero, size: size, isReadOnly: isReadOnly, name: "") }
        guard words.count == 4, words[3].first == "\"", let end = words[3].dropFirst().firstIndex(of: "\"") else { throw invalid("no name") }
        let name = String(words[3][words[3].index(after: words[3].startIndex)..<end])
        let rest = words[3][words[3].index(after: end)...].split { $0.isWhitespace }
        switch words[2] {
        case "SPARSE":
            return Extent(kind: .sparse, size: size, isReadOnly: isReadOnly, name: name)
        case "FLAT", "VMFS":
            var place: UInt64 = 0
            if let word = rest.first {
                guard let number = UInt64(word), number <= DiskImage.maximumSize >> 9 else { throw invalid("no place that can be") }
                place = number * 512
            }
            return Extent(kind: .flat(place: place), size: size, isReadOnly: isReadOnly, name: name)
        case let kind:
            throw .unsupported(path: path, feature: "an extent of the kind \(kind)")
        }
    }

    /// The path of an extent: a file in or below the directory of the image, and nothing else.
    static func path(_ name: String, of image: String) throws(DiskImageError) -> String {
        let parts = name.utf8.split(separator: UInt8(ascii: "/"), omittingEmptySubsequences: false)
        guard !name.utf8.contains(0), !parts.contains(where: { $0.elementsEqual("..".utf8) || $0.isEmpty }) else { throw .extentName(path: image, name: name) }
        return name.beside(image)
    }

    /// Eight random digits.
    static func newContentID() -> [UInt8] {
        // 2^32 - 1 means none, 2^32 - 2 is what everybody else begins with.
        hexadecimal(UInt32.random(in: 1 ... 0xffff_fff0))
    }

    private static func hexadecimal(_ value: UInt32) -> [UInt8] {
        let digits = Array("0123456789abcdef".utf8)
        return (0..<8).map { digits[Int(value >> UInt32(28 - 4 * $0)) & 15] }
    }

    /// The text of a new image.
    /// - Parameter extents: lines such as `RW 2048 SPARSE "disk.vmdk"`.
    static func text(type: String, extents: [String], sectors: UInt64) -> [UInt8] {
        Array(
            """
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

            """.utf8)
    }

    /// Bytes of the disk in each file of an image in several: 2 GiB less a grain, as everybody has it.
    static let splitSize: UInt64 = 0x7fff_0000

    /// The text of a new image at `path`, and the names of the other files that it consists of.
    static func text(of kind: ImageSubformat, _ path: String, size: UInt64) throws(DiskImageError) -> (text: [UInt8], names: [String]) {
        let own = String(path.split(separator: "/").last ?? "")
        guard !own.unicodeScalars.contains(where: { $0 == "\"" || $0.properties.generalCategory == .control }) else {
            throw .impossible(path: path, reason: "its name has a quotation mark or a control character, which a VMDK descriptor cannot tell")
        }
        let base = own.lowercased().hasSuffix(".vmdk") ? String(own.dropLast(5)) : own
        var lines: [String] = [], names: [String] = []
        switch kind {
        case .twoGbMaxExtentSparse, .twoGbMaxExtentFlat:
            let letter = kind == .twoGbMaxExtentFlat ? "f" : "s", count = (size + splitSize - 1) / splitSize
            for index in 0..<count {
                let number = String(index + 1), digits = String(repeating: "0", count: max(0, 3 - number.count)) + number
                names.append("\(base)-\(letter)\(digits).vmdk")
                let sectors = min(splitSize, size - index * splitSize) / 512
                lines.append("RW \(sectors) \(kind == .twoGbMaxExtentFlat ? "FLAT" : "SPARSE") \"\(base)-\(letter)\(digits).vmdk\"\(kind == .twoGbMaxExtentFlat ? " 0" : "")")
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
