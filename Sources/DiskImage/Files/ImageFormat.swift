// SPDX-License-Identifier: Apache-2.0

/// The format of a disk image.
public enum ImageFormat: String, Sendable, CaseIterable {
    /// The disk's bytes as they are: a file (holes are kept) or a block device.
    case raw
    /// QEMU's copy-on-write format, versions 2 and 3.
    case qcow2
    /// VMware's: sparse, compressed ("streamOptimized") and flat, in one file or several.
    case vmdk
    /// VirtualBox's.
    case vdi
    /// Virtual PC's and the older one of Hyper-V, fixed and dynamic; QEMU calls it vpc.
    case vhd = "vpc"
    /// Hyper-V's.
    case vhdx

    /// The usual name of the format.
    public var name: String {
        switch self {
        case .raw, .qcow2: rawValue
        case .vhd: "VHD"
        case .vmdk, .vdi, .vhdx: rawValue.uppercased()
        }
    }

    /// The words that state a format.
    public static var names: String { allCases.map(\.rawValue).joined(separator: ", ") }

    /// Indicates whether an image can be changed, and not only read.
    public var isWritable: Bool { self != .vhd && self != .vhdx }

    /// Indicates whether new images are made of it.
    public var isMakeable: Bool { self != .vhd && self != .vhdx }

    /// The words that state a format of which images are made.
    public static var makeableNames: String { allCases.filter(\.isMakeable).map(\.rawValue).joined(separator: ", ") }

    /// Refuses to make an image of a format that is only used as it is found.
    func requireMakeable(_ path: String) throws(DiskImageError) {
        if !isMakeable {
            throw .impossible(path: path, reason: "\(name) images cannot be created; \(Self.makeableNames) can")
        }
    }

    /// The format that a file's name stands for, by its extension alone: what a file contains is the guest's doing
    /// once it was a guest's disk, so it is never asked for that. It can contradict (``FormatChoice``).
    public init(extensionOf path: String) throws(DiskImageError) {
        // What a remote disk holds is a disk, whatever its export is called.
        if NBDLocation.isAddress(path) {
            self = .raw
            return
        }
        // As bytes: to Unicode a slash or a point can be one character with what follows.
        let name = path.utf8.split(separator: UInt8(ascii: "/")).last ?? Substring().utf8
        let ending = name.lastIndex(of: UInt8(ascii: ".")).map { name[name.index(after: $0)...] } ?? name.prefix(0)
        switch Substring(ending).lowercased() {
        case "raw", "img": self = .raw
        case "qcow2", "qcow": self = .qcow2
        case "vmdk": self = .vmdk
        case "vdi": self = .vdi
        case "vhd", "vpc": self = .vhd
        case "vhdx": self = .vhdx
        default: throw .formatUnknown(path: path)
        }
    }

    /// The format that is stated, or else the one of the file's extension.
    /// - Parameter option: of `swkvm image`, which would state it.
    public init(_ stated: ImageFormat?, orExtensionOf path: String, option: String = "--format") throws(DiskImageError)
    {
        if let stated {
            self = stated
        } else {
            do throws(DiskImageError) { try self.init(extensionOf: path) } catch {
                throw .formatUnknown(path: path, option: option)
            }
        }
    }
}

/// The use of the host's page cache.
public enum CacheMode: String, Sendable, CaseIterable {
    /// I/O through the page cache; a FLUSH of the guest makes it durable (`fdatasync`).
    case writeback
    /// Around the page cache (`O_DIRECT`). Requests that are not aligned to what the file wants go through it after
    /// all.
    case none
}

/// The options for opening a disk image.
public struct DiskImageOptions: Sendable {
    /// nil: from the file's name.
    public var format: ImageFormat?
    /// The option of `swkvm image` that would state it, for messages.
    public var formatOption = "--format"
    public var readOnly: Bool
    public var cache: CacheMode
    /// Exclude other processes that would write (or, when we write, read) the image.
    public var locking: Bool
    /// Follow the names of backing files and extents that images carry, as far as ``namedFiles`` goes.
    public var allowsBacking: Bool
    /// The locations allowed for files that images refer to.
    public var namedFiles: NamedFiles
    /// Reads as a tool that wants each byte once: what is in the page cache already is taken from there, and all else
    /// goes around it where the file system can, so that what others have there stays.
    var sparesCache = false
    /// Indicates whether backing files are opened at all: a tool that looks at one image, or gives it another, does
    /// without.
    var followsBacking = true
    /// Read what is left of a damaged image: what its file ends before is met as damage, where it is met.
    var salvages = false
    /// The most bytes of L2 tables kept in memory, for each qcow2 image of the chain. No more is taken than the disk
    /// needs.
    public var metadataCacheSize: Int
    /// The id or name of a qcow2 image's internal snapshot to open in place of the current state, which only a reader
    /// can.
    public var snapshot: String?
    /// The file that has the data of a qcow2 image which keeps it outside; nil for the one that the image names.
    public var dataFile: String?
    /// Seconds for which requests wait for a remote disk's connection that was lost; nil for what its address says, or
    /// 10.
    public var reconnect: Int?
    public static let possibleReconnect = NBDLocation.possibleReconnect
    /// Hears, in a sentence, what happens to a remote disk's connection and what has become of the image; on any
    /// thread.
    public var report: (@Sendable (String) -> Void)?
    /// Polled several times a second while opening waits (for a server, a key that is typed, a lease's holder) or
    /// computes a key: whether to cancel, by ``DiskImageError/openingInterrupted(path:)``.
    public var isInterrupted: @Sendable () -> Bool = { false }
    /// The size of all VHDs of the chain; nil chooses by the program that created the file.
    public var vhdSize: VHDSize?
    /// What states it on the command line, up to the value, for messages.
    public var vhdSizeOption = "vhd-size="
    /// Receives a message about a decision at opening that may not be what the user expects.
    public var notice: (@Sendable (String) -> Void)?
    /// Follow the names of data files that images carry, as backing files, and write to them. A file that ``dataFile``
    /// names is always taken.
    public var allowsDataFile: Bool
    /// The keys of those images of the chain that are encrypted, the topmost first. The last one is also for all that
    /// follow.
    public var keys: [DiskKey] = []
    /// Indicates whether a key, or a VHD's size, for which there is no image is an error.
    var usesAll = true
    /// Indicates whether data is to be read or written. Without, encrypted images need no key.
    public var opensData = true
    /// The maximum number of hash computations to check a key: an image of unknown origin could require years.
    public var maximumKeyWork = defaultMaximumKeyWork

    /// About half a minute.
    public static let defaultMaximumKeyWork: UInt64 = 1 << 28

    public init(
        format: ImageFormat? = nil, readOnly: Bool = false, cache: CacheMode = .writeback, locking: Bool = true,
        allowsBacking: Bool = true, metadataCacheSize: Int = 32 << 20, snapshot: String? = nil,
        dataFile: String? = nil, allowsDataFile: Bool = false, namedFiles: NamedFiles = NamedFiles()
    ) {
        self.format = format
        self.readOnly = readOnly
        self.cache = cache
        self.locking = locking
        self.allowsBacking = allowsBacking
        self.metadataCacheSize = metadataCacheSize
        self.snapshot = snapshot
        self.dataFile = dataFile
        self.allowsDataFile = allowsDataFile
        self.namedFiles = namedFiles
    }
}
