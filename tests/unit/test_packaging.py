# SPDX-License-Identifier: Apache-2.0
"""What a user gets with ``pip install .``, and the rules that keep the parts apart."""

import ast
import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "nat_fastpath/core").glob("*.[ch]"))
PYTHON = [
    path for folder in ("nat_fastpath", "nat_control") for path in sorted((ROOT / folder).rglob("*.py"))
]

TRANSLATE = """
import json
from importlib.resources import files
from nat_control import config
from nat_fastpath import core_config
from nat_fastpath.engine import Core, Verdict

core = Core(config.to_core(config.load("server.yaml"), [bytes([2, 0, 0, 0, 0, i]) for i in (1, 2)]))
payload = bytes(8)
ip = bytes.fromhex("4500001c00000000401100000a000005cb007107")
total = sum(int.from_bytes(ip[i : i + 2], "big") for i in range(0, 20, 2))
check = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
ip = ip[:10] + check.to_bytes(2, "big") + ip[12:]
frame = bytes.fromhex("020000000001" "020000000005" "0800") + ip + bytes.fromhex("1388003500080000")
gateway = bytes.fromhex(
    "020000000002" "0200000000fe" "0806" "0001080006040002" "0200000000fe" "c63364fe" "020000000002" "c6336401"
)
held, = core.burst([(0, frame)], 1_000_000)
answered, = core.burst([(1, gateway)], 2_000_000)
sent, = core.take()
print(json.dumps({
    "verdicts": [held.verdict.name, answered.verdict.name, sent.verdict.name],
    "source": list(sent.frame[26:30]),
    "typed": all(files(name).joinpath("py.typed").is_file() for name in ("nat_control", "nat_fastpath")),
    "schema": "$schema" in json.loads(files("nat_control").joinpath("config.schema.json").read_text()),
}))
"""


def tracked() -> list[Path]:
    """The files of the repository, whoever owns the checkout."""
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Without anything of the checkout in the way, and with libdpdk out of sight."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env |= {"PKG_CONFIG_LIBDIR": "/nonexistent", "PKG_CONFIG_PATH": ""}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a fresh environment with the package in it, built from the tracked files alone."""
    there = tmp_path_factory.mktemp("install")
    for path in tracked():
        copy = there / "source" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    venv.create(there / "venv", with_pip=True)
    made = run(there / "venv/bin/python", "-m", "pip", "install", "--quiet", there / "source", cwd=there)
    assert made.returncode == 0, made.stderr
    (there / "server.yaml").write_bytes((ROOT / "examples/server.yaml").read_bytes())
    return there / "venv/bin"


@pytest.mark.timeout(300)
def test_the_core_works_without_libdpdk(installed: Path) -> None:
    done = run(installed / "python", "-c", TRANSLATE, cwd=installed.parents[1])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verdicts"] == ["HELD", "CONSUMED", "FORWARD"]
    assert found["source"][:3] == [198, 51, 100]
    assert 10 <= found["source"][3] <= 13
    assert found["schema"]
    assert found["typed"], "or a type checker ignores the annotations of nat_control.client"


@pytest.mark.timeout(300)
def test_without_libdpdk_the_binding_says_so_in_one_line(installed: Path) -> None:
    done = run(installed / "python", "-c", "import nat_fastpath.dpdk", cwd=installed.parents[1])
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: this Tandem NAT was built without DPDK")
    assert "apt install libdpdk-dev" in last


@pytest.mark.timeout(300)
def test_the_command_works_without_libdpdk(installed: Path) -> None:
    checked = run(installed / "tandem-nat", "check", "server.yaml", cwd=installed.parents[1])
    assert checked.returncode == 0, checked.stderr
    refused = run(installed / "tandem-nat", "server", "server.yaml", cwd=installed.parents[1])
    assert refused.returncode != 0
    assert "built without DPDK" in refused.stderr
    assert "Traceback" not in refused.stderr


# -- the rules ---------------------------------------------------------------------------------------------


def without_comments(path: Path) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.DOTALL)


def test_the_core_knows_neither_dpdk_nor_python() -> None:
    assert CORE
    for path in CORE:
        found = re.findall(r"\brte_\w*|Python\.h|\bPy[A-Z]\w*|numpy", without_comments(path))
        assert found == [], path


def test_the_core_includes_nothing_but_itself_and_the_c_library() -> None:
    allowed = {
        "assert",
        "emmintrin",
        "wmmintrin",
        "immintrin",
        "stdatomic",
        "stdbool",
        "stddef",
        "stdint",
        "stdio",
        "stdlib",
    }
    allowed |= {"string", "sys/mman", "sys/random"}
    for path in CORE:
        outside = set(re.findall(r"#include <(\S+)\.h>", without_comments(path)))
        assert outside <= allowed, path


def test_the_core_reads_no_clock() -> None:
    clock = r"\b(?:clock_gettime|gettimeofday|timespec_get|__?rdtscp?|__builtin_ia32_rdtsc|time|clock)\s*\("
    for path in CORE:
        assert re.findall(clock, without_comments(path)) == [], path


def test_the_core_has_no_mutable_globals() -> None:
    """Data at file scope is constant; functions and types are not data."""
    for path in CORE:
        for line in without_comments(path).splitlines():
            if re.match(
                r"(?:static |_Thread_local )*[a-z_]\w*(?: \w+)* \**\w+(?:\[[^\]]*\])*(?: =.*|;)$", line
            ):
                assert re.match(
                    r"(?:static |extern )*const |typedef |extern const |(?:struct|enum) \w+;|return", line
                ), f"{path.name}: {line}"


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def test_imports_point_one_way() -> None:
    for path in (ROOT / "nat_fastpath").rglob("*.py*"):
        if path.suffix == ".pyx":
            found = set(re.findall(r"^\s*(?:from|c?import)\s+([\w.]+)", path.read_text(), re.MULTILINE))
        elif path.suffix in (".py", ".pyi"):
            found = set(imports(path))
        else:
            continue
        assert not {name for name in found if name.startswith(("nat_control", "switch_agent"))}, path


# Who may read a clock, and what for.
CLOCKS = {
    "nat_control/loop.py": "the control loop",
    "nat_control/lab.py": "waits for other programs in test networks",
    "nat_control/lab_stream.py": "sends at a rate, and records when",
}
# Who may know DPDK: everything else works without it.
DPDK = {"nat_control/server.py", "nat_control/cli.py", "nat_control/cli_host.py", "nat_control/cli_pktgen.py"}


def test_clocks_are_read_in_few_places() -> None:
    readers = {str(path.relative_to(ROOT)) for path in PYTHON if "time" in set(imports(path))}
    assert readers == set(CLOCKS)


def test_dpdk_is_imported_in_few_places() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in PYTHON
        if path.is_relative_to(ROOT / "nat_control")
        and any(name.startswith("nat_fastpath.dpdk") for name in imports(path))
    }
    assert users <= DPDK


def test_the_configuration_imports_nothing_that_runs() -> None:
    found = {
        name for file in ("config.py", "config_reader.py") for name in imports(ROOT / "nat_control" / file)
    }
    assert not {
        name for name in found if name.startswith("nat_fastpath.") and name != "nat_fastpath.core_config"
    }
    assert not found & {"asyncio", "socket", "subprocess", "threading"}


# -- the tree ----------------------------------------------------------------------------------------------


LONG = {"engine.pyx": 960}  # one class, and Cython wants it whole


def test_every_source_file_names_its_licence_and_stays_readable() -> None:
    suffixes = {".c", ".h", ".py", ".pyi", ".pyx", ".sh"}
    for path in (path for path in tracked() if path.suffix in suffixes):
        text = path.read_text()
        assert "SPDX-License-Identifier: Apache-2.0" in text[:200], path
        assert text.count("\n") <= LONG.get(path.name, 600), path


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_make_targets_that_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^|\$ )make ([a-z]+)", (ROOT / document).read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "docs/configuration.md"]
)
def test_documents_name_files_that_exist(document: str) -> None:
    at = ROOT / document
    for link in re.findall(r"\]\(([^)#:\s]+)\)", at.read_text()):
        assert (at.parent / link).exists(), link


def test_this_python_is_the_one_that_was_asked_for() -> None:
    wanted = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert wanted is not None
    assert sys.version_info >= (3, int(wanted[1]))
