"""E1 to E3: how many events a second are published durably, and consumed with acknowledgements.

Each round measures four things one after the other, in turning order: our publisher and JetStream, each with
one event an entry (or message) and with 256. One client process a side, one server a side. Publishing has a
fifth for E2: our publisher at a Redis that syncs its file as seldom as JetStream does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from benchmarks.event_workload import BATCH_COUNT
from benchmarks.jetstream import nats_python, nats_server, sync_interval
from benchmarks.processes import Driver, driver, redis_server
from benchmarks.report import Measured, median


@dataclass(frozen=True, slots=True)
class Side:
    """A server with its client, and how many events make a batch there. `count` are measured at once."""

    name: str
    is_ours: bool
    batch_count: int
    count: int
    appendfsync: str = "everysec"


OURS_SINGLE = Side("Redis, one an entry", True, 1, 10_000)
OURS = Side(f"Redis, {BATCH_COUNT} an entry", True, BATCH_COUNT, 200_000)
RIVAL_SINGLE = Side("JetStream, one a message", False, 1, 20_000)
RIVAL = Side(f"JetStream, {BATCH_COUNT} a message", False, BATCH_COUNT, 200_000)
SIDES = (OURS, RIVAL_SINGLE, RIVAL, OURS_SINGLE)
OURS_SYNCED_ALIKE = replace(
    OURS,
    name=f"{OURS.name}, synced as JetStream",
    # Releases that cannot be told when to sync do it each two minutes: when the kernel likes, for a run.
    appendfsync="no" if sync_interval() is None else "everysec",
)

Rates = dict[Side, list[float]]
"""Events/s of each round."""


def publishing(rounds: int) -> dict[str, Measured]:
    """E1 and E2, in events/s."""
    rates = _measure("publish", rounds, (*SIDES, OURS_SYNCED_ALIKE))
    _print("published and confirmed", rates)
    return {
        "E1": Measured.against(rates[OURS], rates[RIVAL_SINGLE]),
        "E2": Measured.against(rates[OURS_SYNCED_ALIKE], rates[RIVAL]),
    }


def consuming(rounds: int) -> dict[str, Measured]:
    """E3, in events/s."""
    rates = _measure("consume", rounds, SIDES)
    _print("consumed and acknowledged", rates)
    return {"E3": Measured.against(rates[OURS], rates[RIVAL_SINGLE])}


def _measure(operation: str, rounds: int, sides: Sequence[Side]) -> Rates:
    rates: Rates = {side: [] for side in sides}
    with ExitStack() as stack:
        clients: dict[Side, Driver] = {}
        ours: dict[str, Driver] = {}
        nats_url = stack.enter_context(nats_server())
        rival = stack.enter_context(driver(nats_python(), "event_peers", "event_jetstream", nats_url))
        for synced in {side.appendfsync: None for side in sides}:
            server = stack.enter_context(redis_server(settings={"appendfsync": synced}))
            ours[synced] = stack.enter_context(
                driver(sys.executable, "event_peers", "event_redis", server.url)
            )
        for client in (rival, *ours.values()):
            client.answer()
        for side in sides:  # warms all up
            clients[side] = ours[side.appendfsync] if side.is_ours else rival
            _rate(clients[side], operation, side, side.count // 10)
        for number in range(rounds):
            turn = number % len(sides)
            for side in (*sides[turn:], *sides[:turn]):
                rates[side].append(_rate(clients[side], operation, side, side.count))
            told = ", ".join(f"{side.name} {rates[side][-1]:,.0f}" for side in sides)
            print(f"{operation} round {number + 1}: {told} events/s", flush=True)
    return rates


def _rate(client: Driver, operation: str, side: Side, count: int) -> float:
    client.say(json.dumps([operation, count, side.batch_count]))
    seconds: float = json.loads(client.answer())["seconds"]
    return count / seconds


def _print(title: str, rates: Rates) -> None:
    table = Table(title=f"events/s {title}, medians")
    for column in ("", "one at a time", f"{BATCH_COUNT} together"):
        table.add_column(column, justify="left" if not column else "right")
    rows: list[tuple[str, Side | None, Side]]
    rows = [("Redis", OURS_SINGLE, OURS), ("JetStream", RIVAL_SINGLE, RIVAL)]
    if OURS_SYNCED_ALIKE in rates:
        rows.insert(1, (f"Redis, appendfsync {OURS_SYNCED_ALIKE.appendfsync}", None, OURS_SYNCED_ALIKE))
    for name, single, batched in rows:
        shown = ("" if side is None else f"{median(rates[side]):,.0f}" for side in (single, batched))
        table.add_row(name, *shown)
    Console(width=100).print(table)
