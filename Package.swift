// swift-tools-version: 6.2
// SPDX-License-Identifier: Apache-2.0

import PackageDescription

/// Swift 6 mode with every unsafe operation marked, and no warning let through.
let strict: [SwiftSetting] = [
    .strictMemorySafety(),
    .treatAllWarnings(as: .error),
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("InternalImportsByDefault"),
    .enableUpcomingFeature("MemberImportVisibility"),
    .enableExperimentalFeature("Lifetimes"),
]

func module(_ name: String, _ dependencies: [Target.Dependency] = []) -> Target {
    .target(name: name, dependencies: dependencies, swiftSettings: strict)
}

func tests(_ name: String, _ dependencies: [Target.Dependency]) -> Target {
    .testTarget(name: name, dependencies: dependencies, swiftSettings: [.treatAllWarnings(as: .error)])
}

let package = Package(
    name: "swkvm",
    products: [
        .executable(name: "swkvm", targets: ["swkvm"])
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.0"),
        .package(url: "https://github.com/apple/swift-log", from: "1.16.0"),
        .package(url: "https://github.com/apple/swift-nio", from: "2.90.0"),
    ],
    targets: [
        // Arrows go one way: CLinux ← Linux ← {KVM, GuestMemory, DiskImage, HostNetwork, PCI}; {GuestMemory, PCI} ←
        // Virtio; DiskImage ← FileSystems; Platform ← {GuestMemory, Boot, Devices, Machine}; {Virtio, DiskImage,
        // HostNetwork} ← Devices; GuestMemory ← Boot; everything, GDBRemote and Sandbox ← Machine ← swkvm; Linux ←
        // {CloudInit, Inventory} ← swkvm; Inventory ← DomainXML ← swkvm.
        .systemLibrary(name: "CUring", pkgConfig: "liburing", providers: [.apt(["liburing-dev"])]),
        .systemLibrary(name: "CZlib", pkgConfig: "zlib", providers: [.apt(["zlib1g-dev"])]),
        .systemLibrary(name: "CZstd", pkgConfig: "libzstd", providers: [.apt(["libzstd-dev"])]),
        .systemLibrary(name: "CExpat", pkgConfig: "expat", providers: [.apt(["libexpat1-dev"])]),
        .target(name: "CNBD", linkerSettings: [.linkedLibrary("nbd")]),
        // The archive also where nothing else is static: the instructions for AES are in it, and not in the shared
        // library's interface.
        .target(name: "CCrypto", linkerSettings: [.linkedLibrary(":libcrypto.a")]),
        .target(name: "CLinux", dependencies: ["CUring"]),
        module("Linux", ["CLinux", "CUring"]),
        module("KVM", ["CLinux", "Linux"]),
        // Addresses, ports and interrupts: numbers alone.
        module("Platform"),
        module("GuestMemory", ["CLinux", "Linux", "Platform"]),
        module("DiskImage", ["CLinux", "Linux", "CZlib", "CZstd", "CNBD", "CCrypto"]),
        // Partitions, file systems and boot menus of images; opens nothing itself.
        module("FileSystems", ["CLinux", "Linux", "DiskImage"]),
        module("HostNetwork", ["CLinux", "Linux"]),
        // Configuration space, bridge and MSI-X; knows nothing of KVM.
        module("PCI", ["Linux"]),
        module("Virtio", ["CLinux", "Linux", "GuestMemory", "PCI"]),
        // What a guest reads over its network: HTTP, TCP and ARP in frames; opens nothing itself.
        module("Metadata", ["Linux"]),
        module(
            "Devices",
            ["CLinux", "Linux", "Platform", "GuestMemory", "Virtio", "DiskImage", "HostNetwork", "Metadata"]),
        module("Boot", ["CLinux", "Linux", "Platform", "GuestMemory", "CZlib"]),
        // A disk that tells a guest's cloud-init what to do; knows nothing of machines.
        module("CloudInit", ["CCrypto", "Linux"]),
        // What a debugger says and hears; knows nothing of KVM.
        module("GDBRemote"),
        // Definitions of machines, and which of them run; knows nothing of what a machine is.
        module("Inventory", ["CLinux", "Linux"]),
        // Machines as libvirt describes them, from and to definitions; opens nothing itself.
        module("DomainXML", ["CExpat", "Linux", "Inventory"]),
        // Requests for a machine's control by HTTP and JSON; knows nothing of machines.
        .systemLibrary(name: "CJansson", pkgConfig: "jansson", providers: [.apt(["libjansson-dev"])]),
        module(
            "ManagementAPI",
            [
                "CJansson", "Linux",
                .product(name: "NIOCore", package: "swift-nio"), .product(name: "NIOPosix", package: "swift-nio"),
                .product(name: "NIOHTTP1", package: "swift-nio"),
            ]),
        // System calls that a running machine may make; knows nothing of machines.
        .target(name: "CSandbox"),
        module("Sandbox", ["CSandbox"]),
        // The bundled guest's ELF, put into the binary by the assembler; `make guest` builds it first.
        .target(name: "BundledGuest", cSettings: [.headerSearchPath("../../guests/kernel/build")]),
        // The list of what a release is linked with; `.ci/components` writes it, and a build without it has none.
        .target(name: "CBuild", cSettings: [.headerSearchPath("../../build/generated")]),
        module(
            "Machine",
            [
                "CLinux", "CCrypto", "Linux", "Platform", "KVM", "GuestMemory", "DiskImage", "FileSystems",
                "HostNetwork", "PCI", "Virtio", "Devices", "Boot", "BundledGuest", "GDBRemote", "Sandbox", "Metadata",
                .product(name: "Logging", package: "swift-log"),
            ]),
        .executableTarget(
            name: "swkvm",
            dependencies: [
                "Machine", "Devices", "Virtio", "DiskImage", "GuestMemory", "HostNetwork", "KVM", "Linux", "CLinux",
                "CBuild", "CloudInit", "Sandbox", "FileSystems", "Inventory", "DomainXML",
                "Metadata", "ManagementAPI",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
                .product(name: "Logging", package: "swift-log"),
            ],
            swiftSettings: strict),

        // `make bench`: drivers in the bench's own process, and the runs of other programs beside them.
        .target(name: "CBench", path: "Tests/Bench/C"),
        .executableTarget(
            name: "swkvm-bench",
            dependencies: [
                "CBench", "CLinux", "Linux", "GuestMemory", "DiskImage", "HostNetwork", "Virtio", "Devices",
            ],
            path: "Tests/Bench/Sources",
            swiftSettings: [.treatAllWarnings(as: .error)]),

        // `make fuzz`: readers of untrusted bytes, given to libFuzzer; and by `swift test` to a mutator with a seed.
        .target(
            name: "FuzzTargets",
            dependencies: [
                "TestSupport", "Boot", "Devices", "GuestMemory", "DiskImage", "FileSystems", "PCI", "Virtio",
                "HostNetwork", "GDBRemote", "DomainXML", "Metadata",
                "Linux", "CLinux", "CZlib",
            ],
            path: "Tests/Fuzz/Targets",
            swiftSettings: [.treatAllWarnings(as: .error)]),
        // Bounds an input's CPU time.
        .target(name: "CFuzzLimit", path: "Tests/Fuzz/Limit"),
        .executableTarget(
            name: "swkvm-fuzz", dependencies: ["FuzzTargets", "CFuzzLimit"], path: "Tests/Fuzz/Driver",
            swiftSettings: [.treatAllWarnings(as: .error)]),
        .testTarget(
            name: "FuzzTests", dependencies: ["TestSupport", "FuzzTargets"], path: "Tests/Fuzz/Tests",
            swiftSettings: [.treatAllWarnings(as: .error)]),

        // What `make release` compiles as FoundationEssentials, under another name for its tests.
        .target(name: "Essentials", path: "Sources/FoundationEssentials", swiftSettings: strict),

        // `make man`: manual pages from the command line's own description.
        .executableTarget(name: "swkvm-manual", path: "Sources/ManualPages", swiftSettings: strict),

        // What several of the tests need.
        .target(
            name: "TestSupport", dependencies: ["CLinux", "Linux", "GuestMemory", "HostNetwork", "PCI"],
            path: "Tests/Support", swiftSettings: strict),
        // Counts the calls to malloc of each thread of the test process.
        .target(name: "CAllocationCounter", path: "Tests/AllocationCounter"),
        // Has the host refuse a system call to a thread of the test process.
        .target(name: "CSystemCallFilter", path: "Tests/SystemCallFilter"),
        tests("LinuxTests", ["TestSupport", "Linux", "CLinux", "CSystemCallFilter"]),
        tests("MetadataTests", ["TestSupport", "Metadata"]),
        tests("KVMTests", ["TestSupport", "KVM", "Linux", "CLinux"]),
        tests("GuestMemoryTests", ["TestSupport", "GuestMemory", "Linux", "CLinux"]),
        tests("DiskImageTests", ["TestSupport", "DiskImage", "Linux", "CLinux", "CCrypto", "CAllocationCounter"]),
        tests("FileSystemsTests", ["TestSupport", "FileSystems", "DiskImage", "Linux", "CLinux"]),
        tests("HostNetworkTests", ["TestSupport", "HostNetwork", "Linux", "CLinux"]),
        tests(
            "VirtioTests",
            ["TestSupport", "Virtio", "GuestMemory", "PCI", "Linux", "CAllocationCounter", "CSystemCallFilter"]),
        tests("PCITests", ["TestSupport", "PCI", "Linux"]),
        tests(
            "DevicesTests",
            [
                "TestSupport", "Devices", "Virtio", "GuestMemory", "DiskImage", "HostNetwork", "Linux", "Metadata",
                "CAllocationCounter",
                "CSystemCallFilter",
            ]),
        // What an attacker in the process would try.
        .target(name: "CSandboxTest", dependencies: ["CSandbox"], path: "Tests/SandboxAttempts"),
        tests("SandboxTests", ["TestSupport", "Sandbox", "CSandbox", "CSandboxTest"]),
        tests("PlatformTests", ["TestSupport", "Platform"]),
        tests("BootTests", ["TestSupport", "Boot", "GuestMemory", "Linux", "Platform", "FuzzTargets"]),
        tests("InventoryTests", ["TestSupport", "Inventory", "Linux"]),
        tests("CloudInitTests", ["TestSupport", "CloudInit", "Linux"]),
        tests("ManagementAPITests", ["TestSupport", "ManagementAPI", "Linux"]),
        tests("GDBRemoteTests", ["TestSupport", "GDBRemote"]),
        tests(
            "MachineTests",
            [
                "TestSupport", "Machine", "Boot", "Devices", "DiskImage", "GDBRemote", "GuestMemory", "HostNetwork",
                "KVM", "Linux",
                "PCI", "Platform", "Sandbox", "Virtio", "CLinux", "CSystemCallFilter",
            ]),
        tests(
            "CommandLineTests",
            [
                "TestSupport", "swkvm", "swkvm-manual", "Essentials", "DomainXML", "Inventory", "Machine", "DiskImage",
                "GuestMemory",
                "HostNetwork", "Linux",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ]),
        tests("IntegrationTests", ["TestSupport", "CLinux", "CloudInit", "Linux", "HostNetwork", "CSandboxTest"]),
    ]
)

// `SWKVM_TESTS="DiskImageTests DevicesTests"`: these, and what they need, are all there is to build.
if let chosen = Context.environment["SWKVM_TESTS"], !chosen.isEmpty {
    var needed: Set<String> = []
    func need(_ name: String) {
        guard needed.insert(name).inserted, let target = package.targets.first(where: { $0.name == name }) else {
            return
        }
        for case .byNameItem(let name, _) in target.dependencies { need(name) }
    }
    for name in chosen.split(separator: " ") { need(String(name)) }
    package.targets.removeAll { !needed.contains($0.name) }
    package.products.removeAll { !needed.contains($0.name) }
}
