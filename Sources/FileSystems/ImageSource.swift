// SPDX-License-Identifier: Apache-2.0

public import DiskImage

/// A disk image of any format as a disk with partitions and file systems.
public struct ImageSource: BlockSource {
    private let contents: ImageContents

    public init(_ contents: ImageContents) { self.contents = contents }

    public var size: UInt64 { contents.size }

    public func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(FileSystemError) {
        do throws(DiskImageError) { unsafe try contents.read(at: offset, into: buffer) } catch {
            throw .unreadable(reason: error.description)
        }
    }
}
