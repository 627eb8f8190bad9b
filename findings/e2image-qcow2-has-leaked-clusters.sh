#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# e2image 1.47.0 (Debian 12): each qcow2 file that `e2image -Q` writes has leaked clusters for qemu-img check.
#
# "All clusters have a refcount"; one that nothing refers to must have 0 (QEMU's docs/interop/qcow2.txt, "Host cluster
# management"). e2image gives a refcount of 1 to clusters that no table names, one or two in each image, so `qemu-img check`
# ends with status 3 for an image that was just written and is otherwise right: what both read is the same.
# For a monitor: status 3 of a check, leaks without errors, is no reason to refuse a disk.
. "$(dirname "$0")/support"
debian qemu-utils='1:7.2+dfsg-7+deb12u18+b3' e2fsprogs='1.47.0-2+b2'
for size in 16M 64M 200M 1G; do
    rm -f disk.raw back.raw contents disk.qcow2
    truncate -s $size disk.raw
    debian_run mke2fs -q -F -t ext4 disk.raw
    debian_run e2image -Q disk.raw disk.qcow2 2> /dev/null
    status=0
    debian_run qemu-img check -f qcow2 disk.qcow2 > found 2>&1 || status=$?
    debian_run e2image -r disk.qcow2 back.raw 2> /dev/null
    debian_run qemu-img convert -f qcow2 -O raw disk.qcow2 contents
    cmp back.raw contents
    echo "$size: status $status, $(grep -c ERROR found || true) errors, $(grep -c '^Leaked cluster' found) leaked"
done > seen
expect seen <<'END'
16M: status 3, 0 errors, 1 leaked
64M: status 3, 0 errors, 1 leaked
200M: status 3, 0 errors, 2 leaked
1G: status 3, 0 errors, 1 leaked
END
