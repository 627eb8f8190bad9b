// SPDX-License-Identifier: Apache-2.0

#ifndef CLINUX_PROCESS_H
#define CLINUX_PROCESS_H

#include <sys/types.h>

/// Locks a file for this process until it ends, or closes any descriptor of the file. Returns -1 with EAGAIN or EACCES if another process has locked it.
int clinux_lock_process_file(int fd);

/// The process that has locked a file so; 0 if there is none, -1 on failure: ESRCH for one that is not
/// visible in this PID namespace.
pid_t clinux_process_file_owner(int fd);

int clinux_pidfd_open(pid_t process);

int clinux_pidfd_send_signal(int process, int number);

/// Forks: the child, in a session of its own, has the file `messages` as standard output and error and nothing as standard input, and gets a descriptor.
/// The calling process does not return: it waits until the child has written a byte to the descriptor, or has ended, prints what the child has added to
/// the file, and ends with status 0, or with the child's. Returns -1 on failure. There must be no other thread.
int clinux_detach(int messages);

/// Writes what standard output's buffer has. Returns 0, or the error number of that or of an earlier write.
int clinux_flush_output(void);

#endif
