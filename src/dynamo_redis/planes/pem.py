"""The PEM files of TLS: authorities, certificates and keys, with errors that name the setting."""

from __future__ import annotations

import ssl
import stat
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, Self

from dynamo_redis.errors import ConfigError

Side = Literal["server", "client"]


class PemSettings(NamedTuple):
    """The names of the settings of one purpose, for errors."""

    ca: str
    cert: str
    key: str

    @classmethod
    def of(cls, beginning: str) -> Self:
        """Return the names of settings that begin alike, as `DYN_TCP_TLS_CA` and its like do."""
        return cls(f"{beginning}_CA", f"{beginning}_CERT", f"{beginning}_KEY")


def check_pair(settings: PemSettings, cert: Path | None, key: Path | None) -> None:
    """Raise ConfigError if only one of a certificate and its key is set."""
    if (cert is None) != (key is None):
        there, missing = (settings.cert, settings.key) if key is None else (settings.key, settings.cert)
        raise ConfigError(f"{there} is set and {missing} is not: set both, or neither")


def load_authorities(context: ssl.SSLContext, settings: PemSettings, path: Path) -> None:
    """Load the authorities that may sign the peers' certificates. Raises ConfigError."""
    _check_readable(settings.ca, path)
    try:
        context.load_verify_locations(cafile=path)
    except OSError as exc:  # ssl.SSLError is one
        raise _no_certificate(settings.ca, path) from exc


def load_certificate(
    context: ssl.SSLContext, settings: PemSettings, cert: Path, key: Path, side: Side
) -> None:
    """Load the certificate of one side, and check its expiry and purpose. Raises ConfigError.

    The standard library reads them only of a peer's certificate, so both sides do a handshake in memory. The
    certificate is its own authority there: this side's authority need not be that of the other side.
    """
    _check_readable(settings.cert, cert)
    _check_readable(settings.key, key)
    server, client = new_context("server"), new_context("client")
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE  # unless it is the checking side, below; nothing leaves this function
    checking = client if side == "server" else server
    try:
        checking.load_verify_locations(cafile=cert)
    except OSError as exc:  # ssl.SSLError is one
        raise _no_certificate(settings.cert, cert) from exc
    checking.verify_mode = ssl.CERT_REQUIRED
    checking.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    for each in (server, client, context):
        _load_chain(each, settings, cert, key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        ends = (
            client.wrap_bio(to_client, to_server),
            server.wrap_bio(to_server, to_client, server_side=True),
        )
        for end in ends * 2:  # hello, the server's flight, the client's end, the server's
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    except ssl.SSLCertVerificationError as exc:
        raise ConfigError(
            f"{settings.cert}={cert}: cannot be used by a {side}: {exc.verify_message}"
        ) from exc
    except ssl.SSLError as exc:
        raise ConfigError(f"{settings.cert}={cert}: cannot be used by a {side}: {exc.reason or exc}") from exc


def new_context(side: Side) -> ssl.SSLContext:
    """Return a context without certificates, for TLS 1.3 alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if side == "server" else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if side == "server":
        context.num_tickets = 0  # no session is resumed: each connection is checked against the present files
    return context


def _load_chain(context: ssl.SSLContext, settings: PemSettings, cert: Path, key: Path) -> None:
    """Load a certificate whose files are readable. Raises ConfigError, mostly about the key."""

    def refuse() -> str:
        raise ConfigError(
            f"{settings.key}={key}: is encrypted: write it without a passphrase, for its owner only"
        )

    try:
        context.load_cert_chain(cert, key, password=refuse)
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{settings.key}={key}: is not the key of the certificate in {cert}") from exc
        if exc.reason and exc.reason.endswith("KEY_TOO_SMALL"):
            raise ConfigError(f"{settings.cert}={cert}: its key is too short to be safe") from exc
        raise ConfigError(f"{settings.key}={key}: holds no private key that can be read, in PEM") from exc
    except OSError as exc:
        raise ConfigError(f"{settings.cert}={cert}: cannot be read: {exc.strerror or exc}") from exc


def _check_readable(setting: str, path: Path) -> None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{setting}={path}: is not a file")
        path.open("rb").close()
    except OSError as exc:
        raise ConfigError(f"{setting}={path}: cannot be read: {exc.strerror or exc}") from exc


def _no_certificate(setting: str, path: Path) -> ConfigError:
    return ConfigError(f"{setting}={path}: holds no certificate that can be read, in PEM")
