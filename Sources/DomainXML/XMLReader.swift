// SPDX-License-Identifier: Apache-2.0

internal import CExpat

/// Reads a document, which may come from anywhere. Expat parses it; what could grow or reach beyond it is refused: a
/// document type declaration, which is where entities are declared, depth, number of elements and length.
public enum XMLReader {
    /// Bytes.
    public static let maximumSize = 1 << 20
    static let maximumDepth = 32
    static let maximumElements = 20_000

    /// - Returns: the root.
    public static func read(_ bytes: [UInt8]) throws(DomainError) -> Element {
        guard bytes.count <= maximumSize else { throw .tooLong }
        // URI, name and prefix come as one text; expat refuses a URI with the separator in it.
        guard let parser = unsafe XML_ParserCreateNS(nil, XML_Char(UInt8(ascii: "\n"))) else {
            throw .malformed(line: 1, "there is no memory for the parser")
        }
        defer { unsafe XML_ParserFree(parser) }
        let builder = unsafe Builder(parser)
        unsafe install(builder, parser)
        // The array is as long as that, below 2 GiB.
        let status = unsafe bytes.withUnsafeBytes { buffer in
            unsafe XML_Parse(
                parser, buffer.baseAddress?.assumingMemoryBound(to: CChar.self), Int32(buffer.count), 1)
        }
        if let problem = builder.problem { throw problem }
        guard status == XML_STATUS_OK, let root = builder.root else {
            // Expat's own text, or none.
            let reason = unsafe XML_ErrorString(XML_GetErrorCode(parser)).map { unsafe String(cString: $0) }
            throw .malformed(line: builder.line, reason ?? "no element found")
        }
        return withExtendedLifetime(builder) { root }
    }

    /// Has the parser call the builder, which outlives the parser.
    private static func install(_ builder: Builder, _ parser: XML_Parser) {
        unsafe XML_SetReturnNSTriplet(parser, 1)
        unsafe XML_SetUserData(parser, Unmanaged.passUnretained(builder).toOpaque())
        unsafe XML_SetElementHandler(
            parser,
            { data, name, attributes in
                guard let name = unsafe name, let attributes = unsafe attributes else { return }
                unsafe Builder.of(data)?.start(name, attributes)
            },
            { data, _ in unsafe Builder.of(data)?.end() })
        unsafe XML_SetCharacterDataHandler(parser) { data, text, count in
            guard let text = unsafe text else { return }
            unsafe Builder.of(data)?.add(UnsafeBufferPointer(start: text, count: Int(count)))
        }
        unsafe XML_SetStartDoctypeDeclHandler(parser) { data, _, _, _, _ in
            unsafe Builder.of(data)?.refuse { .documentType(line: $0) }
        }
    }

    /// Makes the tree. The parser lives as long as it: both belong to `read`.
    @safe private final class Builder {
        private let parser: XML_Parser
        private(set) var root: Element?
        private var open: [Element] = []
        private var count = 0
        private(set) var problem: DomainError?

        init(_ parser: XML_Parser) { unsafe self.parser = unsafe parser }

        /// The builder that a call is for.
        static func of(_ data: UnsafeMutableRawPointer?) -> Builder? {
            // What `install` has passed.
            unsafe data.map { unsafe Unmanaged<Builder>.fromOpaque($0).takeUnretainedValue() }
        }

        var line: Int { Int(clamping: unsafe XML_GetCurrentLineNumber(parser)) }

        func refuse(_ error: (Int) -> DomainError) {
            if problem == nil { problem = error(line) }
            unsafe XML_StopParser(parser, XML_Bool(XML_FALSE))
        }

        /// - Parameters:
        ///   - name: ends with a zero.
        ///   - list: names and values by turns, each of which ends with a zero, up to a nil.
        func start(_ name: UnsafePointer<XML_Char>, _ list: UnsafeMutablePointer<UnsafePointer<XML_Char>?>) {
            // Calls may still come after the parser was stopped.
            guard problem == nil else { return }
            count += 1
            guard count <= XMLReader.maximumElements else { return refuse { .tooManyElements(line: $0) } }
            guard open.count < XMLReader.maximumDepth else { return refuse { .tooDeep(line: $0) } }
            var attributes: [(String, String?)] = []
            var place = 0
            while let key = unsafe list[place], let value = unsafe list[place + 1] {
                let (name, prefix, _) = Self.parts(unsafe String(cString: key))
                attributes.append((prefix.isEmpty ? name : prefix + ":" + name, unsafe String(cString: value)))
                place += 2
            }
            let (local, prefix, namespace) = Self.parts(unsafe String(cString: name))
            let element = Element(local, attributes, prefix: prefix, namespace: namespace)
            open.last?.add(element)
            if root == nil { root = element }
            open.append(element)
        }

        func end() { if problem == nil { open.removeLast() } }

        func add(_ text: UnsafeBufferPointer<XML_Char>) {
            guard problem == nil else { return }
            open.last?.add(text: String(decoding: unsafe text.map { UInt8(bitPattern: $0) }, as: UTF8.self))
        }

        private static func parts(_ text: String) -> (name: String, prefix: String, namespace: String) {
            let parts = text.split(separator: "\n", omittingEmptySubsequences: false)
            guard parts.count > 1 else { return (text, "", "") }
            return (String(parts[1]), parts.count > 2 ? String(parts[2]) : "", String(parts[0]))
        }
    }
}
