import ArgumentParser
import Machine
import Testing

@testable import swkvm

@Suite struct UUIDArgumentTests {
    @Test func aUUIDOrNone() throws {
        let text = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
        #expect(try UUIDArgument(parsing: text).uuid?.description == text)
        #expect(try UUIDArgument(parsing: "none").uuid == nil)
    }

    @Test(arguments: ["", "None", "6ba7b810", "6ba7b810-9dad-11d1-80b4-00c04fd430cx"])
    func mistakes(argument: String) {
        let error = #expect(throws: ArgumentProblem.self) { try UUIDArgument(parsing: argument) }
        #expect(error?.description.hasPrefix("'\(argument)' is no UUID, wanted none or one such as") == true)
    }

    @Test func aNameThatIsGivenHasOne() throws {
        func uuid(_ arguments: String...) throws -> String? {
            let command = try #require(try Command.parseAsRoot(["run"] + arguments) as? RunCommand)
            return command.configuration.uuid?.description
        }
        let given = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
        #expect(try uuid() == nil)
        #expect(try uuid("--name", "web") == UUID(ofMachine: "web").description)
        #expect(try uuid("--name", "web", "--uuid", given) == given)
        #expect(try uuid("--uuid", given) == given)
        #expect(try uuid("--name", "web", "--uuid", "none") == nil)
    }
}
