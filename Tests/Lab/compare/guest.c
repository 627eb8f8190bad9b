// SPDX-License-Identifier: Apache-2.0
// The guest's /init, and the host's end of its network (`guest serve`). `lab=WORD` on the kernel's command line selects the action:
//   boot      prints a line
//   disk      measures /dev/vda      network   measures eth0     seconds=S, for each figure
#define _GNU_SOURCE
#include "common.h"
#include "disk.h"
#include "network.h"
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

/// In the order of the list that came with them.
static void load_modules(void) {
    char name[128], path[160];
    FILE *list = fopen("/modules/order", "r");
    while (list && fscanf(list, "%127s", name) == 1) {
        snprintf(path, sizeof path, "/modules/%s", name);
        int file = check(open(path, O_RDONLY | O_CLOEXEC), path);
        check(syscall(SYS_finit_module, file, "", 0), path);
        close(file);
    }
}

static void wait_for_ever(void) {
    for (;;) pause();
}

int main(int count, char **words) {
    if (count > 1 && strcmp(words[1], "serve") == 0) serve_network();
    // In one piece; everything else comes later.
    if (write(1, "lab: init\n", 10) != 10) return 1;
    const char *what = getenv("lab"), *text = getenv("seconds");
    if (!what || strcmp(what, "boot") == 0) wait_for_ever();
    setvbuf(stdout, NULL, _IOLBF, 0);
    atexit(wait_for_ever);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    load_modules();
    double seconds = text ? atof(text) : 0.5, began = now();
    printf("lab: begin\n");
    if (strcmp(what, "disk") == 0) measure_disk(seconds);
    if (strcmp(what, "network") == 0) measure_network("192.0.2.1", seconds);
    printf("lab: done %.0f\n", (now() - began) * 1e9);
    wait_for_ever();
}
