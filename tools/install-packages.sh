#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs the Debian packages that building, testing and the demo need and that are missing.
set -eu

PACKAGES="$*
build-essential pkg-config python3-dev python3-venv libdpdk-dev dpdk dpdk-dev
iproute2 iputils-ping traceroute ethtool tcpdump curl iperf3 nginx-light dnsmasq-base bind9-dnsutils
clang clang-format libclang-rt-14-dev openvswitch-switch openvswitch-switch-dpdk
"

fail() {
    echo "tandem-nat: $1" >&2
    exit 1
}

command -v apt-get >/dev/null && command -v dpkg-query >/dev/null ||
    fail "this is no Debian: install the equivalents of$(echo $PACKAGES | sed 's/^/ /') by hand, then run pip install -e '.[dev]'"

missing=""
for package in $PACKAGES; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing="$missing $package"
done

if [ -n "$missing" ]; then
    sudo=""
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || fail "missing packages, and no root or sudo to install them:$missing"
        sudo="sudo"
    fi
    echo "tandem-nat: installing with apt:$missing"
    # a service that comes with a package (nginx, dnsmasq) shall not start by itself
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' | $sudo tee $policy >/dev/null
        $sudo chmod +x $policy
        trap '$sudo rm -f $policy' EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM HUP
    fi
    log=$(mktemp)
    $sudo apt-get update -qq >"$log" 2>&1 || { cat "$log" >&2; fail "apt-get update failed"; }
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing >"$log" 2>&1 ||
        { cat "$log" >&2; fail "apt-get install failed"; }
    rm -f "$log"
fi

version=$(pkg-config --modversion libdpdk 2>/dev/null) || version="not known to pkg-config"
pkg-config --atleast-version=22.11 libdpdk ||
    fail "libdpdk is $version, and 22.11 at least is needed (Debian 12 has it)"
