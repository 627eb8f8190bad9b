// SPDX-License-Identifier: Apache-2.0

/// The signature at the start (or, for a fixed VHD, the end) of a file: used to refuse a guessed format, never to
/// choose one.
public enum ImageSignature: Sendable, Equatable {
    case qcow2
    /// QEMU's first format of that name, version 1.
    case qcow
    case vmdk
    case vhdx
    case vdi
    case vhd
    case luks
    case qed
    case parallels

    /// Bytes at a file's start, and at its end, that are read.
    static let length = 512

    /// The usual name of the format.
    public var name: String {
        switch self {
        case .qcow: "qcow (version 1)"
        case .luks: "LUKS"
        case .qed: "QED"
        case .parallels: "a Parallels disk"
        case .qcow2, .vmdk, .vhdx, .vdi, .vhd: format?.name ?? ""
        }
    }

    /// The format that is opened if it is stated, or nil.
    public var format: ImageFormat? {
        switch self {
        case .qcow2: .qcow2
        case .vmdk: .vmdk
        case .vhdx: .vhdx
        case .vdi: .vdi
        case .vhd: .vhd
        case .qcow, .luks, .qed, .parallels: nil
        }
    }

    /// All that are found in a file.
    /// - Parameters:
    ///   - start: the first ``length`` bytes, or as many as there are.
    ///   - end: the last ones.
    static func all(start: [UInt8], end: [UInt8]) -> [ImageSignature] {
        var found: [ImageSignature] = []
        func begins(_ text: String, at place: Int = 0) -> Bool { start.dropFirst(place).starts(with: text.utf8) }
        if start.starts(with: QCOW2Header.magic) {
            found.append(start.count >= 8 && start.bigEndian32(at: 4) == 1 ? .qcow : .qcow2)
        }
        if start.starts(with: VMDKHeader.magic) || begins("COWD") || VMDKDescriptor.begins(start) {
            found.append(.vmdk)
        }
        if begins("vhdxfile") { found.append(.vhdx) }
        // After 64 bytes of text: VBox's "VDI image signature".
        if start.dropFirst(64).starts(with: [0x7f, 0x10, 0xda, 0xbe]) { found.append(.vdi) }
        // The footer, and its copy at the start of what is not fixed. Some old ones have 511 bytes.
        let footer = Array("conectix".utf8)
        if start.starts(with: footer) || end.starts(with: footer) || end.dropFirst().starts(with: footer) {
            found.append(.vhd)
        }
        if begins("LUKS") && start.dropFirst(4).starts(with: [0xba, 0xbe]) { found.append(.luks) }
        if begins("QED\0") { found.append(.qed) }
        if begins("WithoutFreeSpace") || begins("WithouFreSpacExt") { found.append(.parallels) }
        return found
    }
}

/// The format by which a file is opened, and what specifies it. Every file of an image comes by one of these, and is
/// held against it when it is open.
struct FormatChoice: Sendable {
    enum Source: Sendable {
        /// Specified by the user, or by an image for its backing file: the contents are not checked.
        case stated
        /// The file's name; the option of `swkvm image` would state it.
        case name(option: String)
        /// An image refers to the file and does not record its format.
        case image
    }

    let format: ImageFormat
    let source: Source

    /// A format that is stated, or else what the name stands for.
    init(_ stated: ImageFormat?, of path: String, option: String = "--format") throws(DiskImageError) {
        format = try ImageFormat(stated, orExtensionOf: path, option: option)
        source = stated == nil ? .name(option: option) : .stated
    }

    /// That of a backing file, as the image over it states it. Without a word it is what its name stands for, and raw
    /// where that says nothing.
    init(backing stated: String?, _ path: String) throws(DiskImageError) {
        if let stated {
            guard let format = ImageFormat(rawValue: stated) else { throw .formatUnsupported(path: path, name: stated) }
            self.format = format
            source = .stated
        } else {
            format = (try? ImageFormat(extensionOf: path)) ?? .raw
            source = .image
        }
    }

    /// That of a backing file which the user names.
    init(_ backing: BackingReference) {
        format = backing.format
        source = backing.isFormatStated ? .stated : .name(option: "--backing-format")
    }

    /// Refuses a guess that the contents contradict.
    func check(_ file: borrowing ImageFile) throws(DiskImageError) {
        if case .stated = source { return }
        let length = min(file.size, UInt64(ImageSignature.length))
        try check(
            file.path, start: file.read("its beginning", count: Int(length), at: 0),
            end: file.read("its end", count: Int(length), at: file.size - length))
    }

    /// The same for a remote disk that is not in use yet.
    func check(_ disk: NBDDisk) throws(DiskImageError) {
        if case .stated = source { return }
        // Whole blocks, whatever the server's are; a last one that is none is left alone.
        let block = max(UInt64(ImageSignature.length), disk.export.minimumBlock), size = disk.export.size
        guard size >= block, block <= 1 << 20 else { return }
        let start: [UInt8], end: [UInt8]
        do throws(DiskImageError) {
            start = try disk.readFirst(Int(block), at: 0)
            end = try size % disk.export.minimumBlock == 0 ? disk.readFirst(Int(block), at: size - block) : []
        } catch {
            throw .remoteUnchecked(path: disk.path)
        }
        try check(
            disk.path, start: Array(start.prefix(ImageSignature.length)), end: Array(end.suffix(ImageSignature.length)))
    }

    /// The same for a backing file that is not opened otherwise: it is not stated to be raw because of its name alone.
    func checkUnopened(_ path: String) throws(DiskImageError) {
        guard try !check(path: path), format == .raw else { return }
        throw .notApplicable(
            path: path, reason: "it cannot be opened to verify that it is raw: specify --backing-format raw")
    }

    /// The same for a file that is not opened otherwise, if it can be.
    /// - Returns: whether it could.
    func check(path: String) throws(DiskImageError) -> Bool {
        if case .stated = source { return true }
        guard !NBDLocation.isAddress(path) else { return false }
        let file: ImageFile
        do throws(DiskImageError) {
            file = try ImageFile(path: path, writable: false, cache: .writeback, locking: false)
        } catch { return false }
        try check(file)
        return true
    }

    private func check(_ path: String, start: [UInt8], end: [UInt8]) throws(DiskImageError) {
        let found = ImageSignature.all(start: start, end: end)
        guard let contents = found.first, !found.contains(where: { $0.format == format }) else { return }
        let option: String? = if case .name(let option) = source { option } else { nil }
        throw .formatContradicted(path: path, guess: format, contents: contents, option: option)
    }
}
