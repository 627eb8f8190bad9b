// SPDX-License-Identifier: Apache-2.0
// TCP and small packets between a guest and its host: the guest measures, the host serves.
#pragma once
#include <stdint.h>
void serve_network(void);
void measure_network(const char *host, double seconds);
