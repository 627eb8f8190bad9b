// SPDX-License-Identifier: Apache-2.0

internal import Inventory
internal import Machine

/// `--firmware FILE`.
struct FirmwareArgument {
    let path: String

    init(parsing argument: String) throws {
        var list = OptionList(argument)
        path = list.takeFirst()
        guard !path.isEmpty else { throw ArgumentProblem("firmware requires a file") }
        for (key, value) in try list.unique() {
            throw ArgumentProblem(
                "'\(key)\(value.map { "=" + $0 } ?? "")' is not recognized; a comma in a path is written twice")
        }
    }
}
