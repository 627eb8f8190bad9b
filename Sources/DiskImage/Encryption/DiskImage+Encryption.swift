// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

extension Chain {
    /// The cipher of an image that is encrypted, with the next of the keys. Data is never written in a way that is
    /// known to be broken.
    mutating func openCipher(
        _ header: QCOW2Header, _ file: borrowing ImageFile, _ options: DiskImageOptions, writable: Bool
    ) throws(DiskImageError) -> SectorCipher? {
        guard let encryption = header.encryption else { return nil }
        let path = file.path
        let key = encryptedCount < options.keys.count ? options.keys[encryptedCount] : options.keys.last
        encryptedCount += 1
        switch encryption {
        case .aes:
            if writable {
                throw .notWritable(
                    path: path,
                    reason:
                        "its encryption (legacy AES) is supported read-only; convert it to LUKS with swkvm image convert --encrypt"
                )
            }
            guard options.opensData else { return nil }
            guard let key else { throw .keyMissing(path: path, method: "legacy AES") }
            return try SectorCipher(.legacy, key: key.legacyKey(path: path), path: path, numbering: .disk)
        case .luks(let offset, let length):
            let luks = try LUKSHeader(
                file.read("the LUKS header", count: LUKSHeader.size, at: offset), region: length, path: path)
            if writable, let weakness = luks.specification.weakness {
                throw .notWritable(
                    path: path, reason: "its encryption (aes-\(luks.cipherMode)) is supported read-only: \(weakness)")
            }
            guard options.opensData else { return nil }
            guard let key else { throw .keyMissing(path: path, method: "LUKS") }
            guard luks.work <= options.maximumKeyWork else {
                throw .keyTooSlow(path: path, work: luks.work, limit: options.maximumKeyWork)
            }
            let master = try key.unlock(luks, path: path) { (slot) throws(DiskImageError) in
                // Inside the header's region, and that is inside the file.
                try file.read("the LUKS key material", count: luks.materialSize, at: offset + slot.place)
            }
            return try SectorCipher(luks.specification, key: master, path: path)
        }
    }
}

extension DiskImageOptions {
    /// The keys for what is below an image, or a chain, that was opened by itself.
    func keys(below image: DiskImage) -> [DiskKey] {
        let rest = keys.dropFirst(image.encryptedCount)
        return rest.isEmpty ? Array(keys.suffix(1)) : Array(rest)
    }
}

/// The data of a file, by the file's number, is decrypted and encrypted here. Ranges are whole sectors; `place` is
/// where they lie in the file, `offset` where on the disk.
extension DiskImage {
    /// How many images of the chain are encrypted.
    var encryptedCount: Int {
        var count = 0
        for index in layers.indices where isEncrypted(index) { count += 1 }
        return count
    }

    func isEncrypted(_ file: Int) -> Bool {
        if layers[file].isSealed { return true }
        return hasCipher(file)
    }

    private func hasCipher(_ file: Int) -> Bool {
        switch layers[file].cipher {
        case .some: true
        case nil: false
        }
    }

    /// The first image whose data cannot be used, as there is no key.
    var sealedFile: Int? { layers.indices.first { layers[$0].isSealed } }

    /// Refuses to use the data of an image without its key.
    func requireOpenData() throws(DiskImageError) {
        if let file = sealedFile { throw .keyMissing(path: layers[file].file.path, method: "its data is to be read") }
    }

    func decrypt(_ bytes: IOMemory, into target: IOMemory, file: Int, place: UInt64, offset: UInt64) {
        layers[file].cipher?.decrypt(bytes, into: target, place: place, offset: offset)
    }

    /// Fills whole sectors with what zeroes become at a place of the topmost image's data.
    func encryptZeroes(_ bytes: inout [UInt8], place: UInt64) {
        layers[0].cipher?.encryptZeroes(&bytes, place: place)
    }

    func encrypt(_ bytes: IOMemory, file: Int, place: UInt64, offset: UInt64) {
        layers[file].cipher?.encrypt(bytes, place: place, offset: offset)
    }
}
