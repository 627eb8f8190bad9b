#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# dissect.hypervisor 3.21 (PyPI): a qcow2 overlay that is larger than its backing file loses what lies between, and the rest moves.
#
# An overlay may be larger than what it stands on (every cloud image that was given a bigger disk is): the space beyond the
# backing file's end is zeroes. dissect reads the backing file there, gets nothing, and goes on: the disk of 8 MiB is read as
# 4.06 MiB, and the data at 7 MiB is found at 4 MiB. No call fails. qemu-img reads zeroes.
# For a monitor: the end of a backing file is inside the disk, and a reader's tests need an overlay of another size than its base.
. "$(dirname "$0")/support"
debian qemu-utils='1:7.2+dfsg-7+deb12u18+b3'
pypi dissect.hypervisor==3.21
debian_run qemu-img create -q -f raw base.raw 4M
debian_run qemu-img create -q -f qcow2 -b base.raw -F raw overlay.qcow2 8M
debian_run qemu-io -f qcow2 -c 'write -P 13 7M 4k' overlay.qcow2 > /dev/null
debian_run qemu-img convert -f qcow2 -O raw overlay.qcow2 contents
cat > where.py <<'END'
import sys
def where(name, data):
    print(f"{name}: {len(data)} bytes, the data at {data.find(13)}")
where("qemu-img", open("contents", "rb").read())
from pathlib import Path
from dissect.hypervisor.disk.qcow2 import QCow2
where("dissect", QCow2(Path("overlay.qcow2")).open().read())
END
$python where.py > seen
expect seen <<'END'
qemu-img: 8388608 bytes, the data at 7340032
dissect: 4259840 bytes, the data at 4194304
END
