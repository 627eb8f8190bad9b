// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The rule for files that an image refers to: backing files, the extents of a VMDK, the data files of backing files.
///
/// An image of unknown origin can name any file of the host. What it names has to be below the directory that the image
/// itself is in, whatever `..` and symbolic links say, or be the user's own word; more has to be allowed.
public struct NamedFiles: Sendable, Equatable {
    /// Indicates whether they may be anywhere, and on remote disks.
    public var isAnywhere = false
    /// Directories below which they may be, too.
    public var directories: [String] = []
    /// Paths, and addresses of remote disks, that the user has named: the files behind them are taken by whatever name
    /// an image has for them.
    public var stated: [String] = []

    public init(isAnywhere: Bool = false, directories: [String] = [], stated: [String] = []) {
        self.isAnywhere = isAnywhere
        self.directories = directories
        self.stated = stated
    }

    /// Refuses a path that is not a directory, even if no image refers to a file below it.
    public func checkDirectories() throws(DiskImageError) {
        for directory in directories {
            do throws(SystemCallError) { _ = try FileDescriptor.open(directory, CLINUX_O_PATH | O_DIRECTORY) } catch {
                throw .system(path: directory, error)
            }
        }
    }

    /// Files anywhere.
    public static let anywhere = NamedFiles(isAnywhere: true)
}

/// An image that names another file.
struct NamingImage: Sendable, Equatable {
    let path: String
    /// An image on a block device has no directory of its own: all devices share `/dev`.
    let hasDirectory: Bool

    init(_ file: borrowing ImageFile) {
        path = file.path
        hasDirectory = file.isRegular
    }
}

extension NamedFiles {
    /// Opens a file that an image names.
    /// - Parameter access: `O_RDONLY` or `O_RDWR`.
    func open(
        _ path: String, _ access: Int32, of image: NamingImage, isInterrupted: () -> Bool = { false }
    ) throws(DiskImageError) -> FileDescriptor {
        if isAnywhere { return try openFile(path, access, isInterrupted: isInterrupted) }
        // Before it is opened: to open a device can do something.
        if let identity = ImageFile.Identity(ofPath: path),
            stated.contains(where: { ImageFile.Identity(ofPath: $0) == identity })
        {
            let file = try openFile(path, access, isInterrupted: isInterrupted)
            do throws(SystemCallError) {
                if ImageFile.Identity(try file.status()) == identity { return file }
            } catch { throw .system(path: path, error) }
        }
        for directory in try self.directories(of: image) {
            if let file = try openFile(path, access, below: directory, isInterrupted: isInterrupted) { return file }
        }
        throw .outside(path: path)
    }

    /// Indicates whether an image may name a remote disk.
    func allow(address: String) -> Bool {
        if isAnywhere { return true }
        guard let wanted = place(address) else { return false }
        return stated.contains { NBDLocation.isAddress($0) && place($0) == wanted }
    }

    /// How long requests wait for it does not make it another.
    private func place(_ address: String) -> NBDLocation? {
        var place = try? NBDLocation(address)
        place?.reconnect = nil
        return place
    }

    /// Without symbolic links: where the image's name is, where the image itself is, and those that are allowed. Not
    /// `/`, unless it is allowed: below it is everything.
    private func directories(of image: NamingImage) throws(DiskImageError) -> [String] {
        var found: [String] = []
        if image.hasDirectory {
            if let directory = resolved(DiskImage.directory(of: image.path)) { found.append(directory) }
            if let file = resolved(image.path) { found.append(DiskImage.directory(of: file)) }
            found.removeAll { $0 == "/" }
        }
        for directory in directories {
            guard let place = resolved(directory) else { throw .system(path: directory, .last("realpath")) }
            found.append(place)
        }
        return found
    }
}

extension DiskImage {
    /// Indicates whether two paths lead to one file, or would if it were there.
    public static func areSameFile(_ first: String, _ second: String) -> Bool {
        guard let place = FilePlace(first) else { return false }
        return place == FilePlace(second)
    }
}

/// Where a name is, whether or not there is a file.
enum FilePlace: Equatable {
    case file(ImageFile.Identity)
    case name([UInt8], directory: ImageFile.Identity)

    /// nil for an address, and for a directory that is not there.
    init?(_ path: String) {
        guard !NBDLocation.isAddress(path) else { return nil }
        if let identity = ImageFile.Identity(ofPath: path) {
            self = .file(identity)
        } else if let directory = ImageFile.Identity(ofPath: DiskImage.directory(of: path)) {
            self = .name(DiskImage.name(of: path), directory: directory)
        } else {
            return nil
        }
    }

    /// The first file of a chain that is at one of some places, by the names that the images have: for a chain that is
    /// not opened, and of which not all need be there.
    /// - Parameters:
    ///   - path: of the topmost file.
    ///   - namedFiles: what is followed; where a name may not be followed, it never will be.
    static func search(
        _ places: [FilePlace], from path: String, _ choice: FormatChoice, _ namedFiles: NamedFiles
    ) -> String? {
        var path = path, choice = choice
        var namer: NamingImage?
        for _ in 0..<DiskImage.maximumChainLength {
            guard let place = FilePlace(path) else { return nil }
            if places.contains(place) { return path }
            guard choice.format == .qcow2,
                let file = try? ImageFile(
                    path: path, of: namer, writable: false, DiskImageOptions(locking: false, namedFiles: namedFiles)),
                let header = try? QCOW2Header(file), let name = header.backingName,
                let next = try? backingPath(name, of: path),
                let format = try? FormatChoice(backing: header.backingFormat, next)
            else { return nil }
            namer = NamingImage(file)
            (path, choice) = (next, format)
        }
        return nil
    }
}
