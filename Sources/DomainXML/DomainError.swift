// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// Why a document describes no machine, or a machine cannot be written as a document.
public enum DomainError: Error, Equatable, CustomStringConvertible {
    /// It is no XML; the reason is the parser's.
    case malformed(line: Int, String)
    case documentType(line: Int)
    case tooDeep(line: Int)
    case tooManyElements(line: Int)
    case tooLong
    case notDomain(String)
    case missing(String)
    /// A part without which the machine would be another one.
    case unsupported(path: String, String)
    /// Characters that XML does not have.
    case unwritable(String)

    public var description: String {
        switch self {
        case .malformed(let line, let reason): "line \(line): \(reason.printable)"
        case .documentType(let line):
            "line \(line): a document type declaration (<!DOCTYPE>) is not accepted: remove it"
        case .tooDeep(let line): "line \(line): elements are nested more than \(XMLReader.maximumDepth) deep"
        case .tooManyElements(let line): "line \(line): there are more than \(XMLReader.maximumElements) elements"
        case .tooLong: "it is longer than \(XMLReader.maximumSize >> 20) MiB"
        case .notDomain(let name):
            "it describes no machine: its first element is <\(name.printable)>; expected <domain>"
        case .missing(let path): "<\(path)> is missing"
        case .unsupported(let path, let reason): "\(path.printable): \(reason.printable)"
        case .unwritable(let text): "'\(text.printable)' has characters that XML does not have"
        }
    }
}
