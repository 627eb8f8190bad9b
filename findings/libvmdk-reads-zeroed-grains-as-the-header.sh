#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# libvmdk 20260714 (PyPI libvmdk-python): a grain that the image marks as zeroes reads as the bytes of the file's second sector.
#
# A VMDK with header version 2 and its zeroed-grain flag (qemu-img create -o zeroed_grain=on; VMware writes it too) marks such a
# grain with the entry 1 in place of a sector's number. libvmdk opens the image, and takes 1 for sector 1 of the file, where the
# descriptor's text is: a guest's zeroes come out as `# Disk DescriptorFile`. qemu-img reads zeroes.
# For a monitor: an image that is to be read by forensic tools is better made without the flag, and a reader of VMDK has to ask
# for the flag before it takes an entry for an address.
. "$(dirname "$0")/support"
debian qemu-utils='1:7.2+dfsg-7+deb12u18+b3'
pypi libvmdk-python==20260714
debian_run qemu-img create -q -f vmdk -o zeroed_grain=on disk.vmdk 4M
debian_run qemu-io -f vmdk -c 'write -P 1 0 1M' -c 'write -z 0 64k' disk.vmdk > /dev/null
debian_run qemu-img convert -f vmdk -O raw disk.vmdk contents
echo "qemu-img: $(head -c 65536 contents | tr -d '\0' | wc -c) bytes of the zeroed grain are not zero" > seen
$python - >> seen <<'END'
import pyvmdk
handle = pyvmdk.handle()
handle.open("disk.vmdk")
handle.open_extent_data_files()
print(f"libvmdk {pyvmdk.get_version()}: the zeroed grain begins with {handle.read_buffer(21)}")
END
expect seen <<'END'
qemu-img: 0 bytes of the zeroed grain are not zero
libvmdk 20260714: the zeroed grain begins with b'# Disk DescriptorFile'
END
