# SPDX-License-Identifier: Apache-2.0
"""Who may be a peer: certificates of the pair's own authority, over TLS 1.3, and nobody else."""

from __future__ import annotations

import asyncio
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nat_control.certificates import make_certificates
from nat_control.sync import actions as do
from nat_control.tls import Tls, TlsError, context, reason
from tests.sync_pair import Side, until

CLI = [sys.executable, "-m", "nat_control.cli"]


def files(directory: Path, name: str) -> Tls:
    return Tls(directory / "ca.pem", directory / f"{name}.pem", directory / f"{name}.key")


def test_certificates_for_openflow_come_with_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [*CLI, "certs", str(tmp_path), "--openflow"], capture_output=True, text=True, check=True
    )
    *made, command = done.stdout.splitlines()
    assert [Path(line).name for line in made] == [
        "ca.pem", "ca.key", "agent.pem", "agent.key", "ovs.pem", "ovs.key",
    ]  # fmt: skip
    assert command == f"ovs-vsctl set-ssl {tmp_path}/ovs.key {tmp_path}/ovs.pem {tmp_path}/ca.pem"


def test_certificates_are_good_and_keys_are_nobody_elses(tmp_path: Path) -> None:
    done = subprocess.run([*CLI, "certs", str(tmp_path / "new")], capture_output=True, text=True, check=True)
    made = [Path(line) for line in done.stdout.splitlines()]
    assert [path.name for path in made] == [
        "ca.pem",
        "ca.key",
        "server.pem",
        "server.key",
        "switch.pem",
        "switch.key",
    ]
    assert {path.name for path in made if stat.S_IMODE(path.stat().st_mode) != 0o600} == {
        "ca.pem", "server.pem", "switch.pem",
    }  # fmt: skip
    for name in ("server", "switch"):
        checked = subprocess.run(
            ["openssl", "verify", "-x509_strict", "-CAfile", made[0], tmp_path / "new" / f"{name}.pem"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert checked.stdout.endswith(": OK\n")


def test_the_authority_serves_again_and_nothing_is_overwritten(tmp_path: Path) -> None:
    make_certificates(tmp_path, ("server",))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert [path.name for path in make_certificates(tmp_path, ("third",))] == ["third.pem", "third.key"]
    context(files(tmp_path, "third"), listens=True)
    with pytest.raises(TlsError, match=r"server\.pem is there already"):
        make_certificates(tmp_path, ("fourth", "server"))
    assert not (tmp_path / "fourth.pem").exists()
    assert {path: path.read_bytes() for path in before} == before
    (tmp_path / "ca.key").unlink()
    with pytest.raises(TlsError, match=r"ca\.key is missing"):
        make_certificates(tmp_path, ("fifth",))


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    make_certificates(tmp_path, ("a", "b"))
    good = files(tmp_path, "a")
    for broken, message in (
        (
            Tls(tmp_path / "none", good.certificate, good.key),
            "none: No such file or directory; tandem-nat certs",
        ),
        (Tls(good.key, good.certificate, good.key), "a.key: no certificate in PEM"),
        (Tls(good.ca, good.certificate, tmp_path / "b.key"), "b.key: not the key of"),
        (Tls(good.ca, good.key, good.key), "no certificate and key in PEM"),
    ):
        with pytest.raises(TlsError, match=message):
            context(broken, listens=False)
    locked = tmp_path / "locked.key"
    subprocess.run(
        [
            "openssl",
            "pkcs8",
            "-topk8",
            "-in",
            good.key,
            "-out",
            locked,
            "-passout",
            "pass:x",
            "-v2",
            "aes256",
        ],
        check=True,
    )
    with pytest.raises(TlsError, match="has a passphrase"):
        context(Tls(good.ca, good.certificate, locked), listens=False)


async def attempt(port: int, tls: ssl.SSLContext | None) -> str:
    """What becomes of a connection: a handshake of TLS 1.3 ends at the client before the server has decided."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        writer.write(b"x" * 12)
        async with asyncio.timeout(10):
            answer = await reader.read(100)
        writer.transport.abort()
        return "a Hello" if answer else "the end"
    except ssl.SSLError as error:
        return reason(error)
    except OSError as error:
        return type(error).__name__


def test_strangers_are_refused_and_the_peer_is_not(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for directory in (ours, theirs):
        make_certificates(directory, ("server", "switch"))

    async def scene() -> None:
        side = Side(1, listen=0, tls=context(files(ours, "server"), listens=True))
        await until(lambda: side.transport.address is not None)
        assert side.transport.address is not None
        port = side.transport.address[1]
        side.transport.ready()

        stranger = context(files(theirs, "switch"), listens=False)
        assert "the peer's certificate is refused" in await attempt(port, stranger)
        stranger.verify_mode = ssl.CERT_NONE  # it would talk to anybody; we do not
        nameless = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        nameless.check_hostname, nameless.verify_mode = False, ssl.CERT_NONE
        old = context(files(ours, "switch"), listens=False)
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
        for other in (stranger, nameless, old, None):
            assert await attempt(port, other) != "a Hello"

        assert await attempt(port, context(files(ours, "switch"), listens=False)) == "a Hello"

        lost = Side(2, connect=port, tls=context(files(theirs, "switch"), listens=False))
        lost.transport.ready()
        await until(lambda: any(isinstance(action, do.Unreachable) for action in lost.told))
        await asyncio.sleep(0.3)  # more attempts, for the same reason
        told = [action.why for action in lost.told if isinstance(action, do.Unreachable)]
        assert len(told) == 1
        assert told[0].startswith("the peer's certificate is refused: ")
        await lost.end()

        peer = Side(2, connect=port, tls=context(files(ours, "switch"), listens=False))
        peer.transport.ready()
        await until(lambda: side.protocol.state is do.State.OPERATIONAL)
        for one in (peer, side):
            await one.end()

    asyncio.run(scene())
