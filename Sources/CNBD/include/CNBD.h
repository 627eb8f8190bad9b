// SPDX-License-Identifier: Apache-2.0

/// libnbd, and what it is linked with here.
#ifndef CNBD_H
#define CNBD_H

#include <stdbool.h>
#if !__has_include(<libnbd.h>)
#error "libnbd is missing: `make packages-build` installs the libraries that swkvm is built with (Debian: libnbd-dev)"
#endif
#include <libnbd.h>

/// Whether libnbd's TLS is there: always where libnbd is a shared library, in a static binary if it was built so (`make release TLS=yes`).
bool cnbd_has_tls(void);

#endif
