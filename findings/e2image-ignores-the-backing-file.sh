#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# e2image 1.47.0 (Debian 12): `e2image -r` takes a qcow2 overlay for a whole image; what is in its backing file becomes zeroes.
#
# e2image(8) converts a QCOW2 image of a file system to a raw one (-r), any of version 2 that is not compressed, also
# qemu-img's. The header of an overlay names its backing file (QEMU's docs/interop/qcow2.txt, bytes 8 to 19). e2image does not
# look at that: clusters that the overlay does not have are holes in the raw file, and it ends with status 0 and without a
# message. A full image of the same kind is converted correctly, and images that it does not know (version 3, compressed
# clusters) are refused.
# For a monitor: convert overlays with a program that reads their chain; the result's size says nothing about its contents.
. "$(dirname "$0")/support"
debian qemu-utils='1:7.2+dfsg-7+deb12u18+b3' e2fsprogs='1.47.0-2+b2'
truncate -s 16M base.raw
debian_run mke2fs -q -F -t ext4 base.raw
options=compat=0.10,cluster_size=4096
debian_run qemu-img convert -f raw -O qcow2 -o $options base.raw full.qcow2
debian_run qemu-img create -q -f qcow2 -o $options -b base.raw -F raw overlay.qcow2
debian_run qemu-io -f qcow2 -c 'write -P 65 8M 4k' overlay.qcow2 > /dev/null
for image in full overlay; do
    status=0
    debian_run e2image -r $image.qcow2 $image.raw > messages 2>&1 || status=$?
    debian_run qemu-img convert -f qcow2 -O raw $image.qcow2 contents
    echo "$image.qcow2: status $status, $(grep -vc '^e2image 1.47.0' messages || true) messages, $(stat -c %s $image.raw) bytes"
    echo "    $(cmp -s $image.raw contents && echo as qemu-img reads it || echo not what qemu-img reads)"
done > seen
echo "bytes other than 0: $(tr -d '\0' < overlay.raw | wc -c)" >> seen
expect seen <<'END'
full.qcow2: status 0, 0 messages, 16777216 bytes
    as qemu-img reads it
overlay.qcow2: status 0, 0 messages, 16777216 bytes
    not what qemu-img reads
bytes other than 0: 4096
END
