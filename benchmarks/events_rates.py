"""E1 to E3: how many events a second are published durably, and consumed with acknowledgements.

Each round measures four things one after the other, in turning order: our publisher and JetStream, each with
one event an entry (or message) and with 256. One client process a side, one server a side.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.event_workload import BATCH_COUNT
from benchmarks.jetstream import nats_python, nats_server
from benchmarks.processes import Driver, driver, redis_server
from benchmarks.report import Measured, median


@dataclass(frozen=True, slots=True)
class Side:
    """A server with its client, and how many events make a batch there. `count` are measured at once."""

    name: str
    is_ours: bool
    batch_count: int
    count: int


OURS_SINGLE = Side("Redis, one an entry", True, 1, 10_000)
OURS = Side(f"Redis, {BATCH_COUNT} an entry", True, BATCH_COUNT, 200_000)
RIVAL_SINGLE = Side("JetStream, one a message", False, 1, 20_000)
RIVAL = Side(f"JetStream, {BATCH_COUNT} a message", False, BATCH_COUNT, 200_000)
SIDES = (OURS, RIVAL_SINGLE, RIVAL, OURS_SINGLE)

Rates = dict[Side, list[float]]
"""Events/s of each round."""


def publishing(rounds: int) -> dict[str, Measured]:
    """E1 and E2, in events/s."""
    rates = _measure("publish", rounds)
    _print("published and confirmed", rates)
    return {
        "E1": Measured.against(rates[OURS], rates[RIVAL_SINGLE]),
        "E2": Measured.against(rates[OURS], rates[RIVAL]),
    }


def consuming(rounds: int) -> dict[str, Measured]:
    """E3, in events/s."""
    rates = _measure("consume", rounds)
    _print("consumed and acknowledged", rates)
    return {"E3": Measured.against(rates[OURS], rates[RIVAL_SINGLE])}


def _measure(operation: str, rounds: int) -> Rates:
    rates: Rates = {side: [] for side in SIDES}
    with redis_server() as server, nats_server() as nats_url:
        ours = driver(sys.executable, "event_peers", "event_redis", server.url)
        rival = driver(nats_python(), "event_peers", "event_jetstream", nats_url)
        with ours as our_client, rival as rival_client:
            for client in (our_client, rival_client):
                client.answer()
            for side in SIDES:  # warms both up
                _rate(our_client if side.is_ours else rival_client, operation, side, side.count // 10)
            for number in range(rounds):
                turn = number % len(SIDES)
                for side in (*SIDES[turn:], *SIDES[:turn]):
                    client = our_client if side.is_ours else rival_client
                    rates[side].append(_rate(client, operation, side, side.count))
                told = ", ".join(f"{side.name} {rates[side][-1]:,.0f}" for side in SIDES)
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
    for name, single, batched in (("Redis", OURS_SINGLE, OURS), ("JetStream", RIVAL_SINGLE, RIVAL)):
        table.add_row(name, *(f"{median(rates[side]):,.0f}" for side in (single, batched)))
    Console(width=100).print(table)
