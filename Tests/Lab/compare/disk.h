// SPDX-License-Identifier: Apache-2.0
// The disk as a guest sees it: /dev/vda with O_DIRECT, one figure after the other.
#pragma once
void measure_disk(double seconds);
