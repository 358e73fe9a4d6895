"""Parts of every role: its history, its own registry, a seeded random source, and the order to rest."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import StoreError, StoreUnavailable
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from faults.history import Outcome, Recorder

DATA: Final = "data/"
INSTANCES: Final = "instances/"
START_AGAIN_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Orders:
    """The runner's orders to a process. `pace_s` is the mean wait between two requests of one client."""

    role: str
    process: str
    directory: Path
    url: str
    prefix: str
    seed: str
    ttl_s: float = 2.0
    timeout_s: float = 1.0
    pace_s: float = 0.03


Attempt = Callable[[], Awaitable[tuple[Outcome, Any]]]


@dataclass(slots=True)
class Process:
    """One load process. `resting` is set when it must make no new changes."""

    orders: Orders
    recorder: Recorder
    rng: random.Random
    resting: asyncio.Event = field(default_factory=asyncio.Event)
    _values: int = 0

    def settings(self) -> StoreSettings:
        """Return the settings as a user's environment would give them."""
        orders = self.orders
        return StoreSettings.load(
            redis_url=orders.url,
            prefix=orders.prefix,
            lease_ttl_s=orders.ttl_s,
            command_timeout_s=orders.timeout_s,
        )

    async def open_registry(self) -> RedisRegistry:
        """Return a registry as soon as the server answers: on a busy machine it may not do so at once."""
        registry = RedisRegistry(self.settings())
        while True:
            try:
                await registry.start()
            except StoreUnavailable:
                await asyncio.sleep(START_AGAIN_S)
            else:
                return registry

    def new_value(self) -> str:
        """Return a value that no other call ever writes."""
        self._values += 1
        return f"{self.orders.process}:{self._values}"

    async def call(self, action: str, attempt: Attempt, **arguments: Any) -> tuple[Outcome, Any]:
        """Make one request, write it and its outcome, and return the outcome and the answer.

        `attempt` returns both. A StoreError that it raises leaves the outcome open: even an error that says
        "no" may follow a first attempt whose answer was lost.
        """
        number = self.recorder.begin(action, **arguments)
        try:
            outcome, answer = await attempt()
        except StoreError as exc:
            outcome, answer = "unknown", {"error": f"{type(exc).__name__}: {exc}"}
        self.recorder.end(number, outcome, answer)
        return outcome, answer

    async def pause(self) -> None:
        """Wait between two requests."""
        await asyncio.sleep(self.rng.uniform(0, 2 * self.orders.pace_s))
