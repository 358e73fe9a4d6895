"""Certificates for tests: authorities and the certificates they sign, in files as a deployment has them."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

_NOW = dt.datetime.now(dt.UTC)
_YEAR = dt.timedelta(days=365)


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate and its key."""

    cert: Path
    key: Path

    def move_to(self, other: Identity) -> None:
        """Replace another identity's files with these."""
        self.key.replace(other.key)
        self.cert.replace(other.cert)


class Authority:
    """Signs certificates; `path` is its own certificate."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self.path = directory / f"{name}.pem"
        self._directory = directory
        self._name = name
        self._issued_count = 0
        self._ca = trustme.CA()
        self._ca.cert_pem.write_to_path(self.path)

    def issue(self, *hosts: str, is_expired: bool = False) -> Identity:
        """Return a certificate for these names and addresses; for 127.0.0.1, if none is given."""
        self._issued_count += 1
        stem = f"{self._name}-{self._issued_count}"
        made = Identity(self._directory / f"{stem}.crt", self._directory / f"{stem}.key")
        end = _NOW - _YEAR if is_expired else _NOW + _YEAR
        leaf = self._ca.issue_cert(*(hosts or ("127.0.0.1",)), not_before=end - 2 * _YEAR, not_after=end)
        leaf.private_key_pem.write_to_path(made.key)
        made.cert.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
        return made

    def settings(self, identity: Identity | None = None, mode: str = "on") -> dict[str, Any]:
        """Return the settings, by field, of a process that trusts this authority and has this identity."""
        found: dict[str, Any] = {"tcp_tls": mode, "tcp_tls_ca": self.path}
        if identity is not None:
            found |= {"tcp_tls_cert": identity.cert, "tcp_tls_key": identity.key}
        return found
