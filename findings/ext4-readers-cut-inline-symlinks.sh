#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# dissect.extfs 3.15 and libfsext 20260821 (PyPI): a symbolic link of 100 characters reads as 60 where inline_data is on.
#
# Without inline_data a target of 60 bytes or more is in a block. With it the first 60 bytes are in the inode and the rest is in
# the attribute system.data. Both libraries open the file system, say that the link's size is 100, and return the first 60 characters as its
# target, without an error. debugfs and the kernel return all of it.
# For a monitor that looks for a kernel inside a disk: /vmlinuz and the entries of a boot menu may be such links, and a target
# that is cut may name another file.
. "$(dirname "$0")/support"
debian e2fsprogs='1.47.0-2+b2'
pypi dissect.extfs==3.15 libfsext-python==20260821
mkdir tree
ln -s "$(printf '%0100d' 0)" tree/link
debian_run mke2fs -q -t ext4 -I 256 -O inline_data -d tree image 16M > /dev/null
debian_run e2fsck -fn image > check 2>&1 || { cat check; exit 1; }
echo "debugfs: $(debian_run debugfs -R 'cat /link' image 2>/dev/null | wc -c) characters" > seen
$python - >> seen <<'END'
from dissect.extfs import ExtFS
link = ExtFS(open("image", "rb")).get("/link")
print(f"dissect.extfs: size {link.size}, target of {len(link.link)} characters")
import pyfsext
volume = pyfsext.volume()
volume.open("image")
link = volume.get_file_entry_by_path("/link")
print(f"libfsext: size {link.size}, target of {len(link.symbolic_link_target)} characters")
END
expect seen <<'END'
debugfs: 100 characters
dissect.extfs: size 100, target of 60 characters
libfsext: size 100, target of 60 characters
END
