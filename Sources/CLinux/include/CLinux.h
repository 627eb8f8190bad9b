// SPDX-License-Identifier: Apache-2.0
// What Swift cannot import from the kernel's and libc's headers: ioctl numbers, variadic calls,
// unions and flexible arrays, volatile and atomic access. Each helper is a line or two.
#ifndef CLINUX_H
#define CLINUX_H

// No _GNU_SOURCE here: Swift's own module of libc is built without it, and two views of one structure would clash.
// What needs it is a function in CLinux.c.
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/if_tun.h>
#include <linux/kvm.h>
#include <linux/kvm_para.h>
#include <linux/memfd.h>
#include <linux/mempolicy.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "CLinuxAtomics.h"
#include "CLinuxCalls.h"
#include "CLinuxKVM.h"
#include "CLinuxURing.h"
#include "CLinuxNetwork.h"
#include "CLinuxProgram.h"
#include "CLinuxProcess.h"
#include "CLinuxTerminal.h"

#endif
