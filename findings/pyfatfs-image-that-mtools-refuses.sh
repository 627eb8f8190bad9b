#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# pyfatfs 1.1.0 (PyPI) and mtools 4.0.33 (Debian 12): mtools does not read a FAT image that pyfatfs has just made.
#
# PyFat.mkfs() leaves the geometry of the boot sector empty: no heads, no sectors per track. Linux, blkid and fsck.vfat do not use
# these fields. mtools does, and ends with an error. The label, too, is in two spellings: as given in the boot sector,
# in capitals in the root directory, and blkid shows the second.
# For a monitor that makes a seed for cloud-init: FAT images need a geometry, although LBA has replaced it, and one spelling of the
# label in both places.
. "$(dirname "$0")/support"
debian mtools='4.0.33-1+really4.0.32-1' dosfstools=4.2-1
pypi pyfatfs==1.1.0 setuptools==65.5.0
truncate -s 4M image
$python - 2> /dev/null <<'END'
from pyfatfs.PyFat import PyFat
image = PyFat()
image.mkfs("image", PyFat.FAT_TYPE_FAT12, label="cidata")
image.close()
END
cp image made
{
    # shellcheck disable=SC2094 # the first mdir is the program, the others are the file with its report
    echo "mdir's status: $(debian_run mdir -i made :: > mdir 2>&1; echo $?): $(tail -n 1 mdir)"
    echo "heads and sectors per track: $(od -An -tu2 -j 24 -N 4 made | tr -s ' ')"
    echo "label in the boot sector: $(dd if=made bs=1 skip=43 count=11 2>/dev/null), in the root directory: $(grep -ao 'CIDATA     ' made | head -n 1)"
} > seen
expect seen <<'END'
mdir's status: 1: The devil is in the details: zero number of heads or sectors
heads and sectors per track:  0 0
label in the boot sector: cidata     , in the root directory: CIDATA     
END
