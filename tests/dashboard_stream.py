"""A reader of `/dashboard/events`, which keeps the newest state as the page does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx

WITHIN_S = 60.0
TABLES = ("who", "loads", "points", "events")


class DashboardReader:
    """The state of one frontend's dashboard. `kinds` are those of the frames that have come."""

    def __init__(self, lines: AsyncIterator[str]) -> None:
        self._lines = lines
        self.state: dict[str, Any] = {}
        self.kinds: list[str] = []

    async def next(self) -> dict[str, Any]:
        """Take the next frame. Return the state. Raises StopAsyncIteration at the end of the stream."""
        async with asyncio.timeout(WITHIN_S):
            while not (line := await anext(self._lines)).startswith("event: "):
                assert line in ("", ":"), line
            kind = line.removeprefix("event: ")
            content = json.loads((await anext(self._lines)).removeprefix("data: "))
        self.kinds.append(kind)
        if kind == "state":
            self.state = content
        else:
            for part, value in content.items():
                if part in TABLES:
                    self.state[part] |= value["set"]
                    for key in value["gone"]:
                        del self.state[part][key]
                else:
                    self.state[part] = value
        return self.state

    async def until(self, holds: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Take frames until the state is as wanted. Return it."""
        try:
            async with asyncio.timeout(WITHIN_S):
                while not self.state or not holds(self.state):
                    await self.next()
        except TimeoutError:
            shown = {
                name: self.state.get(name) for name in ("verdict", "problems", "figures", "loads", "events")
            }
            raise AssertionError(f"the state is not as wanted: {shown}") from None
        return self.state

    async def until_end(self) -> None:
        """Take frames until the stream ends as it should."""
        with suppress(StopAsyncIteration):
            while True:
                await self.next()

    def events(self, kind: str) -> list[tuple[str, int, str]]:
        """Return subject, count and detail of the events of one kind."""
        return [(event[2], event[3], event[4]) for event in self.state["events"].values() if event[1] == kind]


@asynccontextmanager
async def dashboard(url: str) -> AsyncIterator[DashboardReader]:
    """Look at a frontend's dashboard."""
    async with (
        httpx.AsyncClient(timeout=WITHIN_S) as http,
        http.stream("GET", f"{url}/dashboard/events") as response,
    ):
        assert response.status_code == 200
        yield DashboardReader(response.aiter_lines())
