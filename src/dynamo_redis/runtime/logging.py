"""The log set-up of a process: one event a line, to stderr, as text or as JSON.

A line that is written while a request is served names the request and its trace, without its author's doing.
Text that peers have chosen cannot forge a line: control characters are escaped, and the lines of a traceback
are indented.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from datetime import UTC, datetime
from typing import Any, Final

from dynamo_redis.config import RuntimeSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.planes.context import current_request

_LEVELS = {
    "off": logging.CRITICAL + 1,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG,
}

_UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (C0, C1), line and paragraph separators, marks that change the direction of the text
after them (Unicode's Bidi_Control), and halves of characters, which UTF-8 does not have."""


def escaped(text: str) -> str:
    """Return the text with characters that could forge or hide a log line as Python writes them."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text) if _UNSAFE.search(text) else text


class TextFormatter(logging.Formatter):
    """Lines for people: time (UTC), level, process, logger, message, and the request's id."""

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, process: str) -> None:
        super().__init__(
            f"%(asctime)s %(levelname)-7s {process + ' ' if process else ''}%(name)s: %(message)s"
        )

    def converter(self, timestamp: float | None) -> time.struct_time:
        """Return the time as UTC."""
        return time.gmtime(timestamp)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        """Return the line, without a traceback."""
        line, context = escaped(super().formatMessage(record)), current_request.get()
        if context is None or (request_id := escaped(context.id())) in line:
            return line
        return f"{line} [request {request_id}]"

    def formatException(self, ei: Any) -> str:  # noqa: N802 - the base class's name
        """Return a traceback whose lines begin with spaces."""
        return "\n".join(f"  {escaped(line)}" for line in super().formatException(ei).split("\n"))


class JsonFormatter(logging.Formatter):
    """Lines for collectors: one JSON object each, with the names that Dynamo's lines have."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = {"process": process} if process else {}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line. It is ASCII: every other character is escaped."""
        time_of = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
        line: dict[str, Any] = {
            "time": time_of.replace("+00:00", "Z"),
            "level": record.levelname,
            "target": record.name,
            "message": record.getMessage(),
            **self._process,
        }
        context = current_request.get()
        if context is not None:
            line["request_id"] = context.id()
            if context.trace_id is not None:
                line |= {"trace_id": context.trace_id, "span_id": context.span_id}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_level(name: str) -> int:
    """Return the level of `logging` for a `DYN_LOG` level. Raises ConfigError for an unknown one."""
    level = _LEVELS.get(name.strip().lower())
    if level is None:
        raise ConfigError(f"DYN_LOG={name!r}: write one of {', '.join(_LEVELS)}")
    return level


def configure_dynamo_logging(
    service_name: str | None = None,
    worker_id: int | None = None,
    *,
    level: str | None = None,
    settings: RuntimeSettings | None = None,
) -> None:
    """Send the process's logs to stderr, at `level` or else `DYN_LOG`. Call it once, at start.

    Times are UTC. Each line has `service_name` and `worker_id`, if they are given. `DYN_LOG_FORMAT` chooses
    between text and JSON. Other libraries log warnings and errors only, unless the level is debug. Without
    `settings` those of the environment are used. Raises ConfigError for an unknown level.
    """
    settings = settings or RuntimeSettings.load()
    wanted = log_level(level or settings.log)
    process = ":".join(str(part) for part in (service_name, worker_id) if part is not None)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if settings.logs_json else TextFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(wanted if wanted <= logging.DEBUG else max(wanted, logging.WARNING))
    logging.getLogger("dynamo_redis").setLevel(wanted)
