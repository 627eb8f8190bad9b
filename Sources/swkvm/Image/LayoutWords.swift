internal import ArgumentParser
internal import DiskImage

/// `cluster_size=1M,lazy_refcounts=on`: the layout of a new image in the words of `qemu-img create -o`.
struct LayoutWords: ExpressibleByArgument {
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

    static let names = "cluster_size, refcount_bits, compat, lazy_refcounts, extended_l2, compression_type, subformat, preallocation"

    init?(argument: String) {
        var all: [Word] = []
        for item in argument.split(separator: ",", omittingEmptySubsequences: false) {
            guard let sign = item.firstIndex(of: "="), let word = Word(item[..<sign], String(item[item.index(after: sign)...])) else { return nil }
            all.append(word)
        }
        self.all = all
    }
}

extension LayoutWords.Word {
    fileprivate init?(_ name: Substring, _ value: String) {
        func flag() -> Bool? { ["on": true, "off": false][value] }
        let word: Self? =
            switch name {
            case "cluster_size": ByteSize(argument: value).map { .clusterSize($0.bytes) }
            case "refcount_bits": Int(value).map { .refcountBits($0) }
            case "compat": QCOW2Compatibility(rawValue: ["v2": "0.10", "v3": "1.1"][value] ?? value).map { .compatibility($0) }
            case "lazy_refcounts": flag().map { .lazyRefcounts($0) }
            case "extended_l2": flag().map { .extendedL2($0) }
            case "compression_type": CompressionType(rawValue: value).map { .compression($0) }
            case "subformat": ImageSubformat(rawValue: value).map { .subformat($0) }
            case "preallocation": Preallocation(rawValue: value).map { .preallocation($0) }
            default: nil
            }
        guard let word else { return nil }
        self = word
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
