"""`dynamo-redis frontend` and workers as processes of their own, and clients that never pause."""

from __future__ import annotations

import asyncio
import itertools
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil

from dynamo_redis.config import child_environment
from tests.processes import PROGRAMS, is_alive

WITHIN_S = 90.0
"""Longest wait for a process: the machine may be busy."""


class Program:
    """A running program. Its stdout and stderr are files."""

    def __init__(self, argv: Sequence[str], env: dict[str, str], directory: Path, number: int) -> None:
        self.directory = directory
        self._out, self._err = directory / f"{number}.out", directory / f"{number}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, cwd=directory
            )
        self.started: dict[int, psutil.Process] = {}
        """The frontend processes that were seen."""

    @property
    def err(self) -> str:
        return self._err.read_text()

    async def until(self, pattern: str, *, in_err: bool = False) -> re.Match[str]:
        """Wait until the output has a match of the pattern. Return the match."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                text = (self._err if in_err else self._out).read_text()
                if (found := re.search(pattern, text, re.MULTILINE)) is not None:
                    return found
                assert self.process.poll() is None, f"ended without {pattern!r}:\n{self.err}"
                await asyncio.sleep(0.02)

    async def url(self) -> str:
        return (await self.until(r"^ready (http://\S+)$"))[1]

    def children(self) -> dict[int, psutil.Process]:
        """Return the frontend processes, by id."""
        found = {child.pid: child for child in psutil.Process(self.process.pid).children() if is_alive(child)}
        self.started |= found
        return found

    async def until_children(self, count: int, without: Sequence[int] = ()) -> dict[int, psutil.Process]:
        """Wait until there are so many frontend processes, and none of these ids."""
        async with asyncio.timeout(WITHIN_S):
            while len(found := self.children()) != count or not set(without).isdisjoint(found):
                await asyncio.sleep(0.02)
        return found

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait for the end. Return the exit code."""
        async with asyncio.timeout(WITHIN_S):
            while (code := self.process.poll()) is None:
                await asyncio.sleep(0.02)
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.children()
            self.process.kill()
            self.process.wait()
        for child in self.started.values():
            if is_alive(child):
                child.kill()


class Programs:
    """The programs of one test, on one registry."""

    def __init__(self, directory: Path, redis_url: str, prefix: str) -> None:
        self._directory = directory
        self._running: list[Program] = []
        self._temporary = TemporaryDirectory()  # programs that are killed leave files there
        self._env = child_environment(
            {
                "DYN_REDIS_URL": redis_url,
                "DYN_REDIS_PREFIX": prefix,
                "DYN_HTTP_HOST": "127.0.0.1",
                "TMPDIR": self._temporary.name,
            }
        )

    def frontend(self, *arguments: str, **env: str) -> Program:
        argv = [sys.executable, "-m", "dynamo_redis", "frontend", "--http-port", "0", *arguments]
        return self._start(argv, env)

    def worker(self, notes: Path, *arguments: str) -> Program:
        return self._start([sys.executable, str(PROGRAMS / "noting_worker.py"), str(notes), *arguments], {})

    def _start(self, argv: Sequence[str], env: dict[str, str]) -> Program:
        program = Program(argv, {**self._env, **env}, self._directory, len(self._running))
        self._running.append(program)
        return program

    def kill(self) -> None:
        for program in self._running:
            program.kill()
        self._temporary.cleanup()


class Load:
    """Clients that send one request after another, and remember what fails."""

    def __init__(self, url: str, *, max_tokens: int = 24) -> None:
        self._url = url
        self._max_tokens = max_tokens
        self._stopping = asyncio.Event()
        self._count = itertools.count()
        self.failures: list[str] = []
        self.answered_count = 0

    @asynccontextmanager
    async def running(self, *, kept_count: int = 4, fresh_count: int = 2) -> AsyncIterator[None]:
        """Run clients that keep their connection, and others that open one for each request."""
        clients = [asyncio.create_task(self._keep()) for _ in range(kept_count)]
        clients += [asyncio.create_task(self._open_anew()) for _ in range(fresh_count)]
        try:
            yield
        finally:
            self._stopping.set()
            await asyncio.gather(*clients)

    async def until_answered(self, count: int) -> None:
        """Wait for so many further answers."""
        wanted = self.answered_count + count
        async with asyncio.timeout(WITHIN_S):
            while self.answered_count < wanted and not self.failures:
                await asyncio.sleep(0.01)

    async def chat(self, http: httpx.AsyncClient, request_id: str | None = None) -> None:
        """Send one request, streamed or not."""
        streams = next(self._count) % 2 == 0
        body: dict[str, Any] = {
            "model": "demo",
            "messages": [{"role": "user", "content": "Hello!"}],
            "max_tokens": self._max_tokens,
            "ignore_eos": True,
            "stream": streams,
        }
        headers = {} if request_id is None else {"x-request-id": request_id}
        try:
            response = await http.post(f"{self._url}/v1/chat/completions", json=body, headers=headers)
        except httpx.HTTPError as exc:
            self.failures.append(repr(exc))
            return
        if response.status_code == 200 and (not streams or response.text.endswith("data: [DONE]\n\n")):
            self.answered_count += 1
        else:
            self.failures.append(f"{response.status_code} {response.text[-300:]}")

    async def _keep(self) -> None:
        async with client() as http:
            while not self._stopping.is_set():
                await self.chat(http)

    async def _open_anew(self) -> None:
        while not self._stopping.is_set():
            async with client() as http:
                await self.chat(http)


def client() -> httpx.AsyncClient:
    """Return an HTTP client. It reads no certificates, which takes longer than a request."""
    return httpx.AsyncClient(timeout=WITHIN_S, verify=False)


async def until_instances(url: str, count: int) -> set[int]:
    """Wait until a frontend lists so many instances. Return their ids."""
    async with client() as http, asyncio.timeout(WITHIN_S):
        while True:
            body = (await http.get(f"{url}/health")).json()
            ids = {instance["instance_id"] for instance in body["instances"]}
            if len(ids) == count:
                return ids
            await asyncio.sleep(0.01)


async def serving_pids(url: str) -> set[int]:
    """Return the frontend processes that accept connections, by the metrics of the port."""
    async with client() as http:
        text = (await http.get(f"{url}/metrics")).text
    return {int(pid) for pid in re.findall(r'\{pid="(\d+)"', text)}


async def until_serving(url: str, count: int, without: Sequence[int] = ()) -> set[int]:
    """Wait until so many frontend processes serve, and none of these ids."""
    async with asyncio.timeout(WITHIN_S):
        while len(found := await serving_pids(url)) != count or not found.isdisjoint(without):
            await asyncio.sleep(0.05)
    return found


async def until_served_everywhere(url: str, count: int = 2) -> None:
    """Wait until so many frontend processes have found the one worker."""
    async with asyncio.timeout(WITHIN_S), client() as http:
        while True:
            text = (await http.get(f"{url}/metrics")).text
            if len(re.findall(r"^dynamo_frontend_model_instances\{.*\} 1\.0$", text, re.MULTILINE)) == count:
                return
            await asyncio.sleep(0.05)
