// SPDX-License-Identifier: Apache-2.0
#include "CLinux.h"

#include <linux/magic.h>
#include <sys/vfs.h>

int clinux_cgroup_version(int directory) {
    struct statfs status;
    if (fstatfs(directory, &status) < 0)
        return 0;
    return status.f_type == CGROUP2_SUPER_MAGIC ? 2 : status.f_type == CGROUP_SUPER_MAGIC;
}
