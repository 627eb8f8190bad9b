#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# dissect.hypervisor 3.21 (PyPI): a read of a VDI that is longer than a block takes everything from where the first block is.
#
# The image has one allocated block, the second. Read block by block the data is there; read as a whole the disk is empty, without
# an error, as the block map is looked at once for the whole read. qemu-img reads the data either way.
# For a monitor: a tool that extracts files from a guest's disk may see another disk for each size of its reads; a reader is
# tested with reads that begin in one kind of block and end in another.
. "$(dirname "$0")/support"
debian qemu-utils='1:7.2+dfsg-7+deb12u18+b3'
pypi dissect.hypervisor==3.21
debian_run qemu-img create -q -f vdi disk.vdi 4M
debian_run qemu-io -f vdi -c 'write -P 3 1M 4k' disk.vdi > /dev/null
debian_run qemu-img convert -f vdi -O raw disk.vdi contents
echo "qemu-img: $(tr -d '\0' < contents | wc -c) bytes of data" > seen
$python - >> seen <<'END'
from dissect.hypervisor.disk.vdi import VDI
def data(*sizes):
    stream = VDI(open("disk.vdi", "rb")).open()
    return sum(len(stream.read(size).replace(b"\0", b"")) for size in sizes)
print(f"dissect, four reads of 1 MiB: {data(*[1 << 20] * 4)} bytes of data")
print(f"dissect, one read of 4 MiB: {data(4 << 20)} bytes of data")
END
expect seen <<'END'
qemu-img: 4096 bytes of data
dissect, four reads of 1 MiB: 4096 bytes of data
dissect, one read of 4 MiB: 0 bytes of data
END
