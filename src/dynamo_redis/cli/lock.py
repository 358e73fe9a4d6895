"""`dynamo-redis lock`: a command that runs while it holds a lock."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import click

from dynamo_redis.child import ChildProcess
from dynamo_redis.cli import connect
from dynamo_redis.cli.options import SettingsCommand, duration_value, store_options
from dynamo_redis.config import LOCK_TOKEN, child_environment
from dynamo_redis.store.base import LOCK_TTL_S

_GRACE_S = 5.0
_FOR_EVER_S = float("inf")


@click.command("lock", cls=SettingsCommand, context_settings={"allow_interspersed_args": False})
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--timeout",
    "timeout_s",
    metavar="DURATION",
    callback=duration_value,
    type=click.UNPROCESSED,
    default=_FOR_EVER_S,
    help="Longest wait for the lock while another process holds it; 0: try once.  [default: no limit]",
)
@click.option(
    "--ttl",
    "ttl_s",
    metavar="DURATION",
    callback=duration_value,
    type=click.UNPROCESSED,
    default=LOCK_TTL_S,
    help=f"If this process dies, the lock is free after this time.  [default: {LOCK_TTL_S:g} s]",
)
@store_options
def lock(name: str, command: tuple[str, ...], timeout_s: float, ttl_s: float, **options: str | None) -> int:
    """Run COMMAND while this process holds the lock NAME, and end with COMMAND's exit code.

    The lock is renewed while COMMAND runs. If the lock is lost, or Redis does not answer for most of its
    TTL, COMMAND is killed before another process can have the lock. The variable DYN_LOCK_TOKEN holds the
    fencing token, which is higher than that of every earlier holder. Standard input is empty. SIGTERM is
    passed on to COMMAND. If this process is stopped (SIGSTOP) for longer than the TTL, COMMAND runs beside
    the next holder's command until this process continues: for writes that must not happen twice, compare
    the token.

    \b
    Examples:
      dynamo-redis lock nightly -- ./reindex.sh
      dynamo-redis lock --timeout 0 nightly -- ./reindex.sh
    """

    # click keeps the `--` after the first argument.
    argv = command[1:] if command[0] == "--" else command
    if not argv:
        raise click.UsageError("give a COMMAND to run")

    async def run() -> int:
        async with (
            connect.open_locks(options) as locks,
            locks.lock(name, ttl_s=ttl_s).hold(timeout_s=timeout_s) as held,
        ):
            environment = child_environment({LOCK_TOKEN: str(held.fencing_token)})
            child: ChildProcess
            loop = asyncio.get_running_loop()
            with contextlib.suppress(NotImplementedError):  # Windows
                # Set before the child starts: another process may see the child and send SIGTERM at once.
                loop.add_signal_handler(signal.SIGTERM, lambda: child.send_signal(signal.SIGTERM))
            try:
                child = ChildProcess.start(argv, env=environment)
                try:
                    code = await child.wait()
                except asyncio.CancelledError:
                    if held.lost:
                        child.kill()  # no time for SIGINT: another process may have the lock
                        await child.wait()
                    else:
                        await child.stop(_GRACE_S, number=signal.SIGINT)
                    raise
            finally:
                with contextlib.suppress(NotImplementedError):
                    loop.remove_signal_handler(signal.SIGTERM)
            return code if code >= 0 else 128 - code  # as a shell does

    return connect.run(run())
