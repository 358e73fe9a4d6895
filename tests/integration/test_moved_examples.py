"""The examples of workers moved from Dynamo, each program a process of its own.

Only their imports differ from programs for Dynamo: a mechanical rewrite changes them back. With
`DYNAMO_PYTHON`, an interpreter that has `ai-dynamo-runtime` 1.6.1, the rewritten programs run on the real
runtime, too, with its file discovery.
"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from tests.conftest import REPOSITORY
from tests.routed_deployment import Deployment, deployment, until_served

__all__ = ["deployment"]

EXAMPLES = REPOSITORY / "examples" / "from_dynamo"
PROGRAMS = sorted(EXAMPLES.rglob("*.py"))
IMPORT = re.compile(r"^(from|import) dynamo_redis\.", re.MULTILINE)
WITHIN_S = 60.0


def rewritten(program: Path) -> str:
    """Return a program with the imports that it had for Dynamo."""
    return IMPORT.sub(r"\1 dynamo.", program.read_text(encoding="utf-8"))


@dataclass
class Interpreter:
    """Runs the programs below `examples`."""

    python: str
    examples: Path
    environment: dict[str, str]

    @asynccontextmanager
    async def started(self, program: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            self.python,
            str(self.examples / program),
            *arguments,
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    async def run(self, program: str, *arguments: str) -> str:
        """Return the output of a program that ends by itself, with 0."""
        async with self.started(program, *arguments) as process, asyncio.timeout(WITHIN_S):
            output, _ = await process.communicate()
            assert process.returncode == 0
            return output.decode()


async def line_of(process: asyncio.subprocess.Process, wanted: str) -> str:
    """Return the first line of a program's output that has this text."""
    assert process.stdout is not None
    async with asyncio.timeout(WITHIN_S):
        while line := (await process.stdout.readline()).decode():
            if wanted in line:
                return line
    raise AssertionError(f"no line with {wanted!r}")


@pytest.fixture(params=["here", "dynamo"])
def interpreter(
    request: pytest.FixtureRequest, dynamo_redis_url: str, dynamo_redis_prefix: str, tmp_path: Path
) -> Interpreter:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DYN_")}
    if request.param == "here":
        own = {"DYN_REDIS_URL": dynamo_redis_url, "DYN_REDIS_PREFIX": dynamo_redis_prefix}
        return Interpreter(sys.executable, EXAMPLES, clean | own)
    python = os.environ.get("DYNAMO_PYTHON")
    if python is None:
        pytest.skip("no DYNAMO_PYTHON, an interpreter with ai-dynamo-runtime")
    for program in PROGRAMS:
        copy = tmp_path / program.relative_to(EXAMPLES)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(rewritten(program), encoding="utf-8")
    files = {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(tmp_path), "DYN_EVENT_PLANE": "zmq"}
    return Interpreter(python, tmp_path, clean | files)


async def test_client_hears_the_worker(interpreter: Interpreter) -> None:
    async with interpreter.started("hello_world/worker.py"):
        assert await interpreter.run("hello_world/client.py", "moon,sun") == "Hello moon!\nHello sun!\n"


async def test_cancellation_passes_through_the_middle(interpreter: Interpreter) -> None:
    async with (
        interpreter.started("cancellation/server.py") as server,
        interpreter.started("cancellation/middle.py") as middle,
    ):
        output = await interpreter.run("cancellation/client.py")
        assert output == "client: stopped after [0, 1, 2]\n"
        number = re.search(r"server: stopped after (\d+)", await line_of(server, "server:"))
        assert number is not None
        assert int(number[1]) < 1000
        await line_of(middle, "middle: stopped")


async def test_custom_engine_starts_and_cleans_up(interpreter: Interpreter) -> None:
    if interpreter.examples != EXAMPLES:
        probe = [interpreter.python, "-c", "import dynamo.common.backend"]
        if (await asyncio.to_thread(subprocess.run, probe, capture_output=True, check=False)).returncode:
            pytest.skip("the DYNAMO_PYTHON has no ai-dynamo, for the unified backend")
    async with interpreter.started("custom_engine/engine.py", "--model", str(DEMO_MODEL_PATH)) as worker:
        await line_of(worker, "started")
        worker.terminate()
        await line_of(worker, "cleaned up")
        async with asyncio.timeout(WITHIN_S):
            assert await worker.wait() == 0


async def test_custom_engine_answers_chats(
    deployment: Deployment, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    own = {"DYN_REDIS_URL": dynamo_redis_url, "DYN_REDIS_PREFIX": dynamo_redis_prefix}
    interpreter = Interpreter(sys.executable, EXAMPLES, os.environ | own)
    arguments = ("--model", str(DEMO_MODEL_PATH), "--delay", "0.05")
    async with interpreter.started("custom_engine/engine.py", *arguments) as worker:
        frontend = await deployment.frontend(mode="kv")
        await until_served(frontend)
        body: dict[str, Any] = {
            "model": "backwards",
            "prompt": "one two three four five six",
            "max_tokens": 4,
        }
        first, second = [(await frontend.post("/v1/completions", json=body)).json() for _ in range(2)]
        assert first["usage"]["completion_tokens"] == 4
        assert first["choices"][0]["finish_reason"] == "length"
        assert second["choices"][0]["text"] == first["choices"][0]["text"]
        await leave(frontend, {**body, "prompt": "word " * 500, "max_tokens": 500, "stream": True})
        await line_of(worker, "aborted")


async def test_wrong_model_ends_the_worker_at_once(dynamo_redis_url: str, dynamo_redis_prefix: str) -> None:
    own = {"DYN_REDIS_URL": dynamo_redis_url, "DYN_REDIS_PREFIX": dynamo_redis_prefix}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLES / "custom_engine" / "engine.py"),
        "--model",
        "org/model",
        env=os.environ | own,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(WITHIN_S):
        output, errors = await process.communicate()
    assert process.returncode == 1
    assert "cleaned up" in output.decode()
    assert "nothing is downloaded" in errors.decode().splitlines()[-1]


async def leave(frontend: httpx.AsyncClient, body: dict[str, Any]) -> None:
    """Begin to read a streamed answer, and close the connection."""
    async with frontend.stream("POST", "/v1/completions", json=body) as answer:
        async for _ in answer.aiter_bytes():
            return


# --------------------------------------------------------------------------- the same imports


@pytest.fixture(scope="module")
def dynamo_names() -> Callable[[str], set[str]]:
    """Return a function that returns the names of a module of Dynamo 1.6.1, as they are stored."""
    vectors = REPOSITORY / "tests" / "vectors"
    llm = json.loads((vectors / "dynamo_llm.json").read_text(encoding="utf-8"))
    return lambda module: set(llm["modules"][module])


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_rewritten_imports_are_names_of_dynamo(
    program: Path, dynamo_names: Callable[[str], set[str]]
) -> None:
    text = rewritten(program)
    assert "dynamo_redis" not in re.sub(r'""".*?"""', "", text, count=1, flags=re.DOTALL)
    imported = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    for node in imported:
        if (node.module or "").startswith("dynamo"):
            assert {name.name for name in node.names} <= dynamo_names(node.module or ""), node.module
