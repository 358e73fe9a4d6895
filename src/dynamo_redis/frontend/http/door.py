"""The door of the HTTP port: TLS, web pages of other origins (CORS), and the keys of clients."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
import uuid
from base64 import b64decode
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from dynamo_redis.config import FrontendSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.frontend.apis import errors_of
from dynamo_redis.frontend.forms.base import ErrorForm
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.http.request_body import ClientGone, discard
from dynamo_redis.frontend.http.responses import send_json
from dynamo_redis.frontend.http.tls import http_tls
from dynamo_redis.planes.reloaded import LOOK_S, stamp_of

_PASSWORD: Final = b'Basic realm="An API key is the password"'
_EXPOSED: Final = ("x-request-id", "request-id", "retry-after")
_log = logging.getLogger(__name__)


class Door:
    """The door of one HTTP port, as the settings say."""

    def __init__(self, settings: FrontendSettings, errors_at: Mapping[str, ErrorForm] | None = None) -> None:
        """Read the files of keys and certificates. `errors_at` has the form of errors of paths; others
        have that of `errors_of`. Raises ConfigError."""
        self.tls = http_tls(settings)
        self._keys: ApiKeys | None = None
        if settings.http_api_key is not None or settings.http_api_key_file is not None:
            given = "" if settings.http_api_key is None else settings.http_api_key.get_secret_value()
            self._keys = ApiKeys(given.split(",") if given else (), settings.http_api_key_file)
        self._open_paths = settings.http_open_paths.split(",")
        self._origins = settings.http_cors_origins
        self._errors_at = errors_at or {}

    @property
    def scheme(self) -> str:
        """`https` if the port speaks TLS, else `http`."""
        return "http" if self.tls is None else "https"

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """Return the application behind the door."""
        if self._keys is not None:
            app = KeyCheck(app, self._keys, self._open_paths, self._errors_at)
        if self._origins is not None:
            app = CORSMiddleware(
                app,
                allow_origins=self._origins.split(","),
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=_EXPOSED,
            )
        return app


class ApiKeys:
    """The keys that clients may send. Only their digests are kept."""

    def __init__(self, keys: Iterable[str], file: Path | None) -> None:
        """Read the file. Raises ConfigError if a key cannot be one, or if there is none."""
        self._own = _digests("DYN_HTTP_API_KEY", keys)
        self._file = file
        self._of_file: list[bytes] = []
        if file is not None:
            self._stamp = self._refused = stamp_of([file])
            self._of_file = _read_keys(file)
            self._look_at = time.monotonic() + LOOK_S
        if not (self._own or self._of_file):
            raise ConfigError("DYN_HTTP_API_KEY has no key in it: write one, or leave it out")

    def has(self, key: bytes) -> bool:
        """Return whether a client's key is one of them, in a time that does not depend on the key."""
        if self._file is not None and time.monotonic() >= self._look_at:
            self._look_again(self._file)
        digest = hashlib.sha256(key).digest()
        found = [hmac.compare_digest(digest, own) for own in (*self._own, *self._of_file)]
        return any(found)

    def _look_again(self, file: Path) -> None:
        self._look_at = time.monotonic() + LOOK_S
        stamp = stamp_of([file])
        if stamp in (self._stamp, self._refused):
            return
        try:
            self._of_file = _read_keys(file)
        except ConfigError as exc:
            self._refused = stamp
            _log.error("%s; the keys that it had stay valid", exc)
        else:
            self._stamp = self._refused = stamp
            _log.info("the HTTP port takes up the changed keys of DYN_HTTP_API_KEY_FILE")


class KeyCheck:
    """An application that needs a key on all paths but open ones."""

    def __init__(
        self, app: ASGIApp, keys: ApiKeys, open_paths: Iterable[str], errors_at: Mapping[str, ErrorForm]
    ) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = frozenset(open_paths)
        self._errors_at = errors_at

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request with a key, and refuse one without it. Calls of gRPC have it in their metadata."""
        if scope["type"] == "http" and scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        reads = scope["method"] in ("GET", "HEAD")
        sent = _sent_keys(scope["headers"], takes_passwords=reads)
        if any(map(self._keys.has, sent)):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "The API key is wrong."
            if sent
            else "An API key is needed: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
            kind="authentication_error",
            code="invalid_api_key",
        )
        if scope["type"] == "http" and not any(name == b"expect" for name, _ in scope["headers"]):
            try:
                await discard(receive)  # most clients read no response before they have sent everything
            except ClientGone:
                return
        form = self._errors_at.get(scope["path"]) or errors_of(scope["path"])
        status, body = form.response(error, uuid.uuid4().hex)
        asked = _PASSWORD if reads and scope["path"].startswith("/dashboard") else b"Bearer"
        await send_json(send, status, body, [(b"www-authenticate", asked)])


def _sent_keys(headers: Iterable[tuple[bytes, bytes]], *, takes_passwords: bool) -> list[bytes]:
    """Return the keys of a request, by any header.

    Browsers send a password with each request to a site that asked for one, also with those of other sites'
    pages. So it is taken only where nothing is changed or generated.
    """
    found = []
    for name, value in headers:
        scheme, _, rest = value.partition(b" ")
        if name == b"x-api-key":
            found.append(value)
        elif name == b"authorization" and scheme.lower() == b"bearer":
            found.append(rest.strip())
        elif name == b"authorization" and scheme.lower() == b"basic" and takes_passwords:
            with suppress(ValueError):
                found.append(b64decode(rest, validate=True).partition(b":")[2])
    return found[:2]


def _read_keys(file: Path) -> list[bytes]:
    """Return the digests of a file's keys. Raises ConfigError."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
        raise ConfigError(f"DYN_HTTP_API_KEY_FILE={file}: cannot be read: {reason}") from exc
    keys = [line.partition("#")[0].strip() for line in lines]
    found = _digests("DYN_HTTP_API_KEY_FILE", filter(None, keys))
    if not found:
        raise ConfigError(f"DYN_HTTP_API_KEY_FILE={file}: has no key in it")
    return found


def _digests(setting: str, keys: Iterable[str]) -> list[bytes]:
    stripped = [key.strip() for key in keys]
    if not all(key.isascii() and key.isprintable() and " " not in key and key for key in stripped):
        raise ConfigError(f"{setting}: a key is empty, or has spaces or signs beyond ASCII")
    return [hashlib.sha256(key.encode()).digest() for key in stripped]
