# SPDX-License-Identifier: Apache-2.0
"""Mutual TLS: who has a certificate of the pair's own authority is the peer, nobody else; and of another one, the switch.

TLS 1.3 on the sync channel, 1.2 at least where a switch has no better. Names in certificates mean nothing here, so the authority
must be our own: certificates.py makes one.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path


class TlsError(Exception):
    """A file of the pair's TLS cannot be used, or must not be overwritten; one line."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM: the pair's authority, our certificate, and its key without a passphrase."""

    ca: Path
    certificate: Path
    key: Path


def context(tls: Tls, *, listens: bool, minimum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """TLS of ``minimum`` at least, both ends prove themselves. Raises TlsError that names the file."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if listens else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = minimum
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    for path in (tls.ca, tls.certificate, tls.key):
        try:
            path.read_bytes()
        except OSError as error:
            raise TlsError(f"{path}: {error.strerror}; tandem-nat certs makes such files") from None
    try:
        made.load_verify_locations(tls.ca)
    except ssl.SSLError:
        raise TlsError(f"{tls.ca}: no certificate in PEM") from None
    try:
        made.load_cert_chain(tls.certificate, tls.key, password=_no_passphrase)
    except ssl.SSLError as error:
        mismatch = error.reason == "KEY_VALUES_MISMATCH"
        raise TlsError(
            f"{tls.key}: not the key of {tls.certificate}"
            if mismatch
            else f"{tls.certificate}, {tls.key}: no certificate and key in PEM"
        ) from None
    except TlsError:
        raise TlsError(f"{tls.key}: it has a passphrase, and nobody is there to type it") from None
    return made


def _no_passphrase() -> str:
    raise TlsError


def reason(error: OSError) -> str:
    """Why two ends do not come together, without OpenSSL's or asyncio's own words around it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or str(error)).lower().replace('_', ' ')}"
    return os.strerror(error.errno) if error.errno else str(error)
