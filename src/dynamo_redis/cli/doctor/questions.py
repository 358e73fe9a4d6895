"""Commands to the server of the registry, many in one round trip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamo_redis.errors import StoreError
from dynamo_redis.store.redis.base import Sending
from dynamo_redis.store.redis.blocking import Argument, pack


class Questions:
    """Sends commands and returns all answers: that of a refused one is its StoreError. For one task."""

    def __init__(self, sending: Sending, key: str) -> None:
        """`key` is one of the registry: on a cluster, the node that has it gets the commands without keys."""
        self._sending = sending
        self._key = key

    async def connect(self) -> None:
        """Connect. Raises StoreError if there is no connection, or no login."""
        (answer,) = await self._sending.execute_each([(self._key, pack("PING"))])
        if isinstance(answer, StoreError) and (
            not answer.answered or answer.answer_code in ("NOAUTH", "WRONGPASS")
        ):
            raise answer

    async def ask(self, commands: Sequence[Sequence[Argument]], keys: Sequence[str] = ()) -> list[Any]:
        """Run commands in one round trip. `keys`: for each command its key, or ""; by default none has one.

        Where the connection breaks, the commands are sent one by one: some proxies close it upon a command
        that they do not know."""
        placed = [
            (key or self._key, pack(*command))
            for command, key in zip(commands, keys or [""] * len(commands), strict=True)
        ]
        try:
            return await self._sending.execute_each(placed)
        except StoreError:
            answers: list[Any] = []
            for one in placed:
                try:
                    answers += await self._sending.execute_each([one])
                except StoreError as exc:
                    answers.append(exc)
            return answers

    async def aclose(self) -> None:
        """Close the connection; the next question makes a new one."""
        await self._sending.aclose()
