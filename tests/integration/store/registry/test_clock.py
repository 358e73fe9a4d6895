"""Leases while the server's clock is set."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from faults.servers import ServerUnderTest, faketime_library, installed_servers


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ServerUnderTest]:
    """A server with a clock that can be set."""
    kind = next((kind for kind in installed_servers() if kind.name.startswith("redis-")), None)
    if faketime_library() is None or kind is None:
        pytest.skip("needs libfaketime (Debian: apt install faketime) and a Redis, to set its clock")
    made = ServerUnderTest("one", kind, tmp_path / "server", clock=True)
    await made.start()
    yield made
    await made.aclose()


async def test_clock_step_of_an_hour_neither_ends_nor_keeps_a_lease(
    server: ServerUnderTest, open_registry: Any, mirror: Any
) -> None:
    worker, victim = await open_registry(server.url, ttl_s=3), await open_registry(server.url, ttl_s=3)
    view = await mirror(await open_registry(server.url, ttl_s=3), "i/")
    await worker.register("i/worker", b"v")
    await victim.register("i/victim", b"v")
    await view.until(lambda: len(view.state) == 2)
    server.set_clock(3600)
    await asyncio.sleep(1.6)
    assert await server.clock_offset_s() > 3500
    assert len(view.state) == 2
    victim._registrations._held = False  # so that closing it does not revoke the lease
    await victim.aclose()
    server.set_clock(-3600)
    await view.until_state({"i/worker": b"v"}, 6.0)
    await worker.put("i/free", b"w")
    await view.until_state({"i/worker": b"v", "i/free": b"w"})
    assert worker.lease_losses == 0
    assert view.resyncs == [], "revisions do not go back with the clock"
