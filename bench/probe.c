/* SPDX-License-Identifier: Apache-2.0
 *
 * How fast the CPU is just now, for what is measured from Python.
 */
#include "frames.h"

double speed_probe(void);
double speed_probe(void)
{
    return probe_ns();
}
