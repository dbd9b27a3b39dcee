# SPDX-License-Identifier: Apache-2.0
"""The command: exit codes, one clear line per error, JSON, and pipes that end early."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from nat_control import api
from nat_control.cli import _since
from nat_fastpath.engine import RECORD, VERDICT_NAMES
from tests.unit.test_translate import outbound, write

CLI = [sys.executable, "-m", "nat_control.cli"]
GOOD = {
    "instance": "unit",
    "ports": {
        "internal": {"device": "nat-in", "address": "10.0.0.1/24"},
        "external": {"device": "nat-out", "address": "198.51.100.1/24", "gateway": "198.51.100.254"},
    },
    "nat": {"pool": {"addresses": ["198.51.100.10-198.51.100.13"]}, "max_sessions": 1000},
}


def command(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*CLI, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "nat.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "control": {"socket": str(tmp_path / "nat.sock")}}))
    return path


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.yaml"
    nat = {**GOOD["nat"], "mapping": "none", "max_sessions": -1}  # type: ignore[dict-item]
    path.write_text(yaml.safe_dump({**GOOD, "nat": nat}))
    return path


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Path]:
    """The socket of a server with 30 000 sessions and no packets."""
    table = np.zeros(30_000, RECORD)
    table["id"] = np.arange(len(table)) + 1
    table["protocol"] = 17

    def sessions(cursor: int, maximum: int) -> tuple[np.ndarray, int]:
        end = cursor + maximum
        return table[cursor:end], end if end < len(table) else 0

    stats = {
        "verdicts": dict.fromkeys(VERDICT_NAMES, 0) | {"forward": 7},
        "counters": {"hosts": 0},
        "worker": {},
    }
    server = api.Api({"stats": lambda: stats}, sessions)
    loop = asyncio.new_event_loop()
    path = tmp_path / "nat.sock"
    loop.run_until_complete(server.start(path))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield path
    asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_check_states_the_memory(config: Path) -> None:
    assert "good; 1000 sessions take" in command("check", config).stdout
    answer = json.loads(command("check", config, "--json").stdout)
    assert answer["ok"] is True
    assert answer["memory"]["total"] >= answer["memory"]["sessions"] > 0


def test_check_warns(tmp_path: Path) -> None:
    path = tmp_path / "nat.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "nat": {**GOOD["nat"], "timeouts": {"udp": 5}}}))  # type: ignore[dict-item]
    assert "warning: nat.timeouts.udp" in command("check", path).stdout
    assert json.loads(command("check", path, "--json").stdout)["warnings"]


@pytest.mark.parametrize("what", ["check", "server"])
def test_every_error_of_a_configuration_has_its_line(bad: Path, what: str) -> None:
    lines = command(what, bad, code=2).stderr.strip().splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"tandem-nat: {bad}: nat.") for line in lines)


def test_errors_of_a_configuration_as_json(bad: Path) -> None:
    answer = json.loads(command("check", bad, "--json", code=2).stdout)
    assert answer["ok"] is False
    assert {error["path"] for error in answer["errors"]} == {"nat.mapping", "nat.max_sessions"}


@pytest.mark.parametrize("what", ["check", "server"])
def test_a_configuration_that_is_not_there(tmp_path: Path, what: str) -> None:
    (line,) = command(what, tmp_path / "none.yaml", code=2).stderr.strip().splitlines()
    assert str(tmp_path / "none.yaml") in line


@pytest.mark.parametrize("what", ["status", "sessions", "stats", "pool", "ports"])
def test_show_without_a_server(config: Path, what: str) -> None:
    (line,) = command("show", what, "-c", config, code=3).stderr.strip().splitlines()
    assert "no server is running there" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["show", "nonsense"],
        ["show", "sessions", "--limit", "x"],
        ["check"],
        ["translate", "a", "b"],
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str]) -> None:
    (line,) = command(*arguments, code=2).stderr.splitlines()
    assert line.startswith("tandem-nat: ")
    assert line.endswith(" --help`")


def as_nobody(*arguments: object, code: int) -> str:
    """The command of a user without rights, other than to read Python where it is; its only line."""
    reading = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    drop = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *reading]
    done = subprocess.run(
        [*(() if os.geteuid() else drop), *CLI, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_what_needs_root_says_so_first(tmp_path: Path) -> None:
    path = tmp_path / "nat.yaml"
    state = tmp_path / "state"
    path.write_text(yaml.safe_dump({**GOOD, "control": {"socket": str(state / "nat.sock")}}))
    assert as_nobody("server", path, code=1).startswith("tandem-nat: a server needs root")
    assert not state.exists()
    assert "need root: try again with sudo" in as_nobody("demo", code=1)


@pytest.mark.parametrize("option", ["--socket", "-c"])
def test_a_socket_that_is_not_ours_cannot_be_reached(operator: Path, config: Path, option: str) -> None:
    if os.geteuid():
        operator.chmod(0)
    answer = as_nobody("show", "status", option, operator if option == "--socket" else config, code=3)
    assert (
        answer == f"tandem-nat: {operator}: permission denied; the socket is its owner's (root's): use sudo"
    )


def test_help_names_the_exit_codes() -> None:
    said = " ".join(command("--help").stdout.split())
    assert "3 no server is running" in said
    for name in ("server", "check", "show", "translate", "demo", "version"):
        assert name in said


def test_the_steps_of_a_takeover_have_their_times() -> None:
    takeover = {"reason": "silence", "detected": 10**9, "written": 10**9 + 40_000, "barrier": None}
    assert _since(takeover) == ["written after 0.04 ms"]
    assert _since({**takeover, "proved": 10**9 + 3_000_000}) == [
        "written after 0.04 ms",
        "proved after 3.00 ms",
    ]
    assert _since({}) == []


def test_version() -> None:
    assert command("version").stdout.startswith("tandem-nat 0.")
    assert set(json.loads(command("version", "--json").stdout)) == {"version", "dpdk", "sync"}


def test_sessions_as_json_are_one_document(operator: Path) -> None:
    answer = json.loads(command("show", "sessions", "--socket", operator, "--json", "--limit", "0").stdout)
    assert len(answer["sessions"]) == 30_000
    assert answer["cursor"] == 0
    page = json.loads(command("show", "sessions", "--socket", operator, "--json", "--limit", "5").stdout)
    assert [int(row["id"], 16) for row in page["sessions"]] == [1, 2, 3, 4, 5]
    assert page["cursor"] == 5
    none = json.loads(command("show", "sessions", "--socket", operator, "--json", "--protocol", "tcp").stdout)
    assert none == {"sessions": [], "cursor": 0}


def test_sessions_as_text(operator: Path) -> None:
    done = command("show", "sessions", "--socket", operator)
    assert len(done.stdout.splitlines()) == 101
    assert "100 sessions; more with --cursor 100" in done.stderr
    assert "\033" not in done.stdout


def test_stats_leave_zeros_out(operator: Path) -> None:
    said = command("show", "stats", "--socket", operator).stdout
    assert "forward" in said
    assert "drop_filtered" not in said
    assert "drop_filtered" in command("show", "stats", "--socket", operator, "--all").stdout


def test_a_wrong_filter_is_a_usage_error(operator: Path) -> None:
    done = command("show", "sessions", "--socket", operator, "--internal", "here", code=2)
    assert "internal: 'here' is not ADDRESS" in done.stderr


def test_a_pipe_that_ends_early_is_no_error_message(operator: Path) -> None:
    show = subprocess.Popen(
        [*CLI, "show", "sessions", "--socket", str(operator), "--limit", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert show.stdout is not None
    assert show.stderr is not None
    assert show.stdout.readline().startswith("protocol")
    show.stdout.close()
    errors = show.stderr.read()
    show.stderr.close()
    show.wait(20)
    assert errors == ""


WITHOUT_A_READER = (["check", "CONFIG"], ["version"], ["show", "stats"], ["show", "sessions", "--limit", "0"])


@pytest.mark.parametrize("arguments", WITHOUT_A_READER)
def test_a_reader_that_has_seen_enough_is_no_failure(
    arguments: list[str], operator: Path, config: Path
) -> None:
    """Whether it closed the pipe before, between or after our lines."""
    options = ["--socket", str(operator)] if arguments[0] == "show" else []
    words = [str(config) if word == "CONFIG" else word for word in arguments]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*CLI, *words, *options], stdout=writing, stderr=subprocess.PIPE, timeout=30)
    os.close(writing)
    assert done.returncode == 0
    assert b"Broken" not in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", WITHOUT_A_READER)
def test_an_output_that_cannot_be_written_is_one_line(
    arguments: list[str], operator: Path, config: Path
) -> None:
    options = ["--socket", str(operator)] if arguments[0] == "show" else []
    words = [str(config) if word == "CONFIG" else word for word in arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*CLI, *words, *options], stdout=full, stderr=subprocess.PIPE, text=True, timeout=30
        )
    assert done.returncode == 1
    assert done.stderr == "tandem-nat: standard output: No space left on device\n"


def test_streams_that_are_closed(config: Path, bad: Path) -> None:
    for path, code in ((config, 0), (bad, 2)):
        done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *CLI, "check", path], timeout=30)
        assert done.returncode == code


def test_check_knows_the_cpus_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "nat.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "workers": {"cores": [1000]}}))
    assert "warning: workers.cores: there is no CPU 1000 here" in command("check", path).stdout
    path.write_text(yaml.safe_dump({**GOOD, "workers": {"cores": [0]}}))
    assert "warning" not in command("check", path).stdout


def test_check_knows_the_drivers_of_the_installed_dpdk(tmp_path: Path) -> None:
    pytest.importorskip("nat_fastpath.dpdk")
    path = tmp_path / "nat.yaml"
    for device, warned in (("net_foo0", True), ("net_memif0", False)):
        internal = {"device": device, "address": "10.0.0.1/24"}
        path.write_text(yaml.safe_dump({**GOOD, "ports": {**GOOD["ports"], "internal": internal}}))
        said = command("check", path).stdout
        assert ("warning: ports.internal.device: the installed DPDK has no driver net_foo" in said) == warned


def test_a_report_that_cannot_be_written_is_known_before_the_demo(tmp_path: Path) -> None:
    done = command("demo", "--json", tmp_path / "none" / "x.json", code=1)
    assert done.stderr == f"tandem-nat: {tmp_path / 'none' / 'x.json'}: No such file or directory\n"
    assert done.stdout == ""


def test_translate_says_where_the_capture_was_cut(config: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.pcap", [(0, outbound()), (1, outbound())])
    source.write_bytes(source.read_bytes()[:-1])
    done = command("translate", source, tmp_path / "out.pcap", "-c", config)
    assert done.stderr == f"tandem-nat: {source}: the file ends in packet 2\n"
    assert "cut" in done.stdout
    answer = json.loads(command("translate", source, tmp_path / "out.pcap", "-c", config, "--json").stdout)
    assert (answer["packets"], answer["cut"]) == (1, f"{source}: the file ends in packet 2")


def test_translate_reads_what_it_is_piped(config: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.pcap", [(0, outbound())])
    done = subprocess.run(
        [*CLI, "translate", "/dev/stdin", tmp_path / "out.pcap", "-c", config, "--json"],
        input=source.read_bytes(),
        capture_output=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written"] == 1


def test_translate_prints_a_summary(config: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.pcap", [(0, outbound()), (1, b"short")])
    said = command("translate", source, tmp_path / "out.pcap", "-c", config).stdout
    assert "forward" in said
    assert "drop_runt" in said
    answer = json.loads(command("translate", source, tmp_path / "out.pcap", "-c", config, "--json").stdout)
    assert answer["verdicts"] == {"forward": 1, "drop_runt": 1}


def test_translate_names_what_it_cannot_read_or_write(config: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.pcap", [(0, outbound())])
    for arguments, named in (
        ((tmp_path / "none.pcap", tmp_path / "out.pcap"), tmp_path / "none.pcap"),
        ((config, tmp_path / "out.pcap"), config),
        ((source, tmp_path / "no" / "out.pcap"), tmp_path / "no" / "out.pcap"),
        ((source, "/dev/full"), "/dev/full"),
    ):
        (line,) = command("translate", *arguments, "-c", config, code=1).stderr.strip().splitlines()
        assert line.startswith(f"tandem-nat: {named}: ")


def test_without_dpdk_the_other_commands_work(config: Path) -> None:
    """As where libdpdk is not installed: the binding raises ImportError."""
    script = (
        "import sys; sys.modules['nat_fastpath.dpdk._dpdk'] = None; from nat_control.cli import main; main()"
    )
    for arguments, code, expected in (
        (["version"], 0, "without DPDK"),
        (["check", str(config)], 0, "good"),
        (["server", str(config)], 1, "built without DPDK"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == code
        assert expected in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
