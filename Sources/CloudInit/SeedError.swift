// SPDX-License-Identifier: Apache-2.0

public import Linux

/// Why no seed could be made: a file that an option names is not what it should be.
public enum SeedError: Error, Equatable, CustomStringConvertible {
    case file(option: String, path: String, SystemCallError)
    case tooLarge(option: String, path: String, limit: Int)
    /// The private half of a key; the path of the public one, if there is a file where it usually is.
    case privateKey(path: String, publicKey: String?)
    case key(path: String, line: Int, reason: String)
    case noKeys(path: String)
    /// More than fit into meta-data.
    case tooManyKeys(Int)
    case password(path: String, reason: String)

    public var description: String {
        switch self {
        case .file(let option, let path, let error):
            "the file of --\(option), \(path), cannot be read: \(error.reason) (\(error.call))"
        case .tooLarge(let option, let path, let limit):
            "the file of --\(option), \(path), has more than \(limit) bytes, which is the limit"
        case .privateKey(let path, let publicKey?):
            "\(path) is a private key, which no guest may see: specify the public one, --ssh-key \(publicKey)"
        case .privateKey(let path, nil):
            "\(path) is a private key, which no guest may see: specify the public one (`ssh-keygen -y -f \(path)` prints it)"
        case .key(let path, let line, let reason): "\(path), line \(line), is not a public key of OpenSSH: \(reason)"
        case .noKeys(let path):
            "\(path) contains no public key: expected lines such as 'ssh-ed25519 AAAA… name', as in an authorized_keys file"
        case .tooManyKeys(let count):
            "the \(count) keys of all --ssh-key together have more than a mebibyte, which is the limit"
        case .password(let path, let reason): "the password in \(path) cannot be used: \(reason)"
        }
    }
}
