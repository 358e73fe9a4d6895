"""Services of compose files, run as processes of this machine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from tests.compose_files import container, service_of
from tests.container_image import entrypoint_of
from tests.native_containers import NativeContainers

Deploy = Callable[..., NativeContainers]

VARIABLES = {"REDIS_PASSWORD": "a0b1c2"}


@pytest.fixture
def directory(repository: Path) -> Path:
    return repository / "compose"


@pytest.fixture
async def deploy(repository: Path, tmp_path: Path) -> AsyncIterator[Deploy]:
    """Return a function that makes the containers of the named hosts, which end with the test.

    A host is a service, or `SERVICE-NUMBER` of one with several containers."""
    made: list[NativeContainers] = []
    entrypoint = entrypoint_of((repository / "Dockerfile").read_text())

    def make(
        content: dict[str, Any],
        hosts: list[str],
        *,
        ports: dict[str, list[int]] | None = None,
        variables: dict[str, str] | None = None,
        replaced: dict[str, str] | None = None,
    ) -> NativeContainers:
        containers = {
            host: container(
                content,
                service_of(content, host),
                entrypoint=entrypoint,
                variables=VARIABLES | (variables or {}),
                volumes=tmp_path / "volumes",
                ports=(ports or {}).get(host),
                host=host,
            )
            for host in hosts
        }
        here = {
            "$(hostname -i | cut -d' ' -f1)": "127.0.0.1",
            "redis-server -": "redis-server - --bind 127.0.0.1",
        }
        found = NativeContainers(tmp_path, containers, here | (replaced or {}))
        made.append(found)
        return found

    yield make
    for each in made:
        await each.stop_all()


async def chat(http: httpx.AsyncClient, *, instances: int, within_s: float) -> dict[str, Any]:
    """Wait until a frontend lists that many instances, and return its answer to a chat."""
    with anyio.fail_after(within_s):
        while len((await http.get("/health")).json().get("instances", [])) < instances:
            await anyio.sleep(0.05)
    model = (await http.get("/v1/models")).json()["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert found["choices"][0]["message"]["content"]
    return found
