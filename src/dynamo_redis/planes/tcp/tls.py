"""TLS of the tcp plane: the certificates, their authorities, and the reload of changed files.

`DYN_TCP_TLS=on`: a caller accepts only a worker whose certificate was signed by an authority in
`DYN_TCP_TLS_CA` and names the dialled host (or `DYN_TCP_TLS_SERVER_NAME`). `mutual`: a worker, too, accepts
only callers whose certificate was signed by such an authority. TLS 1.3 and no older version; no connection
falls back to the clear.

The address of an instance has a mark of its protocol: `host:port` in the clear, `host:port+tls`,
`host:port+mtls`. So a caller with other settings fails before it sends a byte.

The files are checked when a connection is made, at most once in `reloaded.LOOK_S`. Changed files serve the
connections made from then on. If they cannot be used, that is logged once, and the former certificates stay
in use.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dynamo_redis.clock import SYSTEM_CLOCK, Clock
from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import CannotConnect, ConfigError, ConnectionLost
from dynamo_redis.planes.address import parse_address
from dynamo_redis.planes.pem import (
    PemSettings,
    Side,
    check_pair,
    load_authorities,
    load_certificate,
    new_context,
)
from dynamo_redis.planes.reloaded import ReloadedContext

_TLS, _MUTUAL_TLS = "tls", "mtls"
_FIELDS: Final = {
    "DYN_TCP_TLS_CA": "tcp_tls_ca",
    "DYN_TCP_TLS_CERT": "tcp_tls_cert",
    "DYN_TCP_TLS_KEY": "tcp_tls_key",
    "DYN_TCP_TLS_SERVER_NAME": "tcp_tls_server_name",
}
_CERTIFICATE: Final = {  # X509_V_ERR_…: https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/
    18: "is signed by itself and not in DYN_TCP_TLS_CA",
    19: "is not signed by an authority in DYN_TCP_TLS_CA",
    20: "is not signed by an authority in DYN_TCP_TLS_CA",
    62: "does not name the host that was dialled: put it into its subjectAltName, or set "
    "DYN_TCP_TLS_SERVER_NAME to a name that it has",
    64: "does not name the address that was dialled: put it into its subjectAltName, or set "
    "DYN_TCP_TLS_SERVER_NAME to a name that it has",
}

_SETTINGS: Final = PemSettings.of("DYN_TCP_TLS")


class TlsContext(ReloadedContext):
    """The TLS context of one side. It is made from files, and made again when they have changed."""

    def __init__(self, settings: PlaneSettings, side: Side, clock: Clock = SYSTEM_CLOCK) -> None:
        """Read the files. Raises ConfigError, naming the setting, if they are missing, do not fit or have
        expired."""
        self._files = files = _files(settings, side)
        self._side: Side = side
        self._mutual = settings.tcp_tls == "mutual"
        super().__init__((files.ca, files.cert, files.key), side, clock)
        if side == "client" and settings.tcp_tls_server_name is not None:
            name = settings.tcp_tls_server_name
            try:
                self.current().wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=name)
            except ValueError as exc:
                raise ConfigError(f"DYN_TCP_TLS_SERVER_NAME={name!r}: is no host name: {exc}") from exc
        self.server_name = settings.tcp_tls_server_name
        """The name that workers' certificates must have; None: the dialled host."""

    @property
    def has_certificate(self) -> bool:
        """True if this side has a certificate."""
        return self._files.cert is not None

    @property
    def mark(self) -> str:
        """The end of a server's address: `+tls` or `+mtls`."""
        return f"+{_MUTUAL_TLS if self._mutual else _TLS}"

    def _make(self) -> ssl.SSLContext:
        """Make a context from the files. Raises ConfigError."""
        files = self._files
        context = new_context(self._side)
        if self._side == "client" or self._mutual:
            context.verify_mode = ssl.CERT_REQUIRED
            load_authorities(context, _SETTINGS, files.ca)
            ends = [ssl.cert_time_to_seconds(str(found["notAfter"])) for found in context.get_ca_certs()]
            if ends and max(ends) < self._clock.wall():
                raise ConfigError(f"DYN_TCP_TLS_CA={files.ca}: every authority in it has expired: renew it")
        if files.cert is not None and files.key is not None:
            load_certificate(context, _SETTINGS, files.cert, files.key, self._side)
        return context


@dataclass(frozen=True, slots=True)
class _Files:
    ca: Path
    cert: Path | None
    key: Path | None


def make_tls(settings: PlaneSettings, side: Side) -> TlsContext | None:
    """Make the context for the settings; None where TLS is off. Raises ConfigError."""
    if settings.tcp_tls != "off":
        return TlsContext(settings, side)
    for env, field in _FIELDS.items():
        if getattr(settings, field) is not None:
            raise ConfigError(
                f"{env} is set and DYN_TCP_TLS is off: set DYN_TCP_TLS to on or mutual, or leave {env} out"
            )
    return None


def dial_options(address: str, tls: TlsContext | None) -> tuple[str, int, dict[str, Any]]:
    """Return host, port, and `create_connection`'s TLS options for an instance's address.

    Raises CannotConnect if the TLS settings of the instance and of this process differ, ValueError if it is
    no address.
    """
    address, _, mark = address.partition("+")
    if mark not in ("", _TLS, _MUTUAL_TLS):
        raise ValueError(f"what is +{mark}? This release knows +{_TLS} and +{_MUTUAL_TLS}")
    host, port = parse_address(address)
    if tls is None:
        if mark:
            raise CannotConnect(
                f"cannot connect to {address}: it speaks TLS, and this process does not: set DYN_TCP_TLS=on "
                "and DYN_TCP_TLS_CA"
            )
        return host, port, {}
    if not mark:
        raise CannotConnect(
            f"cannot connect to {address}: it does not speak TLS, and DYN_TCP_TLS is set here: set it there"
        )
    if mark == _MUTUAL_TLS and not tls.has_certificate:
        raise CannotConnect(
            f"cannot connect to {address}: it asks callers for a certificate: set DYN_TCP_TLS_CERT and "
            "DYN_TCP_TLS_KEY"
        )
    return host, port, {"ssl": tls.current(), "server_hostname": tls.server_name or host.partition("%")[0]}


def explain(error: Exception, dialled: str = "") -> str:
    """Describe the failure of a connection, and the remedy where TLS refused it.

    `dialled` is the address, if this side called.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = _CERTIFICATE.get(error.verify_code, f"is refused: {error.verify_message}")
        return f"the other side's certificate {reason}"
    if isinstance(error, ssl.SSLError):
        if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return "the other side shows no certificate: set DYN_TCP_TLS_CERT and DYN_TCP_TLS_KEY there"
        if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            return "the other side does not speak TLS: set DYN_TCP_TLS there"
        return f"TLS failed: {error.reason or error}"
    reason = str(error) or type(error).__name__
    if isinstance(error, ConnectionLost | ConnectionResetError) and dialled.endswith(f"+{_MUTUAL_TLS}"):
        # In TLS 1.3 the caller's handshake is over before the worker looks at its certificate.
        return f"{reason}; if it refuses this side's certificate, its log says why"
    return reason


# --------------------------------------------------------------------------- files to contexts


def _files(settings: PlaneSettings, side: Side) -> _Files:
    """Return the files of one side. Raises ConfigError if one is missing."""
    ca, cert, key = settings.tcp_tls_ca, settings.tcp_tls_cert, settings.tcp_tls_key
    mode = f"DYN_TCP_TLS={settings.tcp_tls}"
    if ca is None:
        raise ConfigError(
            f"{mode}: set DYN_TCP_TLS_CA to the PEM file of the authority that signs the certificates"
        )
    check_pair(_SETTINGS, cert, key)
    if cert is None and (side == "server" or settings.tcp_tls == "mutual"):
        who = "a worker" if side == "server" else "a caller"
        raise ConfigError(
            f"{mode}: {who} needs a certificate: set DYN_TCP_TLS_CERT and DYN_TCP_TLS_KEY to PEM files"
        )
    return _Files(ca, cert, key)
