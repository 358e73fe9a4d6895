"""Formatting of sizes and times for people, and of stored values for people and programs. Pure.

Imports only fast modules, because the error path uses it.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from dynamo_redis.names import INSTANCES

HIDDEN = "***"
"""Printed instead of a secret."""

# Greedy up to the last `@` of the word: a password may hold any character, also one that URLs must encode.
_PASSWORD = re.compile(r"([a-z][a-z0-9+.-]*://[^\s:/@]*):[^\s'\"]*@", re.IGNORECASE)
_PASSWORD_ARGUMENT = re.compile(r"([?&](?:\w+_)?password=)[^&\s'\"]+", re.IGNORECASE)

_SECRET_FIELD = re.compile(r"""("secret"\s*:\s*")[^"]*""")

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def redact(text: str) -> str:
    """Mask the passwords of all URLs in a text: `redis://user:***@host:6379`."""
    return _PASSWORD_ARGUMENT.sub(rf"\1{HIDDEN}", _PASSWORD.sub(rf"\1:{HIDDEN}@", text))


def human_size(size_bytes: float) -> str:
    """Return a size as text: `726 B`, `9.5 KiB`, `11 MiB`."""
    if size_bytes < 1024:
        return f"{size_bytes:.0f} B"
    power = 1
    while size_bytes >= 1023.5 * 1024**power and power < len(_UNITS):
        power += 1
    size, unit = size_bytes / 1024**power, _UNITS[power - 1]
    return f"{size:.1f} {unit}" if size < 9.95 else f"{size:.0f} {unit}"


def human_duration(duration_s: float) -> str:
    """Return a duration as text: `0s`, `42s`, `3m 20s`, `2h 5m`, `4d 3h`. A negative one counts as 0."""
    seconds = max(0, int(duration_s))
    if seconds < 60:
        return f"{seconds}s"
    for size_s, name, below_s, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size_s:
            return f"{seconds // size_s}{name} {seconds % size_s // below_s}{below}"
    raise AssertionError("unreachable")


def human_time(epoch_s: float, now_s: float) -> str:
    """Return a time as text in the local time zone: `2026-11-22 08:15:30 (3m 20s ago)`."""
    try:
        local = datetime.fromtimestamp(epoch_s, UTC).astimezone()
    except (ValueError, OverflowError, OSError):
        return f"at {epoch_s:.0f} s"  # outside the range of the calendar
    return f"{local:%Y-%m-%d %H:%M:%S} ({human_duration(now_s - epoch_s)} ago)"


Encoding = Literal["json", "text", "base64"]


@dataclass(frozen=True, slots=True)
class ShownValue:
    """A stored value, decoded: the JSON value if it is JSON, else text, else base64."""

    encoding: Encoding
    value: Any

    def pretty(self) -> str:
        """Return the value for people, on several lines."""
        return (
            json.dumps(self.value, indent=2, ensure_ascii=False) if self.encoding == "json" else self._marked
        )

    def compact(self) -> str:
        """Return the value for people, on one line."""
        if self.encoding == "json":
            return json.dumps(self.value, ensure_ascii=False, separators=(", ", ": "))
        return self._marked.replace("\n", "\\n")

    @property
    def _marked(self) -> str:
        return f"base64:{self.value}" if self.encoding == "base64" else str(self.value)


def show_value(key: str, stored: bytes, *, secrets: bool = False) -> ShownValue:
    """Decode a key's value for showing. The secret of an instance record is masked unless `secrets`."""
    try:
        text = stored.decode()
    except UnicodeDecodeError:
        return ShownValue("base64", base64.b64encode(stored).decode())
    try:
        value = json.loads(text)
        # Python reads values that it cannot write again: infinities, lone surrogates, nesting too deep.
        json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        hides = not secrets and key.startswith(INSTANCES)
        return ShownValue("text", _SECRET_FIELD.sub(rf"\1{HIDDEN}", text) if hides else text)
    if not secrets and key.startswith(INSTANCES) and isinstance(value, dict) and value.get("secret"):
        value = {**value, "secret": HIDDEN}
    return ShownValue("json", value)


def printable(text: str) -> str:
    """Escape control characters: a stored value must not control the user's terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
