"""Many instances in the registry that are records only: copies of a worker, without a process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, Final

from dynamo_redis.names import INSTANCES, MODEL_CARDS
from dynamo_redis.store.base import Registry

_FIRST_ID: Final = 0x1000_0000_0000
_AT_A_TIME: Final = 250


class Copies:
    """Copies of the record and the card of a worker, each with an id and an address of its own. They go to no
    process: requests would fail there."""

    def __init__(
        self, registry: Registry, card_key: str, card: bytes, record_key: str, record: bytes
    ) -> None:
        self._registry = registry
        self._card_key, self._card = card_key, card
        self._record_key, self._record = record_key, json.loads(record)
        self._own_id = card_key.rpartition("/")[2]

    @classmethod
    async def of_a_worker(cls, registry: Registry) -> Copies:
        """Copy one of the workers that serve a model. Raises IndexError without one."""
        card = (await registry.get_prefix(MODEL_CARDS)).records[0]
        key = card.key.replace(MODEL_CARDS, INSTANCES)
        record = await registry.get(key)
        assert record is not None
        return cls(registry, card.key, card.value, key, record.value)

    async def put(self, count: int, is_ready: Callable[[int], bool] = lambda _: True) -> None:
        """Put so many copies. `is_ready` is called with the number of each, from 0."""
        for begin in range(0, count, _AT_A_TIME):
            numbers = range(begin, min(begin + _AT_A_TIME, count))
            await asyncio.gather(*(self.put_record(number, is_ready=is_ready(number)) for number in numbers))
            await asyncio.gather(*(self._put_card(number) for number in numbers))

    async def put_record(self, number: int, *, is_ready: bool) -> None:
        """Put or replace the record of a copy."""
        copy_id = f"{_FIRST_ID + number:x}"
        subject = self._record_key.removeprefix(INSTANCES).rpartition("/")[0]
        copy: dict[str, Any] = {
            **self._record,
            "instance_id": int(copy_id, 16),
            "transport": {"tcp": f"10.0.{number // 250}.{number % 250 + 1}:7001/{copy_id}/{subject}"},
            "started_at": time.time() - 977 * number,
            "ready": is_ready,
        }
        await self._registry.put(self._record_key.replace(self._own_id, copy_id), json.dumps(copy).encode())

    async def _put_card(self, number: int) -> None:
        copy_id = f"{_FIRST_ID + number:x}"
        await self._registry.put(self._card_key.replace(self._own_id, copy_id), self._card)
