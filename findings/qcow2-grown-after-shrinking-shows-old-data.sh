#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# qemu-img 7.2 (Debian 12): a qcow2 image that is shrunk, then grown again, shows data from beyond the old end.
#
# The new end may lie inside a cluster. The cluster stays, and what it has beyond the end stays in it: growing the image makes
# these bytes part of the disk again. A raw file that ftruncate(2) cuts and extends has zeroes there, and so has a qcow2 image
# whose end falls between clusters. qemu-img check finds nothing wrong.
# For a monitor: a program that shrinks a qcow2 image has to zero the rest of its last cluster, also when another tool grows it later.
. "$(dirname "$0")/support"
debian qemu-utils='1:7.2+dfsg-7+deb12u18+b3'
for format in qcow2 raw; do
    debian_run qemu-img create -q -f $format disk 1M
    debian_run qemu-io -f $format -c 'write -P 0xaa 0 1M' disk > /dev/null
    debian_run qemu-img resize -q -f $format --shrink disk $((512 * 1024 + 512))
    debian_run qemu-img resize -q -f $format disk 1M
    debian_run qemu-img convert -f $format -O raw disk contents
    echo "$format: $(tail -c +$((512 * 1024 + 513)) contents | tr -d '\0' | wc -c) bytes beyond the cut are not zero"
done > seen
expect seen <<'END'
qcow2: 65024 bytes beyond the cut are not zero
raw: 0 bytes beyond the cut are not zero
END
