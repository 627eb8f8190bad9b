#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# mke2fs 1.47.0 (Debian 12): with inline_data, `mke2fs -d` makes a file that ends in a hole shorter than it is.
#
# The directory has a file of 100 KiB with 1,000 bytes at its start and a hole behind them. Without inline_data its size in the new file
# system is 102400. With it the size is the end of the last block that was written, and e2fsck finds nothing wrong. Only the
# size is lost, not data: but a raw disk image, a swap file or a database that ends in a hole is cut.
# For a monitor: an image for tests that is made with -d is compared with its source, and a reader of ext4 that shows the short
# size is right.
. "$(dirname "$0")/support"
debian e2fsprogs='1.47.0-2+b2'
mkdir tree
head -c 1000 /dev/zero | tr '\0' x > tree/file
truncate -s 100K tree/file
for features in ^inline_data inline_data; do
    rm -f image
    debian_run mke2fs -q -t ext4 -I 256 -O $features -d tree image 16M > /dev/null
    debian_run e2fsck -fn image > check 2>&1 || { cat check; exit 1; }
    echo "$features: $(debian_run debugfs -R 'stat /file' image 2>/dev/null | sed -n 's/^User.* Size: /size /p')"
done > seen
expect seen <<'END'
^inline_data: size 102400
inline_data: size 1024
END
