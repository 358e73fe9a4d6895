"""The origins of users and passwords that change: files, and providers of tokens that end.

No message holds a password: an error of a provider is shown without its long words, since a part of a token
may be among them.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import importlib
import inspect
import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from dynamo_redis.config import RedisLogin
from dynamo_redis.errors import ConfigError
from dynamo_redis.store.redis.server_errors import RouteError, one_line

FILE_CHECK_S: Final = 1.0
"""Interval at which files are read."""
UNKNOWN_END_CHECK_S: Final = 60.0
"""Interval at which a provider is asked that does not say when its credentials end."""
MOST_CALLS_COUNT: Final = 3
"""Calls of a provider that may hang at a time. Then it is not called until one of them has ended."""

_MOST_BYTES: Final = 64 << 10
_LONG_WORD: Final = re.compile(r"[^\s'\"]{24,}")
_SHOWN_LENGTH: Final = 200


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and a password. `expires_at`: their end, in seconds since 1970; None if it is not known."""

    username: str | None
    password: str = field(repr=False)
    expires_at: float | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The arguments of AUTH."""
        return (self.username, self.password) if self.username else (self.password,)


class Origin(ABC):
    """Where credentials come from. `name` is for messages.

    `on_change`: set by the user of this object; called, from any thread, with credentials that the origin
    brings by itself.
    """

    check_s: float
    """Interval at which it is asked for credentials without a known end."""
    on_change: Callable[[Credentials], None] = staticmethod(lambda _: None)

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    async def read(self) -> Credentials:
        """Return the present credentials. Raises an exception of any kind, or hangs until it is cancelled."""


class FileOrigin(Origin):
    """Files, as Kubernetes mounts them from a Secret."""

    check_s = FILE_CHECK_S

    def __init__(self, login: RedisLogin) -> None:
        super().__init__(login.origin)
        self._login = login

    async def read(self) -> Credentials:
        """Read the files. Raises RouteError for one that cannot be read or is empty."""
        login = self._login
        assert login.password_file is not None
        username = login.username if login.username_file is None else _content(login.username_file)
        password = _content(login.password_file)
        return Credentials(username, password, end_of_token(password))


def _content(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES).decode().strip("\r\n")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise RouteError(f"{path} cannot be read: {reason}") from None
    if not text:
        raise RouteError(f"{path} is empty")
    return text


class ProviderOrigin(Origin):
    """An object that gives credentials: a function, or a `CredentialProvider` of redis-py.

    Each call has a thread of its own, which ends with the process if the call hangs. An async function runs
    in an event loop of that thread.
    """

    check_s = UNKNOWN_END_CHECK_S

    def __init__(self, login: RedisLogin) -> None:
        """Raises ConfigError if there is no such object."""
        super().__init__(login.origin)
        self._username = login.username
        self._lock = threading.Lock()
        self._calls_count = 0
        made = _load(login.provider or "")
        if inspect.isclass(made):
            made = _made(made, self.name)
        if hasattr(made, "get_credentials"):
            self._call: Callable[[], Any] = _get_of(made)
            if hasattr(made, "on_next"):
                made.on_next(self._take)
                made.on_error(lambda _: None)  # it tries again, and so does this
        elif callable(made):
            self._call = made
        else:
            raise ConfigError(f"{self.name} is neither a function nor a CredentialProvider of redis-py")

    async def read(self) -> Credentials:
        """Call the provider. Raises what it raises, and RouteError for an answer that cannot be used."""
        return self._credentials(await self._called())

    async def _called(self) -> Any:
        """Return the answer of a call in a thread. Cancelling it leaves the thread to itself."""
        with self._lock:
            if self._calls_count >= MOST_CALLS_COUNT:
                raise RouteError(f"{MOST_CALLS_COUNT} calls of it hang")
            self._calls_count += 1
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def finish(value: Any, error: BaseException | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(value)

        def call() -> None:
            value: Any = None
            error: BaseException | None = None
            try:
                value = self._call()
                if inspect.isawaitable(value):
                    value = asyncio.run(_awaited(value))
            except BaseException as exc:  # noqa: BLE001 - the caller gets it
                error = exc if isinstance(exc, Exception) else RouteError(type(exc).__name__)
            finally:
                with self._lock:
                    self._calls_count -= 1
            if not loop.is_closed():
                loop.call_soon_threadsafe(finish, value, error)

        threading.Thread(target=call, name="credentials of Redis", daemon=True).start()
        return await answer

    def _credentials(self, answer: Any) -> Credentials:
        """Read an answer: a password, (user, password), or (user, password, end). Raises RouteError."""
        parts = (answer,) if isinstance(answer, str) else tuple(answer) if isinstance(answer, tuple) else ()
        if len(parts) == 1:
            parts = (None, *parts)
        username, password, *rest = (*parts, None, None)[: max(2, len(parts))]
        end = rest[0] if rest else None
        if (
            not isinstance(password, str)
            or not password
            or not isinstance(username, str | None)
            or not isinstance(end, int | float | None)
            or len(rest) > 1
        ):
            raise RouteError("its answer is not (user, password) or (user, password, end in s since 1970)")
        return Credentials(username or self._username, password, end or end_of_token(password))

    def _take(self, token: Any) -> None:
        """Take a token that a streaming provider brings."""
        value, end_ms = token.get_value(), token.get_expires_at_ms()
        user = token.try_get("oid")
        self.on_change(Credentials(user or self._username, value, end_ms / 1e3 if end_ms > 0 else None))


async def _awaited(value: Any) -> Any:
    return await value


def _load(name: str) -> Any:
    """Return the object `module:name`. Raises ConfigError."""
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ConfigError("DYN_REDIS_CREDENTIALS must be module:name, for example my_tokens:redis_token")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as exc:
        raise ConfigError(f"DYN_REDIS_CREDENTIALS: {name} cannot be imported: {shown_failure(exc)}") from exc
    return found


def _made(kind: type, name: str) -> Any:
    try:
        return kind()
    except Exception as exc:
        raise ConfigError(f"{name} cannot be made: {shown_failure(exc)}") from exc


def _get_of(provider: Any) -> Callable[[], Any]:
    """Return the method of a redis-py provider that is its own: the base class's waits or raises."""
    from redis.credentials import CredentialProvider

    own = getattr(type(provider), "get_credentials", None)
    if own is not None and own is not CredentialProvider.get_credentials:
        found: Callable[[], Any] = provider.get_credentials
    else:
        found = provider.get_credentials_async
    return found


def shown_failure(exc: BaseException) -> str:
    """Return an exception for messages, without long words: a part of a token may be among them."""
    if isinstance(exc, RouteError):
        return str(exc)
    if isinstance(exc, TimeoutError):
        return "it does not answer in time"
    text = _LONG_WORD.sub("…", one_line(exc))[:_SHOWN_LENGTH]
    return f"{type(exc).__name__}: {text}"


# ---------------------------------------------------------------------- ends of tokens


def end_of_token(password: str) -> float | None:
    """Return the end of a password that tells it, in seconds since 1970, else None.

    A JSON Web Token has it as `exp` (RFC 7519), a presigned request of AWS as X-Amz-Date and
    X-Amz-Expires."""
    if password.count(".") == 2 and password.startswith("ey"):
        return _end_of_jwt(password.split(".")[1])
    if "X-Amz-Expires=" in password:
        return _end_of_presigned(password)
    return None


def _end_of_jwt(part: str) -> float | None:
    try:
        claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        return float(claims["exp"])
    except (binascii.Error, ValueError, KeyError, TypeError):
        return None


def _end_of_presigned(request: str) -> float | None:
    try:
        query = parse_qs(urlsplit(request if "://" in request else f"http://{request}").query)
        begin = datetime.strptime(query["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        return begin.timestamp() + int(query["X-Amz-Expires"][0])
    except (ValueError, KeyError):
        return None
