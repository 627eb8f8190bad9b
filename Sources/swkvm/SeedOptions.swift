// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import CloudInit
internal import Machine

/// What the guest's cloud-init is to do, which it reads from a seed disk.
struct SeedOptions: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            """
            File with SSH public keys for the default user of the guest's image, as in authorized_keys. Repeatable. This option and the next \
            six add a read-only disk that cloud-init in the guest reads at its first boot.
            """,
            valueName: "file"),
        completion: .file())
    var sshKey: [String] = []

    @Option(
        help: ArgumentHelp("Name for the default user of the guest's image.", valueName: "name"),
        transform: Self.userName)
    var user: String?

    @Option(
        help: ArgumentHelp(
            "File with the password of the default user, or its hash (crypt(5)). The guest gets the hash.",
            valueName: "file"),
        completion: .file())
    var passwordFile: String?

    @Option(
        help: ArgumentHelp("Host name of the guest. Default: --name, if given.", valueName: "name"),
        transform: Self.hostName)
    var hostname: String?

    @Option(
        help: ArgumentHelp(
            "User-data for cloud-init, of any kind. It takes precedence over --user and --password-file.",
            valueName: "file"), completion: .file())
    var userData: String?

    @Option(
        help: ArgumentHelp(
            "Meta-data for cloud-init, which includes what --hostname and --ssh-key give.", valueName: "file"),
        completion: .file())
    var metaData: String?

    @Option(
        help: ArgumentHelp("Network configuration for cloud-init. Default: DHCP.", valueName: "file"),
        completion: .file())
    var networkConfig: String?

    @Sendable static func userName(_ text: String) throws -> String {
        guard Seed.isUserName(text) else {
            throw ArgumentProblem(
                "expected up to 32 lower-case letters, digits, '_' and '-', of which the first is a letter or '_'")
        }
        return text
    }

    @Sendable static func hostName(_ text: String) throws -> String {
        guard Seed.isHostName(text) else {
            throw ArgumentProblem(
                "expected a host name such as web1 or web1.example.org: letters, digits and hyphens between dots")
        }
        return text
    }

    /// The files that the options name.
    var files: [(option: String, path: String)] {
        [
            ("--password-file", passwordFile), ("--user-data", userData), ("--meta-data", metaData),
            ("--network-config", networkConfig),
        ].compactMap { option, path in path.map { (option, $0) } } + sshKey.map { ("--ssh-key", $0) }
    }

    func validate() throws {
        for (option, path) in files where path.isEmpty {
            throw ValidationError("the option \(option) requires a non-empty path")
        }
        if let metaData, hostname != nil || !sshKey.isEmpty {
            let (option, member) = hostname != nil ? ("hostname", "local-hostname") : ("ssh-key", "public-keys")
            throw ValidationError(
                "the options --meta-data and --\(option) cannot be combined: set \(member) in \(metaData)")
        }
    }

    private var options: Seed.Options {
        var options = Seed.Options()
        options.user = user
        options.hostName = hostname
        options.keyFiles = sshKey
        options.passwordFile = passwordFile
        options.userDataFile = userData
        options.metaDataFile = metaData
        options.networkConfigFile = networkConfig
        return options
    }

    /// Reads the files and makes the disk; nil without any of the options.
    /// - Parameters:
    ///   - machine: the rest of the machine, which has the identity of its guest.
    ///   - name: `--name`, if given.
    func seed(for machine: Configuration, name: String?) throws(SeedError) -> Seed? {
        let options = options
        guard !options.isEmpty else { return nil }
        let identity =
            machine.uuid ?? name.map(HostIdentity().uuid(ofMachine:))
            ?? HostIdentity().uuid(ofDisk: machine.disks.first?.path ?? "")
        return try Seed(options, instance: identity.description, defaultHostName: name)
    }
}
