// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

@testable import HostNetwork

@Suite(.timed, .enabled(if: mayMakeNamespaces, rootNeeded)) struct LinkWatcherTests {
    private struct NotWatched: Error {}

    private func watch(_ attachment: borrowing NetworkAttachment) throws -> LinkWatcher {
        guard let watcher = attachment.watchLink() else { throw NotWatched() }
        return watcher
    }

    /// Waits until something is said, which need not be about the watched interface.
    private func nextState(_ watcher: borrowing LinkWatcher) -> LinkState? {
        var entry = pollfd(fd: watcher.descriptor, events: Int16(POLLIN), revents: 0)
        return unsafe poll(&entry, 1, 10_000) == 1 ? watcher.latest() : nil
    }

    private func next(_ watcher: borrowing LinkWatcher) -> Bool? { nextState(watcher)?.isCarrying }

    /// Waits for the first that is said about the interface.
    private func said(_ watcher: borrowing LinkWatcher) -> LinkState? {
        for _ in 0..<100 { if let state = nextState(watcher) { return state } }
        return nil
    }

    @Test func hearsOfOneInterface() throws {
        try inNewNamespace { host in
            let attachment = try NetworkAttachment(.tap(name("tap0")))
            let other = try NetworkAttachment(.tap(name("tap1")))
            let watcher = try watch(attachment)
            let (before, nothing) = (watcher.current()?.isCarrying, watcher.latest()?.isCarrying)
            // The kernel may repeat what is so, some time later.
            #expect(before == true && nothing != false)
            let tap = try #require(try host.netlink.link(named: name("tap0"))),
                second = try #require(try host.netlink.link(named: name("tap1")))

            try host.netlink.set(tap, up: false)
            let down = next(watcher)
            #expect(down == false)
            // The other is not reported.
            try host.netlink.set(second, up: false)
            let silence = next(watcher)
            #expect(silence != true)
            // The last word counts.
            try host.netlink.set(tap, up: true)
            try host.netlink.set(tap, up: false)
            try host.netlink.set(tap, up: true)
            let up = next(watcher), now = watcher.current()?.isCarrying
            #expect(up == true && now == true)
            _ = consume other
        }
    }

    @Test func aBridgesWordOfItsPortIsNone() throws {
        try inNewNamespace { host in
            let attachment = try NetworkAttachment(.tap(name("tap0"), bridge: .init(name("br0"), create: true)))
            let watcher = try watch(attachment)
            let tap = try #require(try host.netlink.link(named: name("tap0")))
            for _ in 0..<3 {
                try host.netlink.set(tap, up: false)
                let down = next(watcher)
                try host.netlink.set(tap, up: true)
                let up = next(watcher)
                #expect(down == false && up == true)
            }
        }
    }

    /// More changes than the socket has room for: what was lost is asked for.
    @Test func whatWasLostIsAskedFor() throws {
        try inNewNamespace { host in
            let attachment = try NetworkAttachment(.tap(name("tap0")))
            let watcher = try watch(attachment)
            var room: Int32 = 1
            unsafe setsockopt(watcher.descriptor, SOL_SOCKET, SO_RCVBUF, &room, 4)
            let tap = try #require(try host.netlink.link(named: name("tap0")))
            for index in 0..<40 { try host.netlink.set(tap, up: index % 2 == 0) }
            let last = watcher.latest()?.isCarrying, more = watcher.latest()?.isCarrying
            #expect(last == false && more != true)
        }
    }

    @Test func hearsOfAnotherMTU() throws {
        try inNewNamespace { host in
            let attachment = try NetworkAttachment(.tap(name("tap0")))
            let watcher = try watch(attachment)
            let tap = try #require(try host.netlink.link(named: name("tap0")))
            _ = watcher.latest()
            try host.netlink.set(tap, mtu: 9000)
            let state = said(watcher)
            #expect(state == .present(isCarrying: true, mtu: 9000))
            try host.netlink.set(tap, mtu: 1280)
            try host.netlink.set(tap, up: false)
            var last = said(watcher)
            while last != .present(isCarrying: false, mtu: 1280), let more = said(watcher) { last = more }
            #expect(last == .present(isCarrying: false, mtu: 1280))
        }
    }

    @Test func hearsOfTheRemoval() throws {
        try inNewNamespace { host in
            let attachment = try NetworkAttachment(.tap(name("tap0"), bridge: .init(name("br0"), create: true)))
            let watcher = try watch(attachment)
            let tap = try #require(try host.netlink.link(named: name("tap0")))
            try host.netlink.set(tap, master: nil)
            // The bridge tells that it has lost a port, which is no removal.
            while let state = nextState(watcher) {
                #expect(state != .removed)
                if try host.netlink.link(named: name("tap0"))?.master == 0 { break }
            }
            try host.netlink.delete(tap)
            var last: LinkState?
            while last != .removed, let state = said(watcher) { last = state }
            #expect(last == .removed)
        }
    }

    @Test func whatCannotBeSeenIsNotWatched() throws {
        try inNewNamespace { _ in
            let tap = try openTUN("tap0", flags: IFF_TAP | IFF_NO_PI)
            // In another namespace than the interface's.
            try NetworkNamespace.enterNew()
            let number = try passOn(tap)
            let attachment = try NetworkAttachment(.descriptor(number))
            let isWatched = attachment.watchLink() != nil
            #expect(!isWatched)
        }
    }
}

extension LinkState {
    fileprivate var isCarrying: Bool? { if case .present(let isCarrying, _) = self { isCarrying } else { nil } }
}
