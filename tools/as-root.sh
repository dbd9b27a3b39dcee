#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs a command as root: as we are, or by sudo.
[ "$(id -u)" = 0 ] && exec "$@"
command -v sudo >/dev/null 2>&1 && sudo -v 2>/dev/null && exec sudo "$@"
echo "tandem-nat: this makes network namespaces, and needs root or a working sudo" >&2
exit 1
