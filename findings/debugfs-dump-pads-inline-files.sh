#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# debugfs 1.47.0 (Debian 12): a file of 5 bytes kept inside its inode (inline_data) is dumped as 60 bytes.
#
# i_size says 5, and so does `stat`. `cat` and `dump` write the whole area of the inode, with zeroes behind the five bytes. The
# kernel shows 5 bytes.
# For a monitor: debugfs is the usual way to look into a guest's disk without mounting it; what it dumps of such an image is not
# what the guest sees, so a checksum over it does not compare, and an empty file is not empty.
. "$(dirname "$0")/support"
debian e2fsprogs='1.47.0-2+b2'
mkdir tree
printf 'tiny\n' > tree/file
debian_run mke2fs -q -t ext4 -I 256 -O inline_data -d tree image 16M > /dev/null
{
    debian_run debugfs -R 'stat /file' image 2>/dev/null | sed -n 's/^User.* Size: /size in the inode: /p'
    debian_run debugfs -R 'dump /file dumped' image 2>/dev/null
    echo "size of the dump: $(stat -c %s dumped), of these not zero: $(tr -d '\0' < dumped | wc -c)"
    echo "size of cat: $(debian_run debugfs -R 'cat /file' image 2>/dev/null | wc -c)"
} > seen
expect seen <<'END'
size in the inode: 5
size of the dump: 60, of these not zero: 5
size of cat: 60
END
