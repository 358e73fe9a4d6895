"""E1 to E3: events a second that are published durably, and consumed with acknowledgements.

Each round of E1 and E3 measures four things one after the other, in turning order: our publisher and
JetStream, each with one event an entry (or message) and with 256. There is one client process and one server
a side.

The two sides of E2 are close. So it is measured apart: three pairs a round, with more events at once, and the
side that begins alternates. Its Redis syncs its file as seldom as JetStream does. Before each measurement
this Redis has rewritten its file, and the kernel has written the pages that both sides left. Otherwise either
work would go on during the next measurement and take a core or the disk from it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

from redis import Redis
from rich.console import Console
from rich.table import Table

from benchmarks.events.jetstream import nats_python, nats_server, sync_interval
from benchmarks.events.workload import BATCH_COUNT
from benchmarks.harness.processes import Driver, driver, redis_server
from benchmarks.harness.report import Measured, median


@dataclass(frozen=True, slots=True)
class Side:
    """A server with its client, the events of a batch, and `count`, the events of one measurement."""

    name: str
    is_ours: bool
    batch_count: int
    count: int
    appendfsync: str = "everysec"


ALIKE_COUNT: Final = 600_000
"""Events of one measurement of E2: about a second, and less than the limit of a stream."""
PAIRS_COUNT: Final = 3
"""Pairs of measurements in a round of E2."""

OURS_SINGLE = Side("Redis, one an entry", True, 1, 10_000)
OURS = Side(f"Redis, {BATCH_COUNT} an entry", True, BATCH_COUNT, 200_000)
RIVAL_SINGLE = Side("JetStream, one a message", False, 1, 20_000)
RIVAL = Side(f"JetStream, {BATCH_COUNT} a message", False, BATCH_COUNT, 200_000)
RIVAL_ALIKE = replace(RIVAL, count=ALIKE_COUNT)
SIDES = (OURS, RIVAL_SINGLE, RIVAL, OURS_SINGLE)
OURS_SYNCED_ALIKE = replace(
    OURS,
    name=f"{OURS.name}, synced as JetStream",
    count=ALIKE_COUNT,
    # Releases without `sync_interval` sync each two minutes: in a short run, only the kernel decides.
    appendfsync="no" if sync_interval() is None else "everysec",
)

_SETTLED_S: Final = 60.0

Rates = dict[Side, list[float]]
"""Events/s of each round."""


def publishing(rounds: int) -> dict[str, Measured]:
    """Measure E1, in events/s."""
    rates = _measure("publish", rounds, SIDES)
    _print("published and confirmed", rates)
    return {"E1": Measured.against(rates[OURS], rates[RIVAL_SINGLE])}


def publishing_alike(rounds: int) -> dict[str, Measured]:
    """Measure E2, in events/s."""
    sides = (OURS_SYNCED_ALIKE, RIVAL_ALIKE)
    rates: Rates = {side: [] for side in sides}
    with ExitStack() as stack:
        nats_url = stack.enter_context(nats_server())
        rival = stack.enter_context(driver(nats_python(), "events.rivals.peers", "jetstream", nats_url))
        settings = {"appendfsync": OURS_SYNCED_ALIKE.appendfsync, "auto-aof-rewrite-percentage": "0"}
        server = stack.enter_context(redis_server(settings=settings))
        ours = stack.enter_context(driver(sys.executable, "events.rivals.peers", "redis", server.url))
        clients = {OURS_SYNCED_ALIKE: ours, RIVAL_ALIKE: rival}
        for client in clients.values():
            client.answer()
        redis = stack.enter_context(Redis.from_url(server.url))
        for side in sides:  # warm-up of both
            _rate(clients[side], "publish", side, side.count // 10)
        for number in range(PAIRS_COUNT * rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                _settle(redis)
                rates[side].append(_rate(clients[side], "publish", side, side.count))
            shown = ", ".join(f"{side.name} {rates[side][-1]:,.0f}" for side in sides)
            print(f"publish pair {number + 1}: {shown} events/s", flush=True)
    return {"E2": Measured.against(rates[OURS_SYNCED_ALIKE], rates[RIVAL_ALIKE])}


def _settle(redis: Redis) -> None:
    """Wait until the work that the last measurement left behind is done."""
    redis.bgrewriteaof()
    deadline = time.monotonic() + _SETTLED_S
    while redis.info("persistence")["aof_rewrite_in_progress"]:
        if time.monotonic() > deadline:
            raise RuntimeError("Redis does not finish rewriting its file")
        time.sleep(0.05)
    os.sync()


def consuming(rounds: int) -> dict[str, Measured]:
    """Measure E3, in events/s."""
    rates = _measure("consume", rounds, SIDES)
    _print("consumed and acknowledged", rates)
    return {"E3": Measured.against(rates[OURS], rates[RIVAL_SINGLE])}


def _measure(operation: str, rounds: int, sides: Sequence[Side]) -> Rates:
    rates: Rates = {side: [] for side in sides}
    with ExitStack() as stack:
        nats_url = stack.enter_context(nats_server())
        rival = stack.enter_context(driver(nats_python(), "events.rivals.peers", "jetstream", nats_url))
        server = stack.enter_context(redis_server())
        ours = stack.enter_context(driver(sys.executable, "events.rivals.peers", "redis", server.url))
        for client in (rival, ours):
            client.answer()
        clients = {side: ours if side.is_ours else rival for side in sides}
        for side in sides:  # warm-up of all
            _rate(clients[side], operation, side, side.count // 10)
        for number in range(rounds):
            turn = number % len(sides)
            for side in (*sides[turn:], *sides[:turn]):
                rates[side].append(_rate(clients[side], operation, side, side.count))
            shown = ", ".join(f"{side.name} {rates[side][-1]:,.0f}" for side in sides)
            print(f"{operation} round {number + 1}: {shown} events/s", flush=True)
    return rates


def _rate(client: Driver, operation: str, side: Side, count: int) -> float:
    client.send(json.dumps([operation, count, side.batch_count]))
    seconds: float = json.loads(client.answer())["seconds"]
    return count / seconds


def _print(title: str, rates: Rates) -> None:
    table = Table(title=f"events/s {title}, medians")
    for column in ("", "one at a time", f"{BATCH_COUNT} together"):
        table.add_column(column, justify="left" if not column else "right")
    rows = (("Redis", OURS_SINGLE, OURS), ("JetStream", RIVAL_SINGLE, RIVAL))
    for name, single, batched in rows:
        table.add_row(name, *(f"{median(rates[side]):,.0f}" for side in (single, batched)))
    Console(width=100).print(table)
