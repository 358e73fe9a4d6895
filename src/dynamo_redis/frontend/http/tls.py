"""TLS of the HTTP port."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

from dynamo_redis.config import FrontendSettings
from dynamo_redis.planes.pem import PemSettings, check_pair, load_certificate
from dynamo_redis.planes.reloaded import ReloadedContext

_SETTINGS: Final = PemSettings("", "DYN_TLS_CERT_PATH", "DYN_TLS_KEY_PATH")


class HttpTls(ReloadedContext):
    """The certificate of the HTTP port. Clients may use TLS 1.2 and 1.3."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Read the files. Raises ConfigError, which names the setting, if they cannot be used."""
        self._cert = cert
        self._key = key
        super().__init__((cert, key), "HTTP port")

    def _make(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        load_certificate(context, _SETTINGS, self._cert, self._key, "server")
        return context


def http_tls(settings: FrontendSettings) -> HttpTls | None:
    """Return the certificate of the HTTP port; None: HTTP in the clear. Raises ConfigError."""
    cert, key = settings.tls_cert_path, settings.tls_key_path
    check_pair(_SETTINGS, cert, key)
    return None if cert is None or key is None else HttpTls(cert, key)
