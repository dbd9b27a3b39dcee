# SPDX-License-Identifier: Apache-2.0
"""The certificates by which the halves of a pair know each other; see tls.py."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nat_control.tls import TlsError

LIFE = datetime.timedelta(days=3650)
EARLIER = datetime.timedelta(days=1)  # clocks of two hosts differ
AUTHORITY = "ca"


def make_certificates(directory: Path, names: tuple[str, ...]) -> list[Path]:
    """An authority of the pair's own and a certificate for each name, as NAME.pem and NAME.key; 10 years, Ed25519.

    The authority's key stays in ``directory`` for more certificates, and is used again if it is there. Raises TlsError, and
    leaves nothing half-done, when a name's file exists.
    """
    wanted = [directory / f"{name}.{kind}" for name in names for kind in ("pem", "key")]
    if there := next((path for path in wanted if path.exists()), None):
        raise TlsError(f"{there} is there already: remove it first, or choose another name")
    files: dict[Path, bytes] = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        authority = _authority(directory, files)
        for name in names:
            key = Ed25519PrivateKey.generate()
            files[directory / f"{name}.pem"] = _pem(_certificate(name, key, authority))
            files[directory / f"{name}.key"] = _private(key)
        _write(files)
    except OSError as error:
        raise TlsError(f"{error.filename or directory}: {error.strerror}") from None
    return list(files)


Authority = tuple[x509.Name, Ed25519PrivateKey]


def _authority(directory: Path, files: dict[Path, bytes]) -> Authority:
    certificate, key = directory / f"{AUTHORITY}.pem", directory / f"{AUTHORITY}.key"
    if certificate.exists() != key.exists():
        lost = key if certificate.exists() else certificate
        raise TlsError(f"{lost} is missing: bring it back, or remove its sister for a new authority")
    if key.exists():
        try:
            private = serialization.load_pem_private_key(key.read_bytes(), None)
            subject = x509.load_pem_x509_certificate(certificate.read_bytes()).subject
        except ValueError:
            raise TlsError(f"{key}: no authority that we made") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise TlsError(f"{key}: no authority that we made")
        return subject, private
    private = Ed25519PrivateKey.generate()
    name = _name(f"tandem-nat pair {os.urandom(4).hex()}")
    files[certificate] = _pem(_certificate(name, private, (name, private)))
    files[key] = _private(private)
    return name, private


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(name: str | x509.Name, key: Ed25519PrivateKey, authority: Authority) -> x509.Certificate:
    """For a name, or the authority's own."""
    issuer, signer = authority
    is_authority = isinstance(name, x509.Name)
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name if isinstance(name, x509.Name) else _name(name))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + LIFE)
        .add_extension(x509.BasicConstraints(is_authority, 0 if is_authority else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .add_extension(_usage(is_authority), critical=True)
    )
    if not is_authority:
        both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(both), critical=False)
    return builder.sign(signer, None)


def _usage(is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(files: dict[Path, bytes]) -> None:
    """All or none."""
    done: list[Path] = []
    try:
        for path, content in files.items():
            mode = 0o600 if path.suffix == ".key" else 0o644
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            done.append(path)
            with open(descriptor, "wb") as file:
                file.write(content)
    except OSError:
        for path in done:
            path.unlink()
        raise
