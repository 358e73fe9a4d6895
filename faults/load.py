"""One process of a run: `python -m faults.load ROLE …`, started by the runner.

It uses the package as its users do, and writes its history. Signals: SIGUSR1, make no new changes; SIGTERM,
end cleanly; SIGUSR2 (workers), hang the event loop. The cause of an unexpected end is in its log.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import logging
import pkgutil
import random
import signal
from pathlib import Path
from typing import Final

import uvloop

import faults.roles
from faults.history import Recorder
from faults.roles.base import Orders, Process

ROLES: Final = tuple(
    module.name for module in pkgutil.iter_modules(faults.roles.__path__) if module.name != "base"
)


def main() -> None:
    """Run a role until SIGTERM."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s.%(msecs)03d %(name)s %(message)s", datefmt="%H:%M:%S"
    )
    orders = _parse()
    uvloop.run(_run(orders))


def _parse() -> Orders:
    parser = argparse.ArgumentParser(prog="python -m faults.load", description=__doc__)
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("--process", required=True, help="its name in the history")
    parser.add_argument("--directory", type=Path, required=True, help="where histories are written")
    parser.add_argument("--url", required=True)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--seed", required=True)
    parser.add_argument("--ttl-s", type=float, default=2.0)
    parser.add_argument("--timeout-s", type=float, default=1.0)
    parser.add_argument("--pace-s", type=float, default=0.03)
    return Orders(**vars(parser.parse_args()))


async def _run(orders: Orders) -> None:
    process = Process(
        orders,
        Recorder(orders.directory, orders.process),
        random.Random(f"{orders.seed} {orders.process}"),
    )
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGUSR1, process.resting.set)
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    role = importlib.import_module(f"faults.roles.{orders.role}")
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await role.run(process)
    finally:
        process.recorder.close()


if __name__ == "__main__":
    main()
