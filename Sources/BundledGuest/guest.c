// SPDX-License-Identifier: Apache-2.0

#include "BundledGuest.h"

extern const unsigned char swkvm_bundled_guest[], swkvm_bundled_guest_end[];

const void *bundled_guest_start(void) { return swkvm_bundled_guest; }

size_t bundled_guest_size(void) { return (size_t)(swkvm_bundled_guest_end - swkvm_bundled_guest); }
