// SPDX-License-Identifier: Apache-2.0

internal import Linux
internal import NIOCore
internal import NIOHTTP1

/// One client's connection: collects a request's body, has it carried out, and sends the answer.
final class RequestHandler: ChannelInboundHandler {
    typealias InboundIn = HTTPServerRequestPart
    typealias OutboundOut = HTTPServerResponsePart

    static let serverName = "swkvm"
    private static let dropped = "\nAll previous unanswered requests will be dropped."

    private let target: any ManagementTarget
    private var head: HTTPRequestHead?
    private var body: [UInt8] = []
    /// The request was answered before its end, and the connection ends.
    private var isRefused = false

    init(_ target: any ManagementTarget) { self.target = target }

    func channelRead(context: ChannelHandlerContext, data: NIOAny) {
        guard !isRefused else { return }
        switch unwrapInboundIn(data) {
        case .head(let head): begin(head, context)
        case .body(let bytes):
            guard body.count + bytes.readableBytes <= ManagementServer.maximumBody else {
                return refuseSize(body.count + bytes.readableBytes, context)
            }
            body += bytes.readableBytesView
        case .end: complete(context)
        }
    }

    private func begin(_ head: HTTPRequestHead, _ context: ChannelHandlerContext) {
        self.head = head
        body = []
        let length = head.headers.first(name: "content-length").flatMap { Int($0) } ?? 0
        guard length <= ManagementServer.maximumBody else { return refuseSize(length, context) }
        guard head.headers.first(name: "expect")?.lowercased() == "100-continue" else { return }
        let headers: HTTPHeaders = ["Server": Self.serverName, "Connection": "keep-alive"]
        let head = HTTPResponseHead(
            version: .http1_1, status: .custom(code: 100, reasonPhrase: ""), headers: headers)
        context.writeAndFlush(wrapOutboundOut(.head(head)), promise: nil)
    }

    private func refuseSize(_ size: Int, _ context: ChannelHandlerContext) {
        let text =
            "Request payload with size \(size) is larger than the limit of \(ManagementServer.maximumBody) allowed by server."
        refuse(text, context)
    }

    /// Answers a request whose rest is not read.
    private func refuse(_ text: String, _ context: ChannelHandlerContext) {
        isRefused = true
        send(.error(text + Self.dropped), context.channel, closes: true)
    }

    private func complete(_ context: ChannelHandlerContext) {
        guard let head else { return }
        let bytes = body
        (self.head, body) = (nil, [])
        let channel = context.channel
        let closes = !head.isKeepAlive
        let method = head.method.rawValue
        guard ["GET", "PUT", "PATCH"].contains(method) else {
            return send(.error("Invalid HTTP Method: Unsupported HTTP method." + Self.dropped), channel, closes: closes)
        }
        let request: ManagementRequest
        do throws(Fault) {
            request = try ManagementRequest(method: method, target: head.uri, body: bytes)
        } catch { return send(.fault(error.message), channel, closes: closes) }
        target.handle(request) { answer in
            // On the channel's own thread, also where that is this one.
            channel.eventLoop.execute { Self.send(answer, channel, closes: closes) }
        }
    }

    private func send(_ answer: ManagementAnswer, _ channel: any Channel, closes: Bool) {
        Self.send(answer, channel, closes: closes)
    }

    private static func send(_ answer: ManagementAnswer, _ channel: any Channel, closes: Bool) {
        var headers = HTTPHeaders([("Server", serverName), ("Connection", closes ? "close" : "keep-alive")])
        if answer.isDeprecated { headers.add(name: "Deprecation", value: "true") }
        let text = answer.body?.compact
        if let text {
            headers.add(name: "Content-Type", value: "application/json")
            headers.add(name: "Content-Length", value: "\(text.utf8.count)")
        }
        let status = HTTPResponseStatus.custom(code: UInt(answer.status), reasonPhrase: "")
        channel.write(
            HTTPServerResponsePart.head(HTTPResponseHead(version: .http1_1, status: status, headers: headers)),
            promise: nil)
        if let text { channel.write(HTTPServerResponsePart.body(.byteBuffer(ByteBuffer(string: text))), promise: nil) }
        channel.writeAndFlush(HTTPServerResponsePart.end(nil)).whenComplete { _ in
            if closes { channel.close(promise: nil) }
        }
    }

    func errorCaught(context: ChannelHandlerContext, error: any Error) {
        // The decoder finds no further request after what is none.
        guard error is HTTPParserError, !isRefused else { return context.close(promise: nil) }
        refuse("Invalid request: \(error).", context)
    }
}
