# SPDX-License-Identifier: Apache-2.0
"""The native parts: the core and failure detection for Python (always), the DPDK binding (where libdpdk is)."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
CORE = Path("nat_fastpath/core")
DPDK_AT_LEAST = "22.11"
GENERATED = ("engine.c", "watch.c", "nat_fastpath.dpdk._dpdk.c", "bench.pktgen._pktgen.c")


def header_hash() -> str:
    """What ties every native part to one and the same nat.h; see struct nat_api."""
    return "0x" + hashlib.sha256((HERE / CORE / "nat.h").read_bytes()).hexdigest()[:16] + "ULL"


def compile_args() -> list[str]:
    args = ["-O3", "-std=gnu11", "-g", "-fno-plt"]
    if os.uname().machine == "x86_64":
        args.append(
            "-march=x86-64-v2"
        )  # Debian's DPDK asks for SSE4.2 too; newer instructions are chosen at run time
    if sanitizers := os.environ.get("TANDEM_SANITIZE"):
        # with a sanitizer gcc sees uninitialized variables where none are
        args += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-Wno-maybe-uninitialized"]
    return args


def link_args() -> list[str]:
    sanitizers = os.environ.get("TANDEM_SANITIZE")
    return [f"-fsanitize={sanitizers}"] if sanitizers else []


class StrictBuild(build_ext):
    """Our own C is compiled with every warning an error; generated C is not ours to mend."""

    def build_extension(self, extension: Extension) -> None:
        compile_one = self.compiler._compile

        def compile_strictly(obj, src, ext, cc_args, extra, pp_opts):
            if Path(src).name not in GENERATED:
                extra = [*extra, "-Wall", "-Wextra", "-Werror"]
            compile_one(obj, src, ext, cc_args, extra, pp_opts)

        self.compiler._compile = compile_strictly
        try:
            super().build_extension(extension)
        finally:
            self.compiler._compile = compile_one


def has_dpdk() -> bool:
    """Whether the binding can be built; says so when not."""
    tool = shutil.which("pkg-config")
    if (
        tool
        and not subprocess.run(
            [tool, f"--atleast-version={DPDK_AT_LEAST}", "libdpdk"], check=False
        ).returncode
    ):
        return True
    print(
        f"tandem-nat: no libdpdk >= {DPDK_AT_LEAST} here: building the core without the DPDK binding "
        "(Debian: apt install libdpdk-dev pkg-config)",
        file=sys.stderr,
    )
    return False


engine = Extension(
    "nat_fastpath.engine",
    sources=["nat_fastpath/engine.pyx", *sorted(str(path) for path in CORE.glob("*.c"))],
    depends=[*sorted(str(path) for path in CORE.glob("*.h")), "nat_fastpath/engine_tables.h"],
    include_dirs=["nat_fastpath", str(CORE), numpy.get_include()],
    define_macros=[("NAT_HEADER_HASH", header_hash())],
    extra_compile_args=compile_args(),
    extra_link_args=link_args(),
)

WATCH = ("heartbeat", "heartbeat_packet", "link_watch", "memory_holder")

watch = Extension(
    "nat_fastpath.watch",
    sources=["nat_fastpath/watch.pyx", *(f"nat_fastpath/{part}.c" for part in WATCH)],
    depends=[
        *(f"nat_fastpath/{part}.h" for part in (*WATCH, "heartbeat_cpus", "heartbeat_role")),
        str(CORE / "role.h"),
    ],
    include_dirs=["nat_fastpath", str(CORE)],
    extra_compile_args=[*compile_args(), "-pthread"],
    extra_link_args=[*link_args(), "-pthread"],
)

BINDINGS = ("nat_fastpath/dpdk/build.py", "bench/pktgen/build.py")

setup(
    ext_modules=cythonize([engine, watch], language_level=3),
    cmdclass={"build_ext": StrictBuild},
    **({"cffi_modules": [f"{binding}:ffibuilder" for binding in BINDINGS]} if has_dpdk() else {}),
)
