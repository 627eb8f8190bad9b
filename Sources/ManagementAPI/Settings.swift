// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// `/machine-config`. What a request leaves out is nil.
package struct MachineSettings: Sendable, Equatable {
    package enum HugePages: String, Sendable, CaseIterable {
        case none = "None"
        case twoMiB = "2M"
    }

    /// What is left out has its default value, and is not unchanged.
    package var isComplete: Bool
    package var cpus: UInt64?
    /// MiB.
    package var memory: UInt64?
    package var smt: Bool?
    package var tracksDirtyPages: Bool?
    package var hugePages: HugePages?
    /// The deprecated member `cpu_template` is there.
    package var hasTemplate = false

    private enum Template: String, CaseIterable {
        case c3 = "C3"
        case t2 = "T2"
        case t2s = "T2S"
        case t2cl = "T2CL"
        case t2a = "T2A"
        case v1n1 = "V1N1"
        case none = "None"
    }

    static let names = ["vcpu_count", "mem_size_mib", "smt", "cpu_template", "track_dirty_pages", "huge_pages"]

    init(_ value: JSON, isComplete: Bool) throws(Fault) {
        self.isComplete = isComplete
        if !isComplete, case .array(let items) = value, items.isEmpty { throw Fault("Empty PATCH request.") }
        let fields = try Fields(value, of: "MachineConfig", Self.names)
        if isComplete {
            cpus = try fields.requiredNumber("vcpu_count", maximum: 255)
            memory = try fields.requiredNumber("mem_size_mib")
        } else {
            cpus = try fields.number("vcpu_count", maximum: 255)
            memory = try fields.number("mem_size_mib")
        }
        smt = try fields.flag("smt", isNullRefused: isComplete)
        tracksDirtyPages = try fields.flag("track_dirty_pages", isNullRefused: isComplete)
        hugePages = try fields.word("huge_pages", HugePages.self, isNullRefused: isComplete)
        if let template = try fields.word("cpu_template", Template.self) {
            hasTemplate = true
            guard template == .none else {
                throw Fault(
                    "Machine config error: swkvm has no CPU templates: the guest sees the host's CPU model; leave cpu_template out, or use None."
                )
            }
        }
        if !isComplete, cpus == nil, memory == nil, smt == nil, tracksDirtyPages == nil, hugePages == nil, !hasTemplate
        {
            throw Fault("Empty PATCH request.")
        }
    }
}

/// `/boot-source`.
package struct BootSettings: Sendable, Equatable {
    package var kernel: String
    package var initrd: String?
    package var arguments: String?

    init(_ value: JSON) throws(Fault) {
        let fields = try Fields(value, of: "BootSourceConfig", ["kernel_image_path", "initrd_path", "boot_args"])
        kernel = try fields.requiredText("kernel_image_path")
        initrd = try fields.text("initrd_path")
        arguments = try fields.text("boot_args")
    }

    package init(kernel: String, initrd: String?, arguments: String?) {
        (self.kernel, self.initrd, self.arguments) = (kernel, initrd, arguments)
    }
}

/// A token bucket of a rate limiter.
package struct BucketSettings: Sendable, Equatable {
    /// Bytes or operations.
    package var size: UInt64
    /// Bytes or operations beyond the size, once.
    package var burst: UInt64?
    /// Milliseconds in which the bucket fills.
    package var refill: UInt64

    package init(size: UInt64, burst: UInt64? = nil, refill: UInt64) {
        (self.size, self.burst, self.refill) = (size, burst, refill)
    }

    init(_ value: JSON) throws(Fault) {
        let fields = try Fields(value, of: "TokenBucketConfig", ["size", "one_time_burst", "refill_time"])
        size = try fields.requiredNumber("size")
        burst = try fields.number("one_time_burst")
        refill = try fields.requiredNumber("refill_time")
    }

    /// Indicates whether it limits anything: one with a 0 does not.
    var isLimit: Bool { size > 0 && refill > 0 }

    var json: JSON {
        .object([
            ("size", .number(size)), ("one_time_burst", burst.map(JSON.number) ?? .null),
            ("refill_time", .number(refill)),
        ])
    }
}

/// A rate limiter.
package struct LimiterSettings: Sendable, Equatable {
    package var bandwidth: BucketSettings?
    package var operations: BucketSettings?

    package init(bandwidth: BucketSettings? = nil, operations: BucketSettings? = nil) {
        (self.bandwidth, self.operations) = (bandwidth, operations)
    }

    init(_ value: JSON) throws(Fault) {
        let fields = try Fields(value, of: "RateLimiterConfig", ["bandwidth", "ops"])
        if let value = fields.value("bandwidth") { bandwidth = try BucketSettings(value) }
        if let value = fields.value("ops") { operations = try BucketSettings(value) }
    }

    static func optional(_ value: JSON?) throws(Fault) -> LimiterSettings? {
        guard let value else { return nil }
        return try LimiterSettings(value)
    }

    /// Null where nothing is limited.
    var json: JSON {
        let parts = [bandwidth, operations].map { $0?.isLimit == true ? $0?.json ?? .null : .null }
        if case .null = parts[0], case .null = parts[1] { return .null }
        return .object([("bandwidth", parts[0]), ("ops", parts[1])])
    }
}

/// `/drives/{id}`.
package struct DriveSettings: Sendable, Equatable {
    package enum Cache: String, Sendable, CaseIterable {
        case unsafe = "Unsafe"
        case writeback = "Writeback"
    }

    package enum Engine: String, Sendable, CaseIterable {
        case sync = "Sync"
        case async = "Async"
    }

    package var id: String
    package var partition: String?
    package var isRoot: Bool
    package var cache: Cache
    package var isReadOnly: Bool
    package var path: String
    package var limiter: LimiterSettings?
    package var engine: Engine
    /// swkvm's own: the words of `--disk` behind the path.
    package var options: String?

    package init(id: String, path: String, isRoot: Bool, isReadOnly: Bool) {
        (self.id, self.path, self.isRoot, self.isReadOnly) = (id, path, isRoot, isReadOnly)
        (cache, engine) = (.unsafe, .sync)
    }

    init(_ value: JSON) throws(Fault) {
        let fields = try Fields(
            value, of: "BlockDeviceConfig",
            [
                "drive_id", "partuuid", "is_root_device", "cache_type", "is_read_only", "path_on_host",
                "rate_limiter", "io_engine", "socket", "swkvm",
            ])
        id = try fields.requiredText("drive_id")
        partition = try fields.text("partuuid")
        isRoot = try fields.requiredFlag("is_root_device")
        cache = try fields.word("cache_type", Cache.self) ?? .unsafe
        let readOnly = try fields.flag("is_read_only")
        let path = try fields.text("path_on_host")
        limiter = try LimiterSettings.optional(fields.value("rate_limiter"))
        engine = try fields.word("io_engine", Engine.self) ?? .sync
        let socket = try fields.text("socket")
        options = try fields.text("swkvm")
        guard let path, socket == nil else {
            throw Fault(
                "Drive config error: Unable to create the virtio block device: "
                    + (path == nil && socket != nil
                        ? "swkvm has no vhost-user block devices." : "Invalid block config."))
        }
        self.path = path
        isReadOnly = readOnly ?? false
    }

    var json: JSON {
        .object([
            ("drive_id", .string(id)), ("partuuid", partition.map(JSON.string) ?? .null),
            ("is_root_device", .bool(isRoot)), ("cache_type", .string(cache.rawValue)),
            ("is_read_only", .bool(isReadOnly)), ("path_on_host", .string(path)),
            ("rate_limiter", limiter?.json ?? .null), ("io_engine", .string(engine.rawValue)), ("socket", .null),
            ("swkvm", options.map(JSON.string)),
        ])
    }
}

/// `/network-interfaces/{id}`.
package struct InterfaceSettings: Sendable, Equatable {
    package var id: String
    /// The TAP's name.
    package var host: String
    package var mac: String?
    package var receiveLimiter: LimiterSettings?
    package var transmitLimiter: LimiterSettings?
    /// swkvm's own: the words of `--net` behind the TAP.
    package var options: String?

    package init(id: String, host: String, mac: String?) { (self.id, self.host, self.mac) = (id, host, mac) }

    init(_ value: JSON) throws(Fault) {
        let fields = try Fields(
            value, of: "NetworkInterfaceConfig",
            ["iface_id", "host_dev_name", "guest_mac", "rx_rate_limiter", "tx_rate_limiter", "swkvm"])
        id = try fields.requiredText("iface_id")
        host = try fields.requiredText("host_dev_name")
        mac = try fields.text("guest_mac")
        receiveLimiter = try LimiterSettings.optional(fields.value("rx_rate_limiter"))
        transmitLimiter = try LimiterSettings.optional(fields.value("tx_rate_limiter"))
        options = try fields.text("swkvm")
        if let mac, !Self.isAddress(mac) { throw .body("Failed to parse string as MAC address: \(mac)") }
    }

    /// Six pairs of hexadecimal digits with colons between them.
    private static func isAddress(_ text: String) -> Bool {
        let parts = text.utf8.split(separator: UInt8(ascii: ":"), omittingEmptySubsequences: false)
        return parts.count == 6
            && parts.allSatisfy { $0.count == 2 && $0.allSatisfy { Character(Unicode.Scalar($0)).isHexDigit } }
    }

    var json: JSON {
        .object([
            ("iface_id", .string(id)), ("host_dev_name", .string(host)), ("guest_mac", mac.map(JSON.string) ?? .null),
            ("rx_rate_limiter", receiveLimiter?.json ?? .null), ("tx_rate_limiter", transmitLimiter?.json ?? .null),
            ("swkvm", options.map(JSON.string)),
        ])
    }
}

/// `/logger`.
package struct LoggerSettings: Sendable, Equatable {
    package enum Level: String, Sendable, CaseIterable {
        case off = "Off"
        case trace = "Trace"
        case debug = "Debug"
        case info = "Info"
        case warning = "Warning"
        case error = "Error"
    }

    package var path: String?
    package var level: Level?

    init(_ value: JSON) throws(Fault) {
        let fields = try Fields(
            value, of: "LoggerConfig", ["log_path", "level", "show_level", "show_log_origin", "module"])
        path = try fields.text("log_path")
        if let word = try fields.text("level") {
            // As Firecracker has it: in any case, and Warn is Warning.
            let lower = word.lowercased()
            guard
                let level = Level.allCases.first(where: { $0.rawValue.lowercased() == lower })
                    ?? (lower == "warn" ? .warning : nil)
            else {
                throw .body(
                    "unknown variant `\(word)`, expected one of `Off`, `Trace`, `Debug`, `Info`, `Warn`, `Error`, `Warning`"
                )
            }
            self.level = level
        }
        _ = try fields.flag("show_level")
        _ = try fields.flag("show_log_origin")
        _ = try fields.text("module")
    }
}
