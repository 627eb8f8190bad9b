// SPDX-License-Identifier: Apache-2.0

/// What qemu-img (7.2 to 10) has, verb by verb. Options that are not in here go to the parser as they are.
extension QEMUWords {
    /// Verbs that are not there, and what to use.
    static let verbs = [
        "measure":
            "swkvm image map --json shows the allocated ranges, and convert skips zeroes; qemu-img measure reads the same files",
        "amend": "swkvm image convert recreates the image with another layout; qemu-img amend changes key slots",
        "bitmap": "qemu-img bitmap manages an image's bitmaps",
    ]

    static let options: [String: [Option]] = [
        "create": common + [
            .value("-f"), .value("-b"), .value("-F"), .flag("-u"), .flag("-q"), .value("-O"), .value("-o", .layout),
        ],
        "info": common + [.value("-f"), .flag("-U")],
        "map": common + [.value("-f"), .flag("-U"), .value("-s"), .value("-l")],
        "check": common + [.value("-f"), .value("-r"), .flag("-q"), .flag("-U"), .value("-T", .anyCache)],
        "compare": common + [
            .value("-f"), .value("-F"), .flag("-s"), .flag("-p"), .flag("-q"), .flag("-U"), .value("-T", .anyCache),
        ],
        "convert": common + [
            .value("-f"), .value("-O"), .value("-l", .snapshot), .value("-B"), .value("-F"), .value("-m"), .flag("-c"),
            .flag("-p"), .flag("-q"), .flag("-n"), .flag("-U"),
            .value("-o", .layout), .value("-t", .cache), .value("-T", .cache), .value("-S", .sparseness),
            .flag("-W", .noEffect), .flag("-C", .noEffect),
            .flag("--target-is-zero", .noEffect), .value("-r", .refused(rate)), .value("--rate-limit", .refused(rate)),
            .value("-s", .refused("-l NAME names the snapshot to read")),
            .flag("--bitmaps", .refused(bitmaps)), .flag("--skip-broken-bitmaps", .refused(bitmaps)),
            .flag(
                "--target-image-opts",
                .refused("name the target and specify --target-format; --encrypt and --target-key-file encrypt it")),
            .flag("-e", .refused("--encrypt and --target-key-file encrypt the target")),
            .flag("-6", .refused("VMDK version 6 cannot be created")),
        ],
        "commit": common + [
            .value("-f"), .flag("-d"), .flag("-p"), .flag("-q"), .value("-t", .anyCache),
            .value(
                "-b",
                .refused("commit writes to the image's own backing file: commit one image of the chain after the other")
            ), .value("-r", .refused(rate)),
        ],
        "rebase": common + [
            .value("-f"), .value("-b"), .value("-F"), .flag("-u"), .flag("-p"), .flag("-q"),
            .value("-B", .renamed("-b")), .value("-t", .anyCache), .value("-T", .anyCache),
            .flag(
                "-c",
                .refused("it does not compress; swkvm image convert --compress creates a compressed image")),
            .flag("-U", .refused("changing an image requires exclusive access")),
        ],
        "resize": common + [.value("-f"), .flag("-q")],
        "snapshot": common + [.value("-c"), .value("-a"), .value("-d"), .flag("-l"), .flag("-q"), .flag("-U")],
        "bench": common + [
            .value("-f"), .value("-c"), .value("-d"), .value("-s"), .value("-S"), .value("-o"), .value("-t"),
            .flag("-w"), .flag("-r"), .flag("-U"),
            // io_uring is what is used anyhow, and drained at the end.
            .flag("-n", .noEffect), .value("-i", .noEffect), .flag("--no-drain", .noEffect), .flag("-q", .noEffect),
        ],
    ]

    static let ddOptions: [Option] = common + [.value("-f"), .value("-O"), .flag("-U"), .flag("-n")]

    private static let common: [Option] = [
        .value("--object", .refused("a key is given by --key-file FILE or --key-fd N")),
        .flag(
            "--image-opts", .refused("name the file and use --format, --key-file and --data-file")),
    ]

    private static let rate = "there is no rate limit; use systemd-run -p IOWriteBandwidthMax="
    private static let bitmaps = "bitmaps are not copied; use qemu-img convert --bitmaps"

    /// The words of `-o`, of all formats.
    static let layoutWords: [String: Treatment] = [
        "cluster_size": .same, "refcount_bits": .same, "compat": .same, "lazy_refcounts": .same, "extended_l2": .same,
        "compression_type": .same,
        "subformat": .same, "preallocation": .same,
        "backing_file": .renamed("--backing"), "backing_fmt": .renamed("--backing-format"), "size": .renamed("--size"),
        "data_file": .renamed("--data-file"), "data_file_raw": .renamed("--data-file-raw"),
        "static": .renamed("--subformat"),
        "encryption": .renamed("--encrypt"), "encrypt.format": .renamed("--encrypt"),
        "encrypt.iter-time": .renamed("--iter-time"),
        "encrypt.key-secret": .refused(
            "the key is given by --key-file FILE or --key-fd N, for convert by --target-key-file or --target-key-fd"),
        "encrypt.cipher-alg": .refused(cipher), "encrypt.cipher-mode": .refused(cipher),
        "encrypt.ivgen-alg": .refused(cipher),
        "encrypt.ivgen-hash-alg": .refused(cipher), "encrypt.hash-alg": .refused(cipher),
        "nocow": .refused("chattr +C on the directory does that for all files created in it"),
        "extent_size_hint": .refused("xfs_io -c 'extsize 1m' on the directory does that for all files created in it"),
        "adapter_type": .refused(vmdk), "hwversion": .refused(vmdk), "toolsversion": .refused(vmdk),
        "compat6": .refused(vmdk), "zeroed_grain": .refused(vmdk),
        "block_size": .refused(hyperV), "block_state_zero": .refused(hyperV), "log_size": .refused(hyperV),
        "force_size": .refused(hyperV),
    ]

    private static let cipher = "images are encrypted by LUKS with AES-256-XTS and PBKDF2 with SHA-256"
    private static let vmdk = "VMDK images are created for an IDE disk and hardware version 4"
    private static let hyperV = "VHD and VHDX are supported read-only"
}
