// SPDX-License-Identifier: Apache-2.0

import CFuzzLimit
import FuzzTargets
import Glibc

#if LIBFUZZER
    /// The target that libFuzzer is to try, by its name in SWKVM_FUZZ_TARGET. `none` does nothing with an input: what
    /// the program takes then is libFuzzer's.
    private let chosen: FuzzTarget = {
        // libFuzzer's own limit (-timeout) is one of wall time, which a busy machine takes.
        fuzz_limit(10)
        let name = getenv("SWKVM_FUZZ_TARGET").map { String(cString: $0) } ?? ""
        if name == FuzzTarget.none.name { return .none }
        guard let target = FuzzTarget.all.first(where: { $0.name == name }) else {
            fatalError("SWKVM_FUZZ_TARGET=\(name) names no target")
        }
        return target
    }()

    /// What libFuzzer, which has the program's `main`, calls with each input.
    @_cdecl("LLVMFuzzerTestOneInput")
    public func testOneInput(_ data: UnsafePointer<UInt8>?, _ size: Int) -> CInt {
        let target = chosen
        fuzz_limit_begin()
        _ = target.run(Array(UnsafeBufferPointer(start: data, count: size)))
        fuzz_limit_end()
        return 0
    }
#else
    /// Without libFuzzer: writes the seeds, lists the targets, repeats what was found.
    @main struct Driver {
        static func main() {
            let arguments = CommandLine.arguments.dropFirst()
            switch (arguments.first, arguments.count) {
            case ("list", 1):
                for target in FuzzTarget.all { print(target.name) }
            case ("seeds", 2):
                for target in FuzzTarget.all {
                    let directory = "\(arguments[2])/\(target.name)"
                    mkdir(directory, 0o777)
                    for (index, seed) in target.seeds.enumerated() { write(seed, to: "\(directory)/seed-\(index)") }
                }
            case (let name?, 2):
                guard let target = FuzzTarget.all.first(where: { $0.name == name }) else { fallthrough }
                print(target.run(read(arguments[2])) ? "accepted" : "refused")
            default:
                print("usage: swkvm-fuzz list | seeds DIRECTORY | TARGET FILE")
                exit(64)
            }
        }

        private static func write(_ bytes: [UInt8], to path: String) {
            guard let file = fopen(path, "w"), fwrite(bytes, 1, bytes.count, file) == bytes.count, fclose(file) == 0
            else { fatalError("cannot write \(path)") }
        }

        private static func read(_ path: String) -> [UInt8] {
            guard let file = fopen(path, "r") else { fatalError("cannot read \(path)") }
            defer { fclose(file) }
            fseek(file, 0, SEEK_END)
            var bytes = [UInt8](repeating: 0, count: max(ftell(file), 0))
            rewind(file)
            guard fread(&bytes, 1, bytes.count, file) == bytes.count else { fatalError("cannot read \(path)") }
            return bytes
        }
    }
#endif
