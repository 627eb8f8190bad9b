// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import DiskImage

/// `cluster_size=1M,lazy_refcounts=on`: the layout of a new image in the words of `qemu-img create -o`.
struct LayoutWords {
    enum Word: Equatable {
        case clusterSize(UInt64)
        case refcountBits(Int)
        case compatibility(QCOW2Compatibility)
        case lazyRefcounts(Bool)
        case extendedL2(Bool)
        case compression(CompressionType)
        case subformat(ImageSubformat)
        case preallocation(Preallocation)
    }

    let all: [Word]

    static let completion = ValueCompletion.list([
        "cluster_size=", "refcount_bits=1/2/4/8/16/32/64", "compat=0.10/1.1/v2/v3", "lazy_refcounts=on/off",
        "extended_l2=on/off",
        "compression_type=" + CompressionType.allCases.map(\.rawValue).joined(separator: "/"),
        "subformat=" + ImageSubformat.allCases.map(\.rawValue).joined(separator: "/"),
        "preallocation=" + Preallocation.allCases.map(\.rawValue).joined(separator: "/"),
    ])

    static let names =
        "cluster_size, refcount_bits, compat, lazy_refcounts, extended_l2, compression_type, subformat, preallocation"

    /// - Throws: a sentence about the first word that is wrong.
    init(parsing argument: String) throws {
        all = try argument.split(separator: ",", omittingEmptySubsequences: false).map { item in
            let sign = item.firstIndex(of: "=")
            let value = sign.map { String(item[item.index(after: $0)...]) } ?? ""
            return try LayoutWords.Word(item[..<(sign ?? item.endIndex)], value)
        }
    }
}

extension LayoutWords.Word {
    fileprivate init(_ name: Substring, _ value: String) throws {
        func known<Value>(_ parsed: Value?, _ wanted: String) throws -> Value {
            guard let parsed else { throw ArgumentProblem("\(name)=\(value) is not recognized; expected \(wanted)") }
            return parsed
        }
        func flag() throws -> Bool { try known(["on": true, "off": false][value], "on or off") }
        func one<Value: CaseIterable & RawRepresentable<String>>(
            of type: Value.Type, _ spelling: String? = nil
        ) throws -> Value {
            try known(Value(rawValue: spelling ?? value), Value.allCases.map(\.rawValue).joined(separator: ", "))
        }
        switch name {
        case "cluster_size": self = .clusterSize(try known(ByteSize(argument: value), "a size such as 64K").bytes)
        case "refcount_bits": self = .refcountBits(try known(Int(value), "1, 2, 4, 8, 16, 32 or 64"))
        case "compat": self = .compatibility(try one(of: QCOW2Compatibility.self, ["v2": "0.10", "v3": "1.1"][value]))
        case "lazy_refcounts": self = .lazyRefcounts(try flag())
        case "extended_l2": self = .extendedL2(try flag())
        case "compression_type": self = .compression(try one(of: CompressionType.self))
        case "subformat": self = .subformat(try one(of: ImageSubformat.self))
        case "preallocation": self = .preallocation(try one(of: Preallocation.self))
        default: throw ArgumentProblem("'\(name)' is not recognized; expected \(LayoutWords.names)")
        }
    }

    func change(_ options: inout QCOW2Options) {
        switch self {
        case .clusterSize(let size): options.clusterSize = size
        case .refcountBits(let bits): options.refcountBits = bits
        case .compatibility(let version): options.compatibility = version
        case .lazyRefcounts(let isOn): options.lazyRefcounts = isOn
        case .extendedL2(let isOn): options.extendedL2 = isOn
        case .compression(let type): options.compression = type
        case .subformat, .preallocation: break
        }
    }

    var subformat: ImageSubformat? {
        if case .subformat(let kind) = self { kind } else { nil }
    }

    var preallocation: Preallocation? {
        if case .preallocation(let mode) = self { mode } else { nil }
    }
}
