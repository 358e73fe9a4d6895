"""The page docs/write-your-engine.md: its programs run as they stand, and its request is answered."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dynamo_redis.engines.base import Engine
from tests.routed_deployment import Deployment, deployment

__all__ = ["deployment"]

WITHIN_S = 60.0
PROGRAMS = {"handler_worker.py": "my-model", "engine_worker.py": "my-other-model"}


@pytest.fixture
def page(repository: Path) -> str:
    return (repository / "docs" / "write-your-engine.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def programs(page: str) -> dict[str, str]:
    """The page's programs, by the names in their first lines. Blocks without one are parts of programs."""
    found = {block.split("\n", 1)[0]: block for block in blocks(page, "python")}
    return {line.removeprefix("# "): block for line, block in found.items() if line.startswith("# ")}


@asynccontextmanager
async def running(program: Path, url: str, prefix: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program of the page in a separate process, which is stopped in order."""
    environment = os.environ | {
        "DYN_REDIS_URL": url,
        "DYN_REDIS_PREFIX": prefix,
        "DYN_TCP_RPC_HOST": "127.0.0.1",
    }
    process = await asyncio.create_subprocess_exec(sys.executable, str(program), env=environment)
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), WITHIN_S) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("name", PROGRAMS)
async def test_page_program_answers_chats(
    deployment: Deployment,
    page: str,
    name: str,
    tmp_path: Path,
    dynamo_redis_url: str,
    dynamo_redis_prefix: str,
) -> None:
    program = tmp_path / name
    program.write_text(programs(page)[name], encoding="utf-8")
    frontend = await deployment.frontend()
    (request,) = re.findall(r"-d '(.*?)'", blocks(page, "console")[0], re.DOTALL)
    body = json.loads(request) | {"model": PROGRAMS[name]}
    async with running(program, dynamo_redis_url, dynamo_redis_prefix), asyncio.timeout(WITHIN_S):
        while (response := await frontend.post("/v1/chat/completions", json=body)).status_code != 200:
            assert response.status_code in (404, 503), response.text
            await asyncio.sleep(0.05)
        assert "Hello, engine" in response.json()["choices"][0]["message"]["content"]
        completion = {"model": PROGRAMS[name], "prompt": "Once upon a time", "max_tokens": 9}
        response = await frontend.post("/v1/completions", json=completion)
        assert response.json()["choices"][0]["text"] == "Once upon a time"
    async with asyncio.timeout(WITHIN_S):
        while (await frontend.get("/v1/models")).json()["data"]:
            await asyncio.sleep(0.05)


def test_page_has_these_programs(page: str) -> None:
    assert set(programs(page)) == set(PROGRAMS)


def test_page_names_every_part_of_an_engine(repository: Path) -> None:
    page = (repository / "docs" / "python-api" / "engines.md").read_text(encoding="utf-8")
    parts = {name for name in vars(Engine) if not name.startswith("_")}
    assert parts == {name for name in parts if re.search(rf"^\| `{name}[(`]", page, re.MULTILINE)}, (
        "each method of Engine has a row"
    )
