// SPDX-License-Identifier: Apache-2.0

import Linux
import ManagementAPI
import TestSupport
import Testing

/// Requests of clients, from their bytes to what is asked for.
@Suite(.timed) struct RequestTests {
    private static func request(
        _ method: String, _ target: String, _ body: String = ""
    ) throws(Fault) -> ManagementRequest {
        try ManagementRequest(method: method, target: target, body: Array(body.utf8))
    }

    private static func fault(_ method: String, _ target: String, _ body: String = "") -> String? {
        do throws(Fault) {
            _ = try request(method, target, body)
            return nil
        } catch { return error.message }
    }

    @Test(arguments: ["/version", "//version", "/version/", "/version/x", "http://localhost/version"])
    func `The first segment of a path decides`(target: String) throws {
        #expect(try Self.request("GET", target) == .version)
    }

    @Test func `A query is a part of the name`() {
        #expect(
            Self.fault("GET", "/version?x=1") == "Invalid request method and/or path: GET version?x=1.")
    }

    @Test(arguments: [
        ("PUT", "/actions", "", "Empty PUT request."), ("PATCH", "/vm", "", "Empty PATCH request."),
        ("GET", "/", "{}", "GET request cannot have a body."),
        ("PUT", "/drives/", "{}", "The ID cannot be empty."),
        (
            "PUT", "/drives/a-b", "{}",
            "API Resource IDs can only contain alphanumeric characters and underscores."
        ),
        (
            "PUT", "/drives/a", #"{"drive_id":"b","is_root_device":false,"path_on_host":"x"}"#,
            "The id from the path does not match the id from the body!"
        ),
    ]) func `What is no request is refused`(method: String, target: String, body: String, message: String) {
        #expect(Self.fault(method, target, body) == message)
    }

    @Test(arguments: [
        "{", "nul", "[1,]", #"{"a":1,}"#, #"{"a":1,"a":1}"#, "{} {}", #"{"a":"\#u{1}"}"#, "'a'", "1e999",
        "99999999999999999999", #"{"a":"\ud800"}"#, "\u{0}", String(repeating: "[", count: 200),
    ]) func `A body that is no JSON is refused as such`(body: String) {
        let message = Self.fault("PUT", "/machine-config", body)
        #expect(message?.hasPrefix("An error occurred when deserializing the json body of a request: ") == true)
    }

    @Test func `A member of the wrong type is refused, and so are unknown and missing ones`() {
        let prefix = "An error occurred when deserializing the json body of a request: "
        for (body, reason) in [
            (#"{"vcpu_count":1}"#, "missing field `mem_size_mib`."),
            (#"{"action_type":1}"#, "unknown field `action_type`, expected one of"),
            (#"{"vcpu_count":"1","mem_size_mib":1}"#, #"invalid type: string "1", expected u8."#),
            (#"{"vcpu_count":256,"mem_size_mib":1}"#, "invalid value: integer `256`, expected u8."),
            (#"{"vcpu_count":-1,"mem_size_mib":1}"#, "invalid value: integer `-1`, expected u8."),
            (#"{"vcpu_count":1.5,"mem_size_mib":1}"#, "invalid type: floating point number, expected u8."),
            (#"{"vcpu_count":1,"mem_size_mib":1,"smt":null}"#, "invalid type: null, expected a boolean."),
            (
                #"{"vcpu_count":1,"mem_size_mib":1,"huge_pages":"1G"}"#,
                "unknown variant `1G`, expected `None` or `2M`."
            ),
        ] { #expect(Self.fault("PUT", "/machine-config", body)?.hasPrefix(prefix + reason) == true, "\(body)") }
    }

    @Test func `The deepest body that is accepted is parsed on a small stack`() throws {
        let depth = JSONReader.maximumDepth
        let text = String(repeating: "[", count: depth) + String(repeating: "]", count: depth)
        let isRead = Guarded(false)
        let thread = try Thread.start(name: "small") {
            let value = try? JSONReader.read(Array(text.utf8))
            isRead.withLock { $0 = value != nil }
        }
        thread.join()
        #expect(isRead.withLock { $0 })
    }

    @Test func `Brackets in strings are no depth`() throws {
        let text = #"{"a":"\#(String(repeating: "[", count: 500))\\","b":"\"["}"#
        #expect(try JSONReader.read(Array(text.utf8)).compact == text)
    }

    @Test(arguments: [#"{"a":[1,-2,null,true,"x\u0007"],"b":{}}"#, "[]", "0", #""""#, "18"])
    func `A value is printed as it was read`(text: String) throws {
        #expect(try JSONReader.read(Array(text.utf8)).compact == text)
    }
}

/// A machine as requests describe it.
@Suite(.timed) struct DescriptionTests {
    private static func drive(_ id: String, root: Bool = false) throws -> DriveSettings {
        let body = #"{"drive_id":"\#(id)","is_root_device":\#(root),"path_on_host":"x"}"#
        guard
            case .setDrive(let drive) = try ManagementRequest(
                method: "PUT", target: "/drives/\(id)", body: Array(body.utf8))
        else { throw Fault("") }
        return drive
    }

    @Test func `The root drive is the first one`() throws {
        var machine = MachineDescription()
        try machine.set(Self.drive("a"))
        try machine.set(Self.drive("r", root: true))
        try machine.set(Self.drive("b"))
        #expect(machine.drives.map(\.id) == ["r", "a", "b"])
        #expect(throws: Fault("Drive config error: A root block device already exists!")) {
            try machine.set(Self.drive("s", root: true))
        }
        try machine.set(Self.drive("a"))
        #expect(machine.drives.map(\.id) == ["r", "a", "b"])
    }

    @Test(arguments: [(0, 1), (33, 1), (1, 0), (1, 1 << 45)] as [(UInt64, UInt64)])
    func `A machine that cannot be is refused`(cpus: UInt64, memory: UInt64) throws {
        let body = #"{"vcpu_count":\#(cpus),"mem_size_mib":\#(memory)}"#
        let request = try ManagementRequest(method: "PUT", target: "/machine-config", body: Array(body.utf8))
        guard case .setMachine(let settings) = request else { throw Fault("") }
        var machine = MachineDescription()
        #expect(throws: Fault.self) { try machine.change(settings) }
        #expect(machine.cpus == 1 && machine.memory == 128)
    }

    @Test func `A configuration file has a kernel and drives, and its other names are ignored`() throws {
        let text =
            #"{"boot-source":{"kernel_image_path":"k"},"drives":[],"machine-config":{"vcpu_count":2,"mem_size_mib":64},"x":1}"#
        let file = try ConfigurationFile(Array(text.utf8))
        #expect(file.machine.cpus == 2 && file.machine.boot?.kernel == "k")
        for text in ["{}", #"{"boot-source":{"kernel_image_path":"k"}}"#, #"{"drives":[]}"#, "[]", ""] {
            #expect(throws: Fault.self) { try ConfigurationFile(Array(text.utf8)) }
        }
    }
}
