#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# firecracker-python 0.0.5 (PyPI): a socket whose path has a capital letter is not found, though it is there.
#
# The client puts the path into a URL, percent-encoded in the place of the host's name, as requests-unixsocket does. Host names
# are the same in capitals and small letters (RFC 3986 §3.2.2), so they are made small on the way, and the client connects to
# another path. mktemp's directories have capitals as a rule; a machine's name may have some.
# For a monitor: sockets that its clients are to find have small letters only, in all directories of the path.
. "$(dirname "$0")/support"
pypi firecracker-python==0.0.5
cat > server.py <<'END'
import socketserver, sys
from http.server import BaseHTTPRequestHandler

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"state": "Not started"}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def address_string(self): return "client"
    def log_message(self, *words): pass

socketserver.UnixStreamServer(sys.argv[1], Handler).serve_forever()
END
cat > client.py <<'END'
import sys
from firecracker.api import Api
try:
    print("answer:", Api(sys.argv[1]).describe.get().json()["state"])
except Exception as error:
    print("error:", "No such file or directory" if "No such file" in str(error) else error)
END
# All directories above it have small letters.
folder=/tmp/finding-$$
mkdir "$folder"
trap 'kill $(jobs -p) 2> /dev/null; rm -rf "$work" "$folder"' EXIT
for name in small.socket Capital.socket; do
    $python server.py "$folder/$name" &
    until [ -S "$folder/$name" ]; do sleep 0.1; done
    echo "$name: $($python client.py "$folder/$name" 2> /dev/null | tail -n 1)"
done > seen
expect seen <<'END'
small.socket: answer: Not started
Capital.socket: error: No such file or directory
END
