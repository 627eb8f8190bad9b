#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# libqcow 20260703 (PyPI libqcow-python): some of the compressed clusters that qemu-img writes read as zeroes, without an error.
#
# The image has sixteen clusters of random letters, compressed with zlib as `qemu-img convert -c` does. Compressed clusters
# begin at any byte and share sectors. Some are read as they are, others as zeroes; no call fails. qemu-img reads all of them.
# Forensic tools read images through this library. For a monitor: a guest's disk is not lost because such a tool finds it empty,
# and a reader of one's own is compared with qemu-img on images whose compressed clusters do not begin at sectors.
. "$(dirname "$0")/support"
debian qemu-utils='1:7.2+dfsg-7+deb12u18+b3'
pypi libqcow-python==20260703
python3 - <<'END'
import random
generator = random.Random(1)
with open("source", "wb") as file:
    for _ in range(16):
        file.write(bytes(generator.choice(b"abcdefgh") for _ in range(65536)))
END
debian_run qemu-img convert -c -f raw -O qcow2 source image.qcow2
debian_run qemu-img convert -f qcow2 -O raw image.qcow2 back
cmp source back && echo "qemu-img: as written" > seen
$python - >> seen <<'END'
import pyqcow
image = pyqcow.file()
image.open("image.qcow2")
source = open("source", "rb").read()
data = image.read_buffer(image.get_media_size())
kinds = ""
for start in range(0, len(source), 65536):
    cluster = data[start:start + 65536]
    kinds += "=" if cluster == source[start:start + 65536] else "0" if not any(cluster) else "?"
print(f"libqcow {pyqcow.get_version()}: {kinds} (= as written, 0 zeroes)")
END
expect seen <<'END'
qemu-img: as written
libqcow 20260703: =0000===0==0===0 (= as written, 0 zeroes)
END
