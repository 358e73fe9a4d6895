"""TLS of the tcp plane: which certificates, whom they must come from, and taking up new ones.

`DYN_TCP_TLS=on`: a caller takes only a worker whose certificate was signed by an authority in
`DYN_TCP_TLS_CA` and names the host that was dialled (or `DYN_TCP_TLS_SERVER_NAME`). `mutual`: a worker takes
only callers whose certificate was signed by such an authority. TLS 1.3 and nothing older; nothing falls back
to the clear.

An instance says in its address what it speaks: `host:port` in the clear, `host:port+tls`, `host:port+mtls`.
So two that are set differently find out before a byte is sent.

Files are looked at when a connection is made, at most once in `LOOK_S`. Changed ones serve the connections
made from then on; those that cannot be used are named once in the log, and what was read before goes on.
"""

from __future__ import annotations

import logging
import ssl
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from dynamo_redis.clock import SYSTEM_CLOCK, Clock
from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import CannotConnect, ConfigError, ConnectionLost
from dynamo_redis.planes.address import parse_address

LOOK_S: Final = 1.0
"""How long a changed file may go unnoticed while connections are made."""

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

Side = Literal["server", "client"]

_log = logging.getLogger(__name__)


class TlsContext:
    """The TLS context of one side, made of its files and again when they have changed."""

    def __init__(self, settings: PlaneSettings, side: Side, clock: Clock = SYSTEM_CLOCK) -> None:
        """Raises ConfigError, naming the setting, if the files are not there, do not fit or have expired."""
        self._files = _files(settings, side)
        self._side: Side = side
        self._mutual = settings.tcp_tls == "mutual"
        self._clock = clock
        self._seen = self._refused = self._files.stamp()
        self._context = self._make()
        self._look_at = clock.monotonic() + LOOK_S
        if side == "client" and settings.tcp_tls_server_name is not None:
            _check_name(self._context, settings.tcp_tls_server_name)
        self.server_name = settings.tcp_tls_server_name
        """The name to look for in workers' certificates; None: the host that is dialled."""

    @property
    def has_certificate(self) -> bool:
        """Whether this side can show one."""
        return self._files.cert is not None

    @property
    def mark(self) -> str:
        """What a server's address ends with."""
        return f"+{_MUTUAL_TLS if self._mutual else _TLS}"

    def current(self) -> ssl.SSLContext:
        """The context for the next connection."""
        now = self._clock.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._look()
        return self._context

    def _look(self) -> None:
        found = self._files.stamp()
        if found == self._seen:
            return
        try:
            self._context = self._make()
        except ConfigError as exc:
            if found != self._refused:
                self._refused = found
                _log.error("%s; the %s goes on with the certificates it had", exc, self._side)
        else:
            self._seen = self._refused = found
            _log.info("the %s takes up changed certificates", self._side)

    def _make(self) -> ssl.SSLContext:
        files = self._files
        context = _new_context(self._side)
        if self._side == "client" or self._mutual:
            context.verify_mode = ssl.CERT_REQUIRED
            _load_authorities(context, files.ca, self._clock.wall())
        if files.cert is not None and files.key is not None:
            _check_certificate(files.cert, files.key, self._side)
            _load_certificate(context, files.cert, files.key)
        return context


@dataclass(frozen=True, slots=True)
class _Files:
    ca: Path
    cert: Path | None
    key: Path | None

    def stamp(self) -> tuple[object, ...]:
        """Changes when a file does, its permissions and a symbolic link on the way to it included."""
        return tuple(_stamp(path) for path in (self.ca, self.cert, self.key) if path is not None)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def make_tls(settings: PlaneSettings, side: Side) -> TlsContext | None:
    """The context that the settings ask for; None where TLS is off. Raises ConfigError."""
    if settings.tcp_tls != "off":
        return TlsContext(settings, side)
    for env, field in _FIELDS.items():
        if getattr(settings, field) is not None:
            raise ConfigError(
                f"{env} is set and DYN_TCP_TLS is off: set DYN_TCP_TLS to on or mutual, or leave {env} out"
            )
    return None


def dial_options(address: str, tls: TlsContext | None) -> tuple[str, int, dict[str, Any]]:
    """Host, port, and what `create_connection` must know of TLS, for an instance's address.

    Raises CannotConnect if the instance and this process are not set alike, ValueError if it is no address.
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
    """What went wrong with a connection (to the address that was `dialled`, if this side called), in words
    that say what to do where TLS refused it."""
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
    """The files of one side. Raises ConfigError if one is missing."""
    ca, cert, key = settings.tcp_tls_ca, settings.tcp_tls_cert, settings.tcp_tls_key
    mode = f"DYN_TCP_TLS={settings.tcp_tls}"
    if ca is None:
        raise ConfigError(
            f"{mode}: set DYN_TCP_TLS_CA to the PEM file of the authority that signs the certificates"
        )
    if (cert is None) != (key is None):
        there, missing = ("CERT", "KEY") if key is None else ("KEY", "CERT")
        raise ConfigError(
            f"DYN_TCP_TLS_{there} is set and DYN_TCP_TLS_{missing} is not: set both, or neither"
        )
    if cert is None and (side == "server" or settings.tcp_tls == "mutual"):
        who = "a worker" if side == "server" else "a caller"
        raise ConfigError(
            f"{mode}: {who} needs a certificate: set DYN_TCP_TLS_CERT and DYN_TCP_TLS_KEY to PEM files"
        )
    return _Files(ca, cert, key)


def _new_context(side: Side) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if side == "server" else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if side == "server":
        context.num_tickets = 0  # nobody resumes: each connection is checked against the present files
    return context


def _load_authorities(context: ssl.SSLContext, ca: Path, wall_s: float) -> None:
    _check_readable("DYN_TCP_TLS_CA", ca)
    try:
        context.load_verify_locations(cafile=ca)
    except OSError as exc:  # ssl.SSLError is one
        raise ConfigError(f"DYN_TCP_TLS_CA={ca}: holds no certificate that can be read, in PEM") from exc
    ends = [ssl.cert_time_to_seconds(str(found["notAfter"])) for found in context.get_ca_certs()]
    if ends and max(ends) < wall_s:
        raise ConfigError(f"DYN_TCP_TLS_CA={ca}: every authority in it has expired: renew it")


def _load_certificate(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Load a certificate that was found readable. Raises ConfigError about the key."""

    def refuse() -> str:
        raise ConfigError(
            f"DYN_TCP_TLS_KEY={key}: is encrypted: write it without a passphrase, for its owner only"
        )

    try:
        context.load_cert_chain(cert, key, password=refuse)
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"DYN_TCP_TLS_KEY={key}: is not the key of the certificate in {cert}") from exc
        if exc.reason and exc.reason.endswith("KEY_TOO_SMALL"):
            raise ConfigError(f"DYN_TCP_TLS_CERT={cert}: its key is too short to be safe") from exc
        raise ConfigError(f"DYN_TCP_TLS_KEY={key}: holds no private key that can be read, in PEM") from exc
    except OSError as exc:
        raise ConfigError(f"DYN_TCP_TLS_CERT={cert}: cannot be read: {exc.strerror or exc}") from exc


def _check_certificate(cert: Path, key: Path, side: Side) -> None:
    """Find out by a handshake in memory whether the certificate can be shown: the standard library reads no
    expiry and no purpose of a certificate that it does not check. It is checked against itself, because who
    signs this side's need not be who signs the other's."""
    _check_readable("DYN_TCP_TLS_CERT", cert)
    _check_readable("DYN_TCP_TLS_KEY", key)
    server, client = _new_context("server"), _new_context("client")
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE  # until it is the one to check, below; nothing leaves this function
    checking = client if side == "server" else server
    try:
        checking.load_verify_locations(cafile=cert)
    except OSError as exc:  # ssl.SSLError is one
        raise ConfigError(f"DYN_TCP_TLS_CERT={cert}: holds no certificate that can be read, in PEM") from exc
    checking.verify_mode = ssl.CERT_REQUIRED
    checking.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    for context in (server, client):
        _load_certificate(context, cert, key)
    try:
        _shake_hands(server, client)
    except ssl.SSLCertVerificationError as exc:
        raise ConfigError(
            f"DYN_TCP_TLS_CERT={cert}: cannot be used by a {side}: {exc.verify_message}"
        ) from exc
    except ssl.SSLError as exc:
        raise ConfigError(
            f"DYN_TCP_TLS_CERT={cert}: cannot be used by a {side}: {exc.reason or exc}"
        ) from exc


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for side in sides * 2:  # hello, the server's flight, the client's end, the server's
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()


def _check_name(context: ssl.SSLContext, name: str) -> None:
    try:
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=name)
    except ValueError as exc:
        raise ConfigError(f"DYN_TCP_TLS_SERVER_NAME={name!r}: is no host name: {exc}") from exc


def _check_readable(env: str, path: Path) -> None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{env}={path}: is not a file")
        path.open("rb").close()
    except OSError as exc:
        raise ConfigError(f"{env}={path}: cannot be read: {exc.strerror or exc}") from exc
