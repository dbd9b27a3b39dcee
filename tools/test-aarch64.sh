#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Compiles the core for aarch64 and runs its tests there, under qemu-user: `make test-aarch64`. Arguments are pytest's.
# Debian's python for arm64 is unpacked below build/aarch64, nothing of it is installed.
set -eu
cd "$(dirname "$0")/.."

HERE=build/aarch64
ROOT=$HERE/root
SITE=$HERE/site
CC=aarch64-linux-gnu-gcc
PYTHON=python3.11
HOST=.venv/bin/python

tools/install-packages.sh qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross debootstrap

if [ ! -e $HERE/.unpacked ]; then
    echo "tandem-nat: fetching Debian's $PYTHON for arm64"
    rm -rf $ROOT $SITE
    mkdir -p $HERE
    tools/as-root.sh debootstrap --download-only --arch=arm64 --variant=minbase \
        --include=$PYTHON-minimal,lib$PYTHON-stdlib,lib$PYTHON-dev bookworm $ROOT >$HERE/debootstrap.log 2>&1 ||
        { tail -3 $HERE/debootstrap.log >&2; exit 1; }
    for package in $ROOT/var/cache/apt/archives/*.deb; do
        dpkg-deb -x "$package" $ROOT
    done
    $HOST -m pip install --quiet --disable-pip-version-check --target $SITE --python-version 3.11 --no-compile \
        --platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64 --only-binary=:all: \
        numpy cryptography pyyaml pytest pytest-timeout pytest-benchmark hypothesis scapy
    touch $HERE/.unpacked
fi

echo "tandem-nat: compiling with $CC"
HASH=0x$(sha256sum nat_fastpath/core/nat.h | cut -c1-16)ULL # as setup.py's
FLAGS="-O3 -std=gnu11 -g -fPIC -pthread -DNAT_HEADER_HASH=$HASH -Inat_fastpath -Inat_fastpath/core"
GENERATED="-I$ROOT/usr/include/$PYTHON -I$ROOT/usr/include -I$SITE/numpy/_core/include"

# extension EXTENSION SOURCE...: a module of nat_fastpath, beside the one of this machine
extension() {
    name=$1
    shift
    objects=""
    for source in "$@"; do
        object=$HERE/$name-$(basename "$source" .c).o
        $CC $FLAGS -Wall -Wextra -Werror -c "$source" -o "$object"
        objects="$objects $object"
    done
    $HOST -m cython -3 nat_fastpath/$name.pyx -o $HERE/$name.c
    $CC $FLAGS $GENERATED -shared -o nat_fastpath/$name.cpython-311-aarch64-linux-gnu.so $HERE/$name.c $objects
}

extension engine nat_fastpath/core/*.c
extension watch nat_fastpath/heartbeat.c nat_fastpath/heartbeat_packet.c nat_fastpath/link_watch.c nat_fastpath/memory_holder.c

echo "tandem-nat: the core's tests on $(qemu-aarch64 -L $ROOT $ROOT/usr/bin/$PYTHON -c 'import platform; print(platform.machine())'), emulated"
# tests that compile a library for themselves do it for the emulated machine; one runs a program, which only a kernel could
mkdir -p $HERE/bin
for name in cc gcc; do
    ln -sf "$(command -v $CC)" $HERE/bin/$name
done
if [ $# = 0 ]; then # crafted keys are searched for minutes, without an emulation
    set -- tests/core tests/golden --ignore=tests/core/test_crafted_keys.py \
        --deselect=tests/core/test_slices.py::test_rss_computes_the_same
fi
PATH=$PWD/$HERE/bin:$PATH PYTHONPATH=$SITE:. exec qemu-aarch64 -L $ROOT $ROOT/usr/bin/$PYTHON -m pytest -p no:cacheprovider --timeout 1200 "$@"
