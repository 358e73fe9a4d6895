"""The log set-up of a process: one line an event, to stderr."""

from __future__ import annotations

import logging
import sys
import time

from dynamo_redis.config import RuntimeSettings
from dynamo_redis.errors import ConfigError

_LEVELS = {
    "off": logging.CRITICAL + 1,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG,
}


class _UtcFormatter(logging.Formatter):
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def converter(self, timestamp: float | None) -> time.struct_time:
        return time.gmtime(timestamp)


def log_level(name: str) -> int:
    """Return the level of `logging` for a `DYN_LOG` level. Raises ConfigError for an unknown one."""
    level = _LEVELS.get(name.strip().lower())
    if level is None:
        raise ConfigError(f"DYN_LOG={name!r}: write one of {', '.join(_LEVELS)}")
    return level


def configure_dynamo_logging(
    service_name: str | None = None, worker_id: int | None = None, *, level: str | None = None
) -> None:
    """Send the process's logs to stderr, at `level` or else `DYN_LOG`. Call it once, at start.

    Times are UTC. Each line has `service_name` and `worker_id`, if they are given. Other libraries log
    warnings and errors only, unless the level is debug. Raises ConfigError for an unknown level.
    """
    wanted = log_level(level or RuntimeSettings.load().log)
    process = ":".join(str(part) for part in (service_name, worker_id) if part is not None)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _UtcFormatter(f"%(asctime)s %(levelname)-7s {process + ' ' if process else ''}%(name)s: %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(wanted if wanted <= logging.DEBUG else max(wanted, logging.WARNING))
    logging.getLogger("dynamo_redis").setLevel(wanted)
