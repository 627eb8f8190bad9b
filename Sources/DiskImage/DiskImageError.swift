// SPDX-License-Identifier: Apache-2.0

internal import Glibc
public import Linux

/// An error of opening or using a disk image. Each describes itself in one sentence.
public indirect enum DiskImageError: Error, Equatable, CustomStringConvertible {
    /// A system call on the file failed.
    case system(path: String, SystemCallError)
    /// A format given neither by the user nor by the file name; `option` of `swkvm image` specifies it.
    case formatUnknown(path: String, option: String = "--format")
    /// The stated format is not supported.
    case formatUnsupported(path: String, name: String)
    /// Neither a regular file nor a block device.
    case notAFile(path: String)
    /// The file does not begin with qcow2's magic; `found` are its first bytes, at most four.
    case notQCOW2(path: String, found: [UInt8])
    /// The file lacks the signature of the stated format.
    case notOfFormat(path: String, format: String, reason: String)
    /// An extent's name that is no plain path below the image's directory.
    case extentName(path: String, name: String)
    /// The image names files with its extents and the user does not allow them.
    case extentNotAllowed(path: String, name: String)
    /// A file with an extent of the image `of` cannot be used.
    case extent(of: String, DiskImageError)
    /// The file ends before data that its header refers to.
    case truncated(path: String, what: String, needed: UInt64, size: UInt64)
    /// A header field that contradicts the format.
    case invalid(path: String, reason: String)
    /// A feature of the format that cannot be used.
    case unsupported(path: String, feature: String)
    /// The image, of the kind that is named, has only the differences from a parent in another file.
    case needsParent(path: String, kind: String)
    /// The image can only be read.
    case notWritable(path: String, reason: String)
    /// The image has no such snapshot, by id or by name.
    case noSnapshot(path: String, name: String)
    /// An impossible operation on a snapshot.
    case snapshot(path: String, name: String, reason: String)
    /// The image's reference counts have too few bits for what was asked.
    case countsTooNarrow(path: String, bits: Int, needed: UInt64)
    /// A format whose metadata, if it has any, is not checked.
    case notCheckable(path: String)
    /// The disk cannot have the size that was asked.
    case resize(path: String, reason: String)
    /// Another process has the file open in a way that excludes ours.
    case locked(path: String, forWriting: Bool)
    /// The file system keeps no locks.
    case lockingUnavailable(path: String, SystemCallError)
    /// `cache=none` on a file system without direct I/O.
    case directUnavailable(path: String, SystemCallError)
    /// A file that an image refers to is outside the allowed directories (``NamedFiles``).
    case outside(path: String)
    /// A remote disk that an image refers to, but the command line does not name.
    case addressNotStated(path: String)
    /// The format is not stated, what the name stands for (or nothing, for a backing file: `option` is nil) is another
    /// one than the contents begin as.
    case formatContradicted(path: String, guess: ImageFormat, contents: ImageSignature, option: String?)
    /// A file of a disk is one of another disk of the same machine, and one of them writes it.
    case sameDisk(path: String, file: String, other: String)
    /// A backing file, named by the image `of`, cannot be used.
    case backing(of: String, DiskImageError)
    /// The image names a backing file and the user does not allow one.
    case backingNotAllowed(path: String, name: String)
    /// The image keeps its data in another file, and the user has neither named nor allowed one.
    case dataFileNotAllowed(path: String, name: String)
    /// The user has named a file with the data of an image that keeps its data in itself.
    case dataFileUnused(path: String, name: String)
    /// The file with the image's data, named by the image `of` or by the user, cannot be used.
    case dataFile(of: String, DiskImageError)
    /// A backing file's name that is not a plain path.
    case backingName(path: String, name: String)
    /// An image that is, over others or not, its own backing file.
    case backingLoop(path: String)
    /// More images in the backing chain than ``DiskImage/maximumChainLength``.
    case backingTooDeep(path: String)
    /// A request failed with an errno value.
    case request(path: String, SystemCallError)
    /// A running machine's request failed in this file at a byte; with a length, bytes of the disk and not of a file.
    case transfer(path: String, offset: UInt64, length: UInt64?, SystemCallError)
    /// An invalid address of a remote disk.
    case remoteAddress(path: String, reason: String)
    /// A remote disk cannot be reached, or not any more.
    case remote(path: String, reason: String)
    /// A remote disk whose format was not stated, and whose beginning cannot be read to look for another one.
    case remoteUnchecked(path: String)
    /// Something that is done to files, not to a remote disk.
    case remoteNotPossible(path: String, reason: String = "this is supported for files only, not for a remote disk")
    /// A remote disk to be written can only be read.
    case remoteReadOnly(path: String)
    /// The image is encrypted, in the way that is named, and no key was given.
    case keyMissing(path: String, method: String)
    /// A key that opens no key slot of the image.
    case wrongKey(path: String)
    /// More keys were given than the image and its backing files have encrypted ones among them.
    case keyUnused(path: String, encrypted: Int, keys: Int)
    /// One of the two sizes of a VHD was chosen, but neither the image nor a backing file is one.
    case vhdSizeUnused(path: String, VHDSize)
    /// A key cannot be read.
    case key(KeySource, reason: String)
    /// An image that requires too many hash iterations to check a key.
    case keyTooSlow(path: String, work: UInt64, limit: UInt64)
    /// A new image would replace a file, which was not requested.
    case exists(path: String)
    /// A block device to be overwritten is in use by the host itself.
    case deviceInUse(path: String)
    /// A new image's name is a dangling symbolic link.
    case linkToNothing(path: String)
    /// An image to be written is itself what is read, or a part of it.
    case sameFile(path: String, other: String)
    /// Options of a new image that contradict each other or its format.
    case impossible(path: String, reason: String)
    /// An operation that does not apply to an existing image.
    case notApplicable(path: String, reason: String)
    /// A target for a disk of `needed` bytes has `size`.
    case tooSmall(path: String, needed: UInt64, size: UInt64)
    /// An image that was being opened when ``DiskImageOptions/isInterrupted`` cancelled it.
    case openingInterrupted(path: String)
    /// An operation that was interrupted by a signal.
    case interrupted(path: String)
    /// The same of an operation that has changed the image, but neither its contents nor its backing file.
    case interruptedUnchanged(path: String)
    /// The same of an operation that keeps what it has written so far.
    case interruptedInPlace(path: String)
    /// A failed write into such a target.
    case failedInPlace(path: String, DiskImageError)

    /// For a caller that opens a backing file while it has the overlay open: a file that seems to be another process's
    /// may be that image.
    func orLoop(to image: String) -> DiskImageError {
        guard case .locked(let file, _) = cause, let own = ImageFile.Identity(ofPath: image),
            ImageFile.Identity(ofPath: file) == own
        else { return self }
        return .backingLoop(path: file)
    }

    /// What is wrong with the file itself, however far below the image that the user named it is.
    var cause: DiskImageError {
        switch self {
        case .backing(_, let error), .dataFile(_, let error), .extent(_, let error): error.cause
        default: self
        }
    }

    /// The sentence for `swkvm run`.
    public var description: String { text(.disk) }

    /// The sentence for a command line of this syntax.
    public func text(_ syntax: OptionSyntax) -> String {
        switch self {
        case .system(let path, let error):
            "disk \(quoted(path)): \(error)"
        case .formatUnknown(let path, let option):
            "disk \(quoted(path)): its file name does not determine the format; specify \(syntax.format("raw", option: option)), "
                + "\(syntax.format("qcow2", option: option)) …"
        case .formatUnsupported(let path, let name):
            "disk \(quoted(path)): the format \(quoted(name)) is not supported; \(ImageFormat.names) are"
        case .notAFile(let path):
            "disk \(quoted(path)): neither a regular file nor a block device"
        case .notQCOW2(let path, let found):
            "disk \(quoted(path)): not a qcow2 image: starts with \(quoted(bytes: found)), expected \"QFI\\xfb\"; if it is a raw image, specify \(syntax.format("raw", option: "--format"))"
        case .notOfFormat(let path, let format, let reason):
            "disk \(quoted(path)): not a \(format) image: \(reason)"
        case .extentName(let path, let name):
            "disk \(quoted(path)): its extent \(quoted(name)) is not the name of a file in or below the image's directory"
        case .extentNotAllowed(let path, let name):
            "disk \(quoted(path)): its extent is in the file \(quoted(name)), and external files are not allowed here"
        // It names the image itself.
        case .extent(_, .extentName(let path, let name)):
            Self.extentName(path: path, name: name).text(syntax)
        case .extent(let of, let error):
            "disk \(quoted(of)), extent: \(error.text(syntax))"
        case .truncated(let path, let what, let needed, let size):
            "disk \(quoted(path)): truncated: \(what) ends at byte \(needed), the file at \(size)"
                + (["the snapshot table", "the L1 table", "the refcount table"].contains(what)
                    ? "; swkvm image convert --salvage recovers the readable data, swkvm image check --repair all discards what is missing"
                    : "")
        case .invalid(let path, let reason):
            "disk \(quoted(path)): damaged or invalid: \(reason)"
        case .unsupported(let path, let feature):
            "disk \(quoted(path)): it needs \(feature), which is not supported; convert it to a plain image with qemu-img convert"
        case .needsParent(let path, let kind):
            "disk \(quoted(path)): it is \(kind) and depends on a parent image, which is not supported; "
                + "merge the two with the program that created them (qemu-img silently ignores the parent in some of these formats)"
        case .notWritable(let path, let reason):
            "disk \(quoted(path)): it cannot be opened for writing: \(reason)"
                + (syntax.readOnly.map { "; or \($0)" } ?? "")
        case .noSnapshot(let path, let name):
            "disk \(quoted(path)): it has no snapshot \(quoted(name)); swkvm image snapshot list shows those it has"
        case .snapshot(let path, let name, let reason):
            "disk \(quoted(path)), snapshot \(quoted(name)): \(reason)"
        case .countsTooNarrow(let path, let bits, let needed):
            "disk \(quoted(path)): a cluster needs a refcount of \(needed), but the image's refcounts have \(bits) bit\(bits == 1 ? "" : "s"); "
                + "convert it to an image with wider refcounts"
        case .notCheckable(let path):
            "disk \(quoted(path)): only the metadata of qcow2 images can be checked"
        case .resize(let path, let reason):
            "disk \(quoted(path)): it cannot be resized: \(reason)"
        case .locked(let path, forWriting: true):
            "disk \(quoted(path)): another process has it open for writing"
        case .locked(let path, forWriting: false):
            "disk \(quoted(path)): another process has it open and requires that its contents do not change; end that process"
                + (syntax.readOnly.map { " or \($0)" } ?? "")
        case .lockingUnavailable(let path, let error):
            "disk \(quoted(path)): its file system does not support locks (\(error))"
                + (syntax.unlocked.map { "; \($0) disables locking, at your own risk" } ?? "")
        case .directUnavailable(let path, let error) where error.errno == ENOENT:
            "disk \(quoted(path)): direct I/O needs /proc, which is not mounted; use \(syntax.writeback)"
        case .directUnavailable(let path, let error):
            "disk \(quoted(path)): its file system does not support direct I/O (\(error)); use \(syntax.writeback)"
        case .outside(let path):
            "disk \(quoted(path)): an image refers to it, but it is neither below that image's directory nor named on the command line; "
                + "\(syntax.backingDirectory) allows another directory, \(syntax.backingAnywhere) allows all"
        case .addressNotStated(let path):
            "disk \(quoted(path)): an image refers to this remote disk, but the command line does not name it; "
                + "\(syntax.backingAnywhere) allows it"
        case .formatContradicted(let path, let guess, let contents, let option):
            "disk \(quoted(path)): \(contradiction(path, guess, contents, option, syntax))"
        case .sameDisk(let path, let file, let other):
            "disk \(quoted(path)): \(quoted(file)) is also used by the disk \(quoted(other)) of the same machine, and one of them would write to it; "
                + "remove one, or add ,ro to both"
        case .backing(let of, .formatContradicted(let path, _, let contents, nil)):
            "disk \(quoted(of)), backing file: disk \(quoted(path)): its overlay does not record its format, and its contents look like \(contents.name)"
                + (contents.format == nil || NBDLocation.isAddress(path)
                    ? "" : "; \(statement(contents.format?.rawValue ?? "")) if that is correct")
                + "; \(statement("raw")) if a guest wrote this to its raw disk"
        case .backing(let of, let error):
            "disk \(quoted(of)), backing file: \(error.text(syntax))"
        case .backingNotAllowed(let path, let name):
            "disk \(quoted(path)): it has the backing file \(quoted(name)) and backing files are not allowed here"
        case .dataFileNotAllowed(let path, let name):
            "disk \(quoted(path)): its data is in the external file \(quoted(name)); specify \(syntax.dataFile) to use it"
        case .dataFileUnused(let path, let name):
            "disk \(quoted(path)): it has no external data file; omit \(quoted(name))"
        case .dataFile(let of, let error):
            "disk \(quoted(of)), data file: \(error.text(syntax))"
        case .backingName(let path, let name):
            "disk \(quoted(path)): its backing file \(quoted(name)) is neither the path of a local file nor an address (nbd:, nbd+unix:); "
                + "swkvm image rebase --unsafe --backing PATH gives it another name"
        case .backingLoop(let path):
            "disk \(quoted(path)): the chain of backing files contains a loop"
        case .backingTooDeep(let path):
            "disk \(quoted(path)): more than \(DiskImage.maximumChainLength) images are in its backing chain"
        case .transfer(let path, let offset, let length, let error):
            "disk \(quoted(path)): \(error) ("
                + (length.map { "\($0) bytes at byte \(offset) of the disk" }
                    ?? "at byte \(offset) of the \(NBDLocation.isAddress(path) ? "remote disk" : "file")")
                + ")"
        case .request(let path, let error):
            "disk \(quoted(path)): \(error)"
        case .remoteAddress(let path, let reason):
            "disk \(quoted(path)): not the address of a remote disk: \(printable(reason)); expected nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"
        case .remote(let path, let reason):
            "disk \(quoted(path)): \(printable(reason))"
        case .remoteUnchecked(let path):
            "disk \(quoted(path)): its first bytes could not be read, and no format was specified; "
                + "\(syntax.format("raw", option: "--format")) skips this check"
        case .remoteNotPossible(let path, let reason):
            "disk \(quoted(path)): \(reason)"
        case .remoteReadOnly(let path):
            "disk \(quoted(path)): the server exports it read-only; export it for writing (qemu-nbd without -r)"
        case .keyMissing(let path, let method):
            "disk \(quoted(path)): it is encrypted (\(method)) and no key was given: specify \(syntax.key)"
        case .wrongKey(let path):
            "disk \(quoted(path)): the key is wrong; every byte of a key file counts, including a trailing newline"
        case .keyUnused(let path, let encrypted, let keys):
            "disk \(quoted(path)): \(keys) key\(keys == 1 ? " was" : "s were") given, but of the image and its backing files "
                + (encrypted == 0 ? "none is encrypted" : "\(encrypted) \(encrypted == 1 ? "is" : "are") encrypted")
        case .vhdSizeUnused(let path, let size):
            "disk \(quoted(path)): the size \(size.rawValue) of a VHD was chosen, but neither the image nor a backing file is a VHD"
        case .key(.file(let path), let reason):
            "key file \(quoted(path)): \(reason)"
        case .key(.descriptor(let number), let reason):
            "key descriptor \(number): \(reason)"
        case .keyTooSlow(let path, let work, let limit):
            "disk \(quoted(path)): its header requires \(work) hash iterations to check a key, which exceeds the limit of \(limit)"
        case .exists(let path):
            "disk \(quoted(path)): it already exists; --force overwrites it"
        case .deviceInUse(let path):
            "disk \(quoted(path)): the host uses this device (it is mounted, or part of LVM, RAID or similar); release it first"
        case .linkToNothing(let path):
            "disk \(quoted(path)): it is a dangling symbolic link; remove the link, or name its target"
        case .sameFile(let path, let other):
            "disk \(quoted(path)): it is the same file as the source \(quoted(other)); name another file"
        case .impossible(let path, let reason):
            "disk \(quoted(path)): it cannot be created: \(reason)"
        case .notApplicable(let path, let reason):
            "disk \(quoted(path)): \(reason)"
        case .tooSmall(let path, let needed, let size):
            "disk \(quoted(path)): the disk has \(needed) bytes, but the target has only \(size); enlarge the target first"
        case .openingInterrupted(let path):
            "disk \(quoted(path)): interrupted while it was being opened"
        case .interrupted(let path):
            "disk \(quoted(path)): interrupted; nothing was created"
        case .interruptedUnchanged(let path):
            "disk \(quoted(path)): interrupted; its contents and its backing file are unchanged"
        case .interruptedInPlace(let path):
            "disk \(quoted(path)): interrupted; it is partly overwritten, the rest is unchanged"
        case .failedInPlace(let path, let error):
            "\(error.text(syntax)); the disk \(quoted(path)) may be partly overwritten, the rest is unchanged"
        }
    }
}

/// What is wrong with a format that is not stated, and how it is stated.
private func contradiction(
    _ path: String, _ guess: ImageFormat, _ contents: ImageSignature, _ option: String?, _ syntax: OptionSyntax
) -> String {
    func statement(_ format: ImageFormat) -> String {
        option.map { syntax.format(format.rawValue, option: $0) } ?? "--backing-format \(format.rawValue)"
    }
    let raw = "\(statement(.raw)) if a guest wrote this to its raw disk"
    if NBDLocation.isAddress(path) {
        return "the server exports data that looks like \(contents.name), and no format was specified: "
            + (contents.format == nil
                ? "" : "export it as that format (qemu-nbd -f \(contents.format?.rawValue ?? "")), or ")
            + "specify \(raw)"
    }
    let start = "its file name says \(guess.name), but its contents look like \(contents.name): specify "
    switch (contents.format, guess) {
    case (let format?, .raw): return start + "\(statement(format)) if that is correct, \(raw)"
    case (let format?, _): return start + statement(format)
    case (nil, _): return start + "\(raw); otherwise it is not supported"
    }
}

/// How an image comes to state its backing file's format.
private func statement(_ format: String) -> String {
    "swkvm image rebase --unsafe --backing-format \(format) --backing FILE states it"
}

/// Text that may come from an image, safe for a terminal: control characters and quotes are escaped, and what is longer
/// than names are is cut.
func quoted(_ text: String) -> String {
    let (text, rest) = text.utf8.count > 1024 ? (String(text.prefix(1024)), "…") : (text, "")
    return "\"" + text.printable.unicodeScalars.map { $0 == "\"" ? $0.escaped(asASCII: true) : String($0) }.joined()
        + rest + "\""
}

/// Words that a server may have chosen, likewise.
private func printable(_ text: String) -> String { text.printable }

private func quoted(bytes: [UInt8]) -> String {
    let digits = Array("0123456789abcdef")
    let text = bytes.map { byte in
        (0x20..<0x7f).contains(byte) && byte != 0x22 && byte != 0x5c
            ? String(UnicodeScalar(byte)) : "\\x\(digits[Int(byte >> 4)])\(digits[Int(byte & 15)])"
    }
    return bytes.isEmpty ? "nothing (an empty file)" : "\"\(text.joined())\""
}
