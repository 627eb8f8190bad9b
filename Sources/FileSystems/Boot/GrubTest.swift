// SPDX-License-Identifier: Apache-2.0

/// The expression of `[ … ]`.
struct GrubTest {
    private var words: ArraySlice<String>

    init(_ words: ArraySlice<String>) { self.words = words }

    /// - Parameter file: what there is at a path; nil for nothing.
    func value(_ file: (String) -> FileNode?) throws(FileSystemError) -> Bool {
        var rest = words
        // `-a` binds more closely than `-o`.
        var result = false, all = true
        while !rest.isEmpty {
            let value = Self.term(&rest, file)
            all = all && value
            switch rest.popFirst() {
            case "-a"?: break
            case "-o"?:
                result = result || all
                all = true
            default: return result || all
            }
        }
        return words.isEmpty ? false : result || all
    }

    private static func term(_ rest: inout ArraySlice<String>, _ file: (String) -> FileNode?) -> Bool {
        guard let word = rest.popFirst() else { return false }
        if word == "!" { return !term(&rest, file) }
        if let operation = rest.first, let operand = rest.dropFirst().first,
            let value = compare(word, operation, operand)
        {
            rest = rest.dropFirst(2)
            return value
        }
        guard let operand = rest.first, operand != "-a", operand != "-o" else { return !word.isEmpty }
        let value: Bool
        switch word {
        case "-z": value = operand.isEmpty
        case "-n": value = !operand.isEmpty
        case "-e": value = file(operand) != nil
        case "-f": value = file(operand)?.kind == .file
        case "-d": value = file(operand)?.kind == .directory
        case "-s": value = (file(operand)?.size ?? 0) > 0
        default: return !word.isEmpty
        }
        rest = rest.dropFirst()
        return value
    }

    private static func compare(_ left: String, _ operation: String, _ right: String) -> Bool? {
        let numbers = (Int(left) ?? 0, Int(right) ?? 0)
        switch operation {
        case "=", "==": return left == right
        case "!=": return left != right
        case "<": return left < right
        case ">": return left > right
        case "-eq": return numbers.0 == numbers.1
        case "-ne": return numbers.0 != numbers.1
        case "-lt": return numbers.0 < numbers.1
        case "-le": return numbers.0 <= numbers.1
        case "-gt": return numbers.0 > numbers.1
        case "-ge": return numbers.0 >= numbers.1
        default: return nil
        }
    }
}
