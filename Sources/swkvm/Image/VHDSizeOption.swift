// SPDX-License-Identifier: Apache-2.0

public import ArgumentParser
public import DiskImage

extension VHDSize: ExpressibleByArgument {}

/// Which of the two sizes of a VHD counts, for the verbs that open one.
struct VHDSizeOption: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "VHD: take the disk size from the geometry (chs) or from the size field (current). Default: depends on the program that created the image.",
            valueName: "which"))
    var vhdSize: VHDSize?

    /// Makes an image open with this size, and reports the choice to the user if there was one.
    func apply(to options: inout DiskImageOptions) {
        options.vhdSize = vhdSize
        options.vhdSizeOption = "--vhd-size "
        options.notice = { StandardError().say($0) }
    }
}
