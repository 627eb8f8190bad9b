// SPDX-License-Identifier: Apache-2.0

internal import Inventory
internal import Machine

/// `--vsock cid=CID,path=PATH`.
struct VsockArgument {
    static let completion = ValueCompletion.list(["cid=", "path=@file"])

    let vsock: Configuration.Vsock

    init(parsing argument: String) throws {
        var cid: UInt64?
        var path: String?
        for (key, value) in try OptionList(argument).unique() {
            switch (key, value) {
            case ("cid", let value?):
                guard value.utf8.allSatisfy({ (0x30...0x39).contains($0) }), let number = UInt64(value) else {
                    throw ArgumentProblem("cid=\(value) is not a number")
                }
                cid = number
            case ("path", let value?): path = value
            default:
                throw ArgumentProblem(
                    "'\(key)\(value.map { "=" + $0 } ?? "")' is not recognized; expected cid= and path=")
            }
        }
        guard let cid, let path else { throw ArgumentProblem("expected cid=CID,path=PATH") }
        do throws(Configuration.VsockProblem) { vsock = try Configuration.Vsock(cid: cid, path: path) } catch {
            throw ArgumentProblem(error.description)
        }
    }
}
