"""Processes of this release and of a simulated later minor release on one registry."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import redis

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.store.keys import RegistryKeys
from tests.frontend_programs import WITHIN_S, Program, Programs
from tests.integration.conftest import Cli
from tests.processes import PROGRAMS

NOW: Final = ("-m", "dynamo_redis")
LATER: Final = (str(PROGRAMS / "later_release.py"),)
RELEASES: Final = {"now": NOW, "later": LATER}
WORKER: Final = ("worker", "mock", "--model-path", str(DEMO_MODEL_PATH), "--model-name", "demo")
FRONTEND: Final = ("frontend", "--http-port", "0", "--router-mode", "kv", "--router-replica-sync")
ROUTING: Final = ("--router-snapshot-threshold", "1")


class Deployment(Programs):
    """Programs of two releases."""

    def start(self, release: str, *arguments: str) -> Program:
        repository = str(Path(__file__).parents[2])
        path = os.pathsep.join((repository, os.environ.get("PYTHONPATH", "")))
        return self._start([sys.executable, *RELEASES[release], *arguments], {"PYTHONPATH": path})


@pytest.fixture
async def programs(
    tmp_path: Path, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> AsyncIterator[Deployment]:
    made = Deployment(tmp_path, dynamo_redis_url, dynamo_redis_prefix)
    yield made
    made.kill()


async def state_of(cli: Cli, instances: int) -> list[dict[str, Any]]:
    """Return the state of the routers, once each sees so many workers and has a current index."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            done = await asyncio.to_thread(cli, "router-state", "--json")
            found: list[dict[str, Any]] = json.loads(done.out) if done.code == 0 else []
            if found and all(len(each.get("workers", ())) == instances for each in found):
                return found
            await asyncio.sleep(0.2)


def cached_blocks(state: dict[str, Any]) -> dict[int, int]:
    """Return how many blocks a router believes each worker to hold."""
    return {worker["instance_id"]: worker["cached_blocks"] for worker in state["workers"]}


async def chat(url: str, word: str, count: int) -> None:
    """Send chats at the same time, so that they need both workers."""

    async def send(number: int) -> None:
        prompt = f"{number} {word} " * 50
        body = {"model": "demo", "messages": [{"role": "user", "content": prompt}], "max_tokens": 32}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"]

    async with httpx.AsyncClient(base_url=url, timeout=WITHIN_S) as client:
        async with asyncio.timeout(WITHIN_S):
            while not (await client.get("/v1/models")).json()["data"]:
                await asyncio.sleep(0.1)
        await asyncio.gather(*map(send, range(count)))


@pytest.mark.parametrize("first", RELEASES)
async def test_both_releases_serve_one_namespace(
    first: str, programs: Deployment, cli: Cli, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    """A worker and a frontend of each release; `first` makes the registry."""
    second = "later" if first == "now" else "now"
    started = [programs.start(first, *WORKER)]
    await started[0].until(r"ready|serving|registered", in_err=True)
    started += [programs.start(second, *WORKER)]
    frontends = [programs.start(release, *FRONTEND, *ROUTING) for release in (first, second)]
    started += frontends
    urls = [await frontend.url() for frontend in frontends]
    with redis.Redis.from_url(dynamo_redis_url) as server:
        schema = server.hget(RegistryKeys(dynamo_redis_prefix).meta, "schema")
        assert schema == (b"1" if first == "now" else b"1.1")
    states = await state_of(cli, 2)
    assert len(states) == 2
    for url in urls:
        for word in ("one", "two"):
            await chat(url, word, 12)
    # Both routers know the blocks of both workers: of what was sent by the other release, too.
    async with asyncio.timeout(WITHIN_S):
        while True:
            one, other = [cached_blocks(state) for state in await state_of(cli, 2)]
            if one == other and all(one.values()):
                break
            await asyncio.sleep(0.1)
    for command in ("instances", "models", "stats", "doctor"):  # and the commands of this release read it all
        done = await asyncio.to_thread(cli, command, "--json")
        assert done.code == 0, done.err
    served = await asyncio.to_thread(cli, "stats", "--json")
    counts = [
        endpoint["num_requests"]
        for each in served.json
        for endpoint in each["endpoints"]  # type: ignore[attr-defined]
        if endpoint["name"] == "dynamo.backend.generate"
    ]
    assert len(counts) == 2
    assert all(counts), "frontends of both releases sent requests to workers of both"
    for program in started:
        assert "cannot be read" not in program.err
        assert "left out" not in program.err
        assert "schema version" not in program.err
        assert "Traceback" not in program.err


COMMANDS: Final = {
    "instances": (),
    "put": ("a", "b"),
    "objects": ("ls",),
    "events": ("ls",),
    "lock": ("name", "--", "true"),
    "gc": ("--apply", "--settle", "0s"),
    "backup": ("backup.zip",),
    "worker": WORKER[1:],
    "frontend": FRONTEND[1:],
    "router": (),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_registry_of_another_major_version_is_refused(
    command: str, cli: Cli, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    assert cli("put", "first", "x").code == 0
    keys = RegistryKeys(dynamo_redis_prefix)
    with redis.Redis.from_url(dynamo_redis_url) as server:
        server.hset(keys.meta, "schema", "2.3")
        before = {key: server.dump(key) for key in server.scan_iter(f"{{{dynamo_redis_prefix}*")}
        done = cli(command, *COMMANDS[command])
        after = {key: server.dump(key) for key in server.scan_iter(f"{{{dynamo_redis_prefix}*")}
    assert done.code == 1
    reason = (
        "the registry has schema version 2.3, this release reads 1: upgrade the older side, or choose another"
    )
    assert reason in done.err
    assert after == before
