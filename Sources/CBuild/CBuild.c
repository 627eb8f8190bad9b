// SPDX-License-Identifier: Apache-2.0

#include "CBuild.h"
#include <sys/auxv.h>

const char *cbuild_components(void) {
#if __has_include("components.inc")
    // A program without an interpreter has no shared libraries. The list says nothing of one that has.
    if (getauxval(AT_BASE) == 0) {
        return
#include "components.inc"
            ;
    }
#endif
    return "";
}
