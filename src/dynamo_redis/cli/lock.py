"""`dynamo-redis lock`: a command that runs while nobody else has the lock."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Mapping, Sequence

import click

from dynamo_redis.child import ChildProcess
from dynamo_redis.cli import connect
from dynamo_redis.cli.options import SettingsCommand, store_options
from dynamo_redis.config import LOCK_TOKEN, child_environment, parse_duration
from dynamo_redis.store.base import LOCK_TTL_S, HeldLock, Lock

_GRACE_S = 5.0
_FOR_EVER_S = float("inf")


def _seconds(ctx: click.Context, param: click.Parameter, value: object) -> object:
    try:
        return parse_duration(value)
    except ValueError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc


@click.command("lock", cls=SettingsCommand, context_settings={"allow_interspersed_args": False})
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--timeout",
    "timeout_s",
    metavar="DURATION",
    callback=_seconds,
    type=click.UNPROCESSED,
    default=_FOR_EVER_S,
    help="Longest wait for whoever has the lock; 0: try once.  [default: as long as it takes]",
)
@click.option(
    "--ttl",
    "ttl_s",
    metavar="DURATION",
    callback=_seconds,
    type=click.UNPROCESSED,
    default=LOCK_TTL_S,
    help=f"The lock outlives this process, if it dies, by so long.  [default: {LOCK_TTL_S:g} s]",
)
@store_options
def lock(name: str, command: tuple[str, ...], timeout_s: float, ttl_s: float, **options: str | None) -> int:
    """Run COMMAND while nobody else has the lock NAME, and end with its exit code.

    The lock is renewed while COMMAND runs. COMMAND is killed, before anybody else can have the lock, when
    the lock is lost or Redis does not answer for most of its TTL. It finds its fencing token, higher than
    that of every holder before, in DYN_LOCK_TOKEN. Its standard input is empty; SIGTERM is passed on to it.
    Should this process itself be stopped (SIGSTOP) past the TTL, COMMAND goes on beside the next holder's
    until it is continued: what must not be written twice has to compare the token.

    \b
    Examples:
      dynamo-redis lock nightly -- ./reindex.sh
      dynamo-redis lock --timeout 0 nightly -- ./reindex.sh
    """

    # click leaves the `--` where it is once the first argument has been read.
    argv = command[1:] if command[0] == "--" else command
    if not argv:
        raise click.UsageError("give a COMMAND to run")

    async def run() -> int:
        async with connect.open_locks(options) as locks:
            return await _run_locked(locks.lock(name, ttl_s=ttl_s), timeout_s, argv)

    return connect.run(run())


async def _run_locked(lock: Lock, timeout_s: float, command: Sequence[str]) -> int:
    """The exit code, as a shell gives it."""
    async with lock.hold(timeout_s=timeout_s) as held:
        environment = child_environment({LOCK_TOKEN: str(held.fencing_token)})
        return await _run_child(held, command, environment)


async def _run_child(held: HeldLock, command: Sequence[str], environment: Mapping[str, str]) -> int:
    child: ChildProcess
    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError):  # Windows
        # Before the child starts: it may make itself known at once, and be ended by that.
        loop.add_signal_handler(signal.SIGTERM, lambda: child.send_signal(signal.SIGTERM))
    try:
        child = ChildProcess.start(command, env=environment)
        try:
            code = await child.wait()
        except asyncio.CancelledError:
            if held.lost:
                child.kill()  # there is no time to ask
                await child.wait()
            else:
                await child.stop(_GRACE_S, number=signal.SIGINT)
            raise
    finally:
        with contextlib.suppress(NotImplementedError):
            loop.remove_signal_handler(signal.SIGTERM)
    return code if code >= 0 else 128 - code
