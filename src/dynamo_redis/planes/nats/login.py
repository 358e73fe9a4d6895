"""The login at a NATS server, and TLS to it.

With `tls://`, or any `NATS_TLS_` setting, this process sends nothing but over TLS, to a server whose
certificate an authority in `NATS_TLS_CA` has signed (of the system, where that is unset).
"""

from __future__ import annotations

import ssl
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import nats.errors
from nats.aio.client import Client, RawCredentials

from dynamo_redis.config import PlaneSettings, env_name
from dynamo_redis.errors import ConfigError
from dynamo_redis.planes.pem import PemSettings, check_pair, load_authorities, load_certificate

_SETTINGS: Final = PemSettings.of("NATS_TLS")
_SCHEMES: Final = ("nats", "tls")
_CREDENTIALS_PARTS: Final = ("-----BEGIN NATS USER JWT-----", "-----BEGIN USER NKEY SEED-----")
_NEEDS_CERTIFICATE: Final = "it asks for a certificate: set NATS_TLS_CERT and NATS_TLS_KEY"
_REFUSED_CERTIFICATE: Final = frozenset(
    {
        "SSLV3_ALERT_BAD_CERTIFICATE",
        "SSLV3_ALERT_CERTIFICATE_EXPIRED",
        "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
        "TLSV1_ALERT_UNKNOWN_CA",
        "TLSV13_ALERT_CERTIFICATE_REQUIRED",
    }
)
"""Reasons by which OpenSSL says that the server refuses this side's certificate, or asks for one."""


class SafeClient(Client):
    """A client that logs in over TLS, or not at all, if it has options for TLS.

    The library's own logs in without TLS where a server offers none.
    """

    has_certificate = False
    has_connected = False
    """True once its first connection was made."""

    def _connect_command(self) -> Any:
        if "tls" in self.options and not self._server_info.get("tls_required"):
            raise nats.errors.Error(
                "it offers no TLS, and the settings ask for it: set up TLS there, or write nats:// in "
                "NATS_SERVER and leave the settings NATS_TLS_… out"
            )
        if self._server_info.get("tls_verify") and not self.has_certificate:
            # It may close the connection before the reason is read.
            raise nats.errors.Error(_NEEDS_CERTIFICATE)
        return super()._connect_command()


def check_server(settings: PlaneSettings) -> str:
    """Return the server's URL without a password, for messages. Raises ConfigError."""
    try:
        parts = urlsplit(settings.nats_url)
        if parts.scheme in _SCHEMES and parts.hostname and parts.port != 0:
            return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    except ValueError:
        pass
    raise ConfigError("NATS_SERVER is not nats://[user:password@]host:port, or tls://… for TLS")


def login_options(settings: PlaneSettings) -> dict[str, Any]:
    """Return the client's options that log in, over TLS if the settings ask for it. Raises ConfigError."""
    _check_ways(settings)
    options: dict[str, Any] = {}
    if settings.nats_username is not None and settings.nats_password is not None:
        options["user"] = settings.nats_username
        options["password"] = settings.nats_password.get_secret_value()
    if settings.nats_token is not None:
        options["token"] = settings.nats_token.get_secret_value()
    if settings.nats_nkey is not None:
        options["nkeys_seed_str"] = settings.nats_nkey.get_secret_value()
    if settings.nats_credentials_file is not None:
        options["user_credentials"] = RawCredentials(_read_credentials(settings.nats_credentials_file))
    if (context := _make_context(settings)) is not None:
        options["tls"] = context
    return options


def _check_ways(settings: PlaneSettings) -> None:
    """Check that one way to log in is set, or none. Raises ConfigError."""
    if (settings.nats_username is None) != (settings.nats_password is None):
        there, missing = (
            ("USERNAME", "PASSWORD") if settings.nats_password is None else ("PASSWORD", "USERNAME")
        )
        raise ConfigError(f"NATS_AUTH_{there} is set and NATS_AUTH_{missing} is not: set both, or neither")
    fields = ("nats_username", "nats_token", "nats_nkey", "nats_credentials_file")
    ways = [env_name(PlaneSettings.model_fields[one]) for one in fields if getattr(settings, one) is not None]
    if len(ways) > 1:
        raise ConfigError(f"{' and '.join(ways)} are set: the login at NATS takes one of them")
    if (settings.nats_nkey or settings.nats_credentials_file) and find_spec("nkeys") is None:
        raise ConfigError(f"{ways[0]} needs nkeys: pip install 'dynamo-redis[planes]'")
    if settings.nats_nkey is not None:
        import nkeys

        try:
            nkeys.from_seed(bytearray(settings.nats_nkey.get_secret_value().strip().encode())).wipe()
        except Exception as exc:  # noqa: BLE001 - of several libraries; its text may show the seed
            raise ConfigError(f"NATS_AUTH_NKEY is no seed of an NKey ({type(exc).__name__})") from None


def _read_credentials(path: Path) -> str:
    """Return a credentials file's text. Raises ConfigError."""
    setting = f"NATS_AUTH_CREDENTIALS_FILE={path}"
    try:
        text = path.read_text("utf-8")
    except OSError as exc:
        raise ConfigError(f"{setting}: cannot be read: {exc.strerror or exc}") from exc
    except ValueError as exc:
        raise ConfigError(f"{setting}: is not text") from exc
    # The client would search for them for ever.
    if not all(f"{part}\n" in text.replace("\r\n", "\n") for part in _CREDENTIALS_PARTS):
        raise ConfigError(f"{setting}: does not have both parts, a JWT and the seed of an NKey")
    return text


def _make_context(settings: PlaneSettings) -> ssl.SSLContext | None:
    """Make the context of TLS; None where no setting asks for it. Raises ConfigError."""
    ca, cert, key = settings.nats_tls_ca, settings.nats_tls_cert, settings.nats_tls_key
    if ca is None and cert is None and key is None and urlsplit(settings.nats_url).scheme != "tls":
        return None
    check_pair(_SETTINGS, cert, key)
    context = ssl.create_default_context() if ca is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca is not None:
        load_authorities(context, _SETTINGS, ca)
    if cert is not None and key is not None:
        load_certificate(context, _SETTINGS, cert, key, "client")
    return context


def explain(error: BaseException, settings: PlaneSettings) -> str:
    """Describe why a connection failed, and the remedy where TLS refused it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in (18, 19, 20, 21):  # X509_V_ERR_…: signed by none of the authorities
            remedy = "is not signed by an authority in NATS_TLS_CA"
            return f"its certificate {remedy}{'' if settings.nats_tls_ca else ', which is unset'}"
        return f"its certificate is refused: {error.verify_message.rstrip('.')} (NATS_SERVER, NATS_TLS_CA)"
    if isinstance(error, ssl.SSLError):
        if error.reason in _REFUSED_CERTIFICATE:
            if settings.nats_tls_cert is None:
                return _NEEDS_CERTIFICATE
            return "it refuses the certificate in NATS_TLS_CERT"
        return f"TLS failed: {error.reason or error}"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    if settings.nats_tls_cert is not None and not isinstance(error, nats.errors.Error):
        # In TLS 1.3 this side's handshake is over before the server looks at its certificate.
        return f"{reason}; if it refuses the certificate in NATS_TLS_CERT, its log says why"
    return reason
