"""A worker on a host that can be switched off: from then on it refuses nothing and answers nothing.

As root the host is a network namespace, joined to this one by a cable (a veth pair) whose far end is taken
down: packets vanish, and addresses are no longer resolved. Redis is on a unix socket, so the worker's lease
goes on, and only the client's own checks can detect the fault. Without the rights for that the worker is
frozen (SIGSTOP); then its kernel still acknowledges packets.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.harness.processes import ECHOES, running

WORKER = [sys.executable, str(ECHOES / "echo_worker.py"), "dynamo_redis.runtime"]


@dataclass(frozen=True, slots=True)
class Host:
    """The host of the worker, with its power switch."""

    kind: str
    switch_off: Callable[[], None]
    switch_on: Callable[[], None]


@contextmanager
def powerless_worker(environment: dict[str, str]) -> Iterator[Host]:
    """Run an echo worker whose host can be switched off and on, until the block ends."""
    if os.geteuid() == 0 and shutil.which("ip"):
        with _namespace() as (name, address):
            command = ["ip", "netns", "exec", name, *WORKER]
            with running(command, {**environment, "DYN_TCP_RPC_HOST": address}):
                yield Host(
                    "network namespace, link down",
                    lambda: _ip("-n", name, "link", "set", "far", "down"),
                    lambda: _ip("-n", name, "link", "set", "far", "up"),
                )
    else:
        with running(WORKER, environment) as process:
            try:
                yield Host(
                    "process frozen (not root)",
                    lambda: process.send_signal(signal.SIGSTOP),
                    lambda: process.send_signal(signal.SIGCONT),
                )
            finally:
                process.send_signal(signal.SIGCONT)


@contextmanager
def _namespace() -> Iterator[tuple[str, str]]:
    """Make a network namespace one cable away, and yield its name and its address."""
    name = f"bench-{os.getpid()}"
    near, network = f"veth{os.getpid()}"[:15], f"10.213.{os.getpid() % 256}"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", near, "type", "veth", "peer", "name", "far", "netns", name)
        _ip("address", "add", f"{network}.1/30", "dev", near)
        _ip("link", "set", near, "up")
        _ip("-n", name, "address", "add", f"{network}.2/30", "dev", "far")
        _ip("-n", name, "link", "set", "far", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        yield name, f"{network}.2"
    finally:
        _ip("netns", "delete", name)  # this removes both ends of the cable


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
