// SPDX-License-Identifier: Apache-2.0

public import ArgumentParser
internal import DiskImage
internal import Linux

extension CheckReport.Repair: ExpressibleByArgument {}

/// `swkvm image check`.
struct ImageCheckCommand: ImageVerb {
    static let options = OptionSyntax.VerbOptions(canShare: true)
    static let configuration = CommandConfiguration(
        commandName: "check",
        abstract: "Check a qcow2 image for errors and leaked clusters, and repair them.",
        discussion: """
            Errors mean that data is damaged, or may be damaged by later writes; leaked clusters are allocated but unused space. Backing \
            files are not checked. --repair all clears entries that cannot be repaired: the affected parts of the disk then read as \
            zeroes. If the file was truncated, everything beyond its end is discarded, including snapshots and bitmaps. An \
            external data file is checked only if --data-file names it: clusters beyond its end are errors. --repair leaks works \
            even if the file system is full.

            EXIT STATUS
              0    no problem was found, or all were repaired
              1    the check failed
              2    errors remain
              3    leaked clusters remain, but no errors
              63   the format does not support checks
              64   the command line is wrong
            """)

    @Option(
        name: [.short, .long],
        help: ArgumentHelp("The image's format. Default: from the file extension.", valueName: "format"),
        completion: .list(["qcow2"]))
    var format: ImageFormat?

    @OptionGroup var data: DataFileOption

    @Option(
        name: [.customShort("r"), .long],
        help: ArgumentHelp("Free leaked clusters (leaks), or repair errors as well (all).", valueName: "what"))
    var repair: CheckReport.Repair?

    @OptionGroup var output: OutputOptions

    @Flag(
        name: [.customShort("U"), .long],
        help: "Check an image that a running machine may be writing; the result may be inconsistent.")
    var forceShare = false

    @Flag(name: [.short, .long], help: "Print nothing if no problem is found.")
    var quiet = false

    @Argument(help: "The image.", completion: .file())
    var file: String

    func validate() throws {
        guard !forceShare || repair == nil else {
            throw ValidationError(
                "The option --repair cannot be combined with -U: it requires exclusive access to the image.")
        }
    }

    func run() throws {
        let report: CheckReport
        do throws(DiskImageError) {
            let options = DiskImageOptions(format: format, locking: !forceShare, dataFile: data.dataFile)
            report = try DiskImage.check(path: file, options: options, repair: repair)
        } catch {
            var status = ImageTool.failure
            if case .notCheckable = error { status = 63 }
            throw failure(error, status: status)
        }
        let isFine = report.errors == 0 && report.leaks == 0
        if output.isJSON { print(json(report)) } else if !quiet || !isFine { print(text(report)) }
        if report.errors > 0 { throw ExitCode(2) }
        if report.leaks > 0 { throw ExitCode(3) }
    }

    private func json(_ report: CheckReport) -> JSON {
        .object([
            ("filename", .string(file)), ("format", "qcow2"), ("image-end-offset", .number(report.imageEnd)),
            ("total-clusters", .number(report.totalClusters)),
            ("allocated-clusters", .number(report.allocatedClusters)),
            ("fragmented-clusters", .number(report.fragmentedClusters)),
            ("compressed-clusters", .number(report.compressedClusters)),
            ("corruptions", .number(UInt64(report.errors))), ("leaks", .number(UInt64(report.leaks))),
            ("corruptions-fixed", .number(UInt64(report.errorsFixed))),
            ("leaks-fixed", .number(UInt64(report.leaksFixed))),
            ("check-errors", .number(0)),
        ])
    }

    private func text(_ report: CheckReport) -> String {
        var lines = report.findings.map { ($0.isLeak ? "Leak: " : "ERROR: ") + $0.description }
        let others = report.errors + report.leaks + report.errorsFixed + report.leaksFixed - report.findings.count
        if others > 0 { lines.append("… and \(others) more") }
        if report.errorsFixed + report.leaksFixed > 0 {
            lines.append("Repaired: \(report.errorsFixed) errors, \(report.leaksFixed) leaked clusters.")
        }
        switch (report.errors, report.leaks) {
        case (0, 0): lines.append("No errors were found on the image.")
        case (0, let leaks):
            lines.append("\(leaks) leaked clusters were found: they waste space, but no data is at risk.")
        case (let errors, let leaks):
            lines.append(
                "\(errors) errors\(leaks > 0 ? " and \(leaks) leaked clusters" : "") were found: data may be damaged, or later writes may damage it."
            )
        }
        if report.totalClusters > 0 {
            let share = { (part: UInt64, whole: UInt64) in percent(part, of: whole) }
            lines.append(
                "\(report.allocatedClusters)/\(report.totalClusters) = \(share(report.allocatedClusters, report.totalClusters)) allocated, "
                    + "\(share(report.fragmentedClusters, report.allocatedClusters)) fragmented, "
                    + "\(share(report.compressedClusters, report.allocatedClusters)) compressed clusters")
        }
        lines.append("Image end offset: \(report.imageEnd)")
        return lines.joined(separator: "\n")
    }

    /// `12.34%`.
    private func percent(_ part: UInt64, of whole: UInt64) -> String {
        guard whole > 0 else { return "0.00%" }
        let hundredths = UInt64(Double(part) / Double(whole) * 10000 + 0.5)
        let rest = hundredths % 100
        return "\(hundredths / 100).\(rest < 10 ? "0" : "")\(rest)%"
    }
}
