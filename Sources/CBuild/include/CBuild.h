// SPDX-License-Identifier: Apache-2.0

/// What this binary was built of: recorded by `make release` (.ci/components), absent from a plain `swift build`.
#ifndef CBUILD_H
#define CBUILD_H

/// The revision and the packages that are linked statically, as lines for a reader; empty where they were not recorded, or where this process
/// takes its libraries from the system.
const char *cbuild_components(void);

#endif
