// SPDX-License-Identifier: Apache-2.0

public import ArgumentParser
public import DiskImage

extension VHDSize: ExpressibleByArgument {}

/// Which of the two sizes of a VHD counts, for the verbs that open one.
struct VHDSizeOption: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "VHD: the disk's size is that of its geometry (chs) or its number of bytes (current). Default: what its maker goes by.",
            valueName: "which"))
    var vhdSize: VHDSize?

    /// Has an image opened so, and the user told if there was a choice.
    func apply(to options: inout DiskImageOptions) {
        options.vhdSize = vhdSize
        options.notice = { StandardError().say($0) }
    }
}
