// SPDX-License-Identifier: Apache-2.0

package import Linux
internal import NIOCore
internal import NIOHTTP1
internal import NIOPosix
internal import Synchronization

/// What requests are for.
package protocol ManagementTarget: Sendable {
    /// Carries a request out. Called on the server's thread, which must not wait.
    /// - Parameter answer: called once, on any thread.
    func handle(_ request: ManagementRequest, answer: @escaping @Sendable (ManagementAnswer) -> Void)
}

/// An HTTP/1.1 server for a machine's clients, on one thread of its own (`api`).
package final class ManagementServer: Sendable {
    /// Bytes of a request's body.
    package static let maximumBody = 51_200
    /// Clients at a time; one more gets 503.
    package static let maximumConnections = 10
    /// Of the thread: bodies are parsed by recursion, to a bounded depth.
    private static let stackSize = 512 << 10

    private let loop: any EventLoop
    /// What the process had got before the server opened anything.
    private let inherited: Set<Int32>

    /// Starts the thread.
    /// - Parameter descriptor: a listening socket, which the server takes over.
    package init(
        _ descriptor: consuming Linux.FileDescriptor, _ target: any ManagementTarget
    ) throws(SystemCallError) {
        JSONReader.prepare()
        inherited = InheritableDescriptors.all
        let started = Guarded<(any EventLoop)?>(nil)
        let monitor = Monitor()
        let number = descriptor.release()
        let thread = try Thread.start(name: "api", stackSize: Self.stackSize) {
            MultiThreadedEventLoopGroup.withCurrentThreadAsEventLoop { loop in
                Self.serve(number, target, loop)
                monitor.locked {
                    started.withLock { $0 = loop }
                    monitor.broadcast()
                }
            }
        }
        // It lives as long as the process does.
        thread.detach()
        loop = monitor.locked {
            while true {
                if let loop = started.withLock({ $0 }) { return loop }
                monitor.wait()
            }
        }
    }

    /// Has the server's thread do something.
    package func perform(_ body: @escaping @Sendable () -> Void) { loop.execute(body) }

    /// Stops the thread between two events until the answer is called: no client is accepted meanwhile, and none of the
    /// server's descriptors gets into another program.
    package func hold() -> @Sendable () -> Void {
        let isHeld = Guarded<Bool?>(nil)
        let monitor = Monitor()
        let inherited = inherited
        loop.execute {
            InheritableDescriptors.keep(inherited)
            monitor.locked {
                isHeld.withLock { $0 = true }
                monitor.broadcast()
                while isHeld.withLock({ $0 }) == true { monitor.wait() }
            }
        }
        monitor.locked { while isHeld.withLock({ $0 }) == nil { monitor.wait() } }
        return {
            monitor.locked {
                isHeld.withLock { $0 = false }
                monitor.broadcast()
            }
        }
    }

    private static func serve(_ descriptor: Int32, _ target: any ManagementTarget, _ loop: any EventLoop) {
        let clients = Clients()
        ServerBootstrap(group: loop)
            .serverChannelOption(.backlog, value: 128)
            .childChannelInitializer { channel in
                channel.eventLoop.makeCompletedFuture {
                    let isTaken = clients.enter()
                    channel.closeFuture.whenComplete { _ in if isTaken { clients.leave() } }
                    let pipeline = channel.pipeline.syncOperations
                    guard isTaken else { return try pipeline.addHandler(RefusalHandler()) }
                    var configuration = HTTPResponseEncoder.Configuration()
                    configuration.automaticallySetFramingHeaders = false
                    try pipeline.addHandlers([
                        BackPressureHandler(),
                        HTTPResponseEncoder(configuration: configuration),
                        ByteToMessageHandler(HTTPRequestDecoder(leftOverBytesStrategy: .dropBytes)),
                        HTTPServerPipelineHandler(),
                        RequestHandler(target),
                    ])
                }
            }
            .withBoundSocket(descriptor)
            .whenFailure { error in preconditionFailure("the API's socket cannot be served: \(error)") }
    }
}

/// Refuses one client too many.
private final class RefusalHandler: ChannelInboundHandler {
    typealias InboundIn = ByteBuffer
    typealias OutboundOut = ByteBuffer

    func channelActive(context: ChannelHandlerContext) {
        let body = #"{ "error": "Too many open connections" }"#
        let head =
            "HTTP/1.1 503\r\nServer: \(RequestHandler.serverName)\r\nConnection: close\r\nContent-Length: \(body.utf8.count)\r\n\r\n"
        context.writeAndFlush(wrapOutboundOut(ByteBuffer(string: head + body)), promise: nil)
        context.close(promise: nil)
    }
}

/// How many clients there are.
private final class Clients: Sendable {
    private let count = Atomic<Int>(0)

    func enter() -> Bool {
        guard count.load(ordering: .relaxed) < ManagementServer.maximumConnections else { return false }
        count.add(1, ordering: .relaxed)
        return true
    }

    func leave() { count.subtract(1, ordering: .relaxed) }
}
