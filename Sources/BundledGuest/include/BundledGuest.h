// SPDX-License-Identifier: Apache-2.0
// The bundled guest: an ELF file that is part of the binary.
#ifndef BUNDLED_GUEST_H
#define BUNDLED_GUEST_H

#include <stddef.h>

/// Its first byte; page-aligned, never changes.
const void *bundled_guest_start(void);
/// Its size in bytes.
size_t bundled_guest_size(void);

#endif
