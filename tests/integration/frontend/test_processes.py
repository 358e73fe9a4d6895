"""`dynamo-redis frontend --frontend-processes`: real processes on one port."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import psutil
import pytest

from tests.frontend_deployment import Deployment, until_healthy
from tests.frontend_programs import (
    WITHIN_S,
    Load,
    Programs,
    serving_pids,
    until_served_everywhere,
    until_serving,
)
from tests.kserve_client import infer_request, kserve_client
from tests.processes import is_alive

LONG = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Hello!"}],
    "max_tokens": 200,
    "ignore_eos": True,
    "stream": True,
}


@pytest.fixture
def programs(tmp_path: Path, dynamo_redis_url: str, dynamo_redis_prefix: str) -> Iterator[Programs]:
    started = Programs(tmp_path, dynamo_redis_url, dynamo_redis_prefix)
    yield started
    started.kill()


async def test_processes_share_a_port(programs: Programs, deployment: Deployment) -> None:
    """Each gets connections; one scrape has the requests of both."""
    await deployment.worker()
    frontend = programs.frontend("--frontend-processes", "2")
    url = await frontend.url()
    pids = set(frontend.children())
    assert len(pids) == 2
    await until_served_everywhere(url)
    load = Load(url, max_tokens=2)
    for _ in range(40):
        async with httpx.AsyncClient(timeout=WITHIN_S) as http:
            await load.chat(http)
    assert load.failures == []
    async with httpx.AsyncClient(timeout=WITHIN_S) as http:
        text = (await http.get(f"{url}/metrics")).text
    counts = re.findall(r'^dynamo_frontend_requests_total\{pid="(\d+)".*\} (\S+)$', text, re.MULTILINE)
    assert sum(float(count) for _, count in counts) == 40
    assert {int(pid) for pid, _ in counts} == pids
    assert text.count("# TYPE dynamo_frontend_requests_total ") == 1
    frontend.send(signal.SIGTERM)
    assert await frontend.ended() == 0


async def test_processes_share_the_port_of_kserve(programs: Programs, deployment: Deployment) -> None:
    await deployment.worker()
    options = ("--frontend-processes", "2", "--kserve-grpc-server", "--grpc-port", "0")
    frontend = programs.frontend(*options)
    url = await frontend.url()
    port = int((await frontend.until(r"KServe over gRPC on 127\.0\.0\.1:(\d+)", in_err=True))[1])
    await until_served_everywhere(url)
    for _ in range(8):
        async with kserve_client(port) as client:
            answer = await client.answer(infer_request(parameters={"max_tokens": 2}))
            assert answer.model_name == "demo"
    other = programs.frontend(*options[:-1], str(port))
    assert await other.ended() == 2
    assert f"port {port} is in use" in other.err
    assert "--grpc-port" in other.err
    frontend.send(signal.SIGTERM)
    assert await frontend.ended() == 0


async def test_port_in_use_is_an_error(programs: Programs) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        frontend = programs.frontend("--frontend-processes", "2", "--http-port", str(port))
        assert await frontend.ended() == 2
    assert re.fullmatch(rf"dynamo-redis: port {port} is in use: .*\n", frontend.err)


async def test_process_that_cannot_start_ends_the_command(programs: Programs) -> None:
    frontend = programs.frontend("--frontend-processes", "2", DYN_REDIS_URL="redis://127.0.0.1:1")
    assert await frontend.ended() == 1
    assert frontend.err.count("dynamo-redis: ") == 1


async def test_killed_process_is_started_again(programs: Programs) -> None:
    frontend = programs.frontend(
        "--frontend-processes", "2", DYN_SYSTEM_PORT="0", DYN_SYSTEM_HOST="127.0.0.1"
    )
    url = await frontend.url()
    system = (await frontend.until(r"(http://127\.0\.0\.1:\d+) serves /health", in_err=True))[1]
    first, second = await serving_pids(url)
    async with httpx.AsyncClient(timeout=WITHIN_S) as http:
        assert set((await http.get(f"{system}/health")).json()["processes"]) == {first, second}
        os.kill(first, signal.SIGKILL)
        await frontend.until(rf"process {first} was killed by SIGKILL", in_err=True)
        assert first not in (await http.get(f"{system}/health")).json()["processes"]
        pids = await until_serving(url, 2, without=[first])
        assert second in pids
        async with asyncio.timeout(WITHIN_S):
            while (await http.get(f"{system}/health")).status_code != 200:
                await asyncio.sleep(0.02)
        assert f'pid="{second}"' in (await http.get(f"{system}/metrics")).text


async def test_hung_process_shows_in_health(programs: Programs) -> None:
    frontend = programs.frontend(
        "--frontend-processes", "2", "--access-log", DYN_SYSTEM_PORT="0", DYN_SYSTEM_HOST="127.0.0.1"
    )
    url = await frontend.url()
    system = (await frontend.until(r"(http://127\.0\.0\.1:\d+) serves /health", in_err=True))[1]
    first = min(await serving_pids(url))
    os.kill(first, signal.SIGSTOP)
    await frontend.until(f"process {first} does not answer", in_err=True)
    async with httpx.AsyncClient(timeout=WITHIN_S) as http:
        response = await http.get(f"{system}/health")
        assert response.status_code == 503
        assert first not in response.json()["processes"]
        assert re.search(rf"process {first} has not answered for \d+ s", " ".join(response.json()["reasons"]))
        os.kill(first, signal.SIGCONT)
        await frontend.until(f"process {first} answers again", in_err=True)
        async with asyncio.timeout(WITHIN_S):
            while (await http.get(f"{system}/health")).status_code != 200:
                await asyncio.sleep(0.02)
    assert "GET /live" not in frontend.err  # their own looks have no access lines


async def test_no_hangup_is_lost(programs: Programs) -> None:
    """Neither one that comes while a process is dead, nor one that comes during a replacement."""
    frontend = programs.frontend("--frontend-processes", "2")
    url = await frontend.url()
    first, second = await serving_pids(url)
    os.kill(first, signal.SIGKILL)
    await frontend.until(rf"process {first} was killed by SIGKILL", in_err=True)
    frontend.send(signal.SIGHUP)
    await frontend.until("SIGHUP: replacing", in_err=True)
    frontend.send(signal.SIGHUP)
    await frontend.until("SIGHUP: .* will be replaced once more", in_err=True)
    await frontend.until("(?s)all frontend processes are replaced.*all frontend processes", in_err=True)
    await until_serving(url, 2, without=[first, second])


async def test_processes_stay_if_no_successor_can_start(programs: Programs) -> None:
    """The command has no file left for one."""
    frontend = programs.frontend("--frontend-processes", "2")
    url = await frontend.url()
    pids = await serving_pids(url)
    parent = psutil.Process(frontend.process.pid)
    limits = parent.rlimit(psutil.RLIMIT_NOFILE)
    parent.rlimit(psutil.RLIMIT_NOFILE, (parent.num_fds(), limits[1]))
    frontend.send(signal.SIGHUP)
    await frontend.until(
        "no successor of frontend process .* can be started: .* Too many open files", in_err=True
    )
    parent.rlimit(psutil.RLIMIT_NOFILE, limits)
    assert await serving_pids(url) == pids
    assert "Traceback" not in frontend.err


async def test_dead_process_gets_no_connections(programs: Programs) -> None:
    """Its successors cannot start for some time, so all connections go to the other process."""
    frontend = programs.frontend("--frontend-processes", "2")
    url = await frontend.url()
    children = frontend.children()
    first = min(children)
    [siblings] = siblings_of(children[first].cmdline())
    aside = siblings.rename(siblings.with_suffix(".aside"))
    os.kill(first, signal.SIGKILL)
    await frontend.until(rf"process {first} was killed by SIGKILL", in_err=True)
    for _ in range(30):
        async with httpx.AsyncClient(timeout=WITHIN_S / 2) as fresh:
            assert (await fresh.get(f"{url}/live")).status_code == 200
    aside.rename(siblings)
    await until_serving(url, 2, without=[first])


async def test_killed_parent_leaves_no_process(programs: Programs, deployment: Deployment) -> None:
    """An answer under way is finished first."""
    await deployment.worker(speedup_ratio=1)
    frontend = programs.frontend("--frontend-processes", "2")
    url = await frontend.url()
    await until_served_everywhere(url)
    children = frontend.children()
    [siblings] = siblings_of(children[min(children)].cmdline())
    async with (
        httpx.AsyncClient(timeout=WITHIN_S) as http,
        http.stream("POST", f"{url}/v1/chat/completions", json=LONG) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        frontend.process.kill()
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    async with asyncio.timeout(WITHIN_S):
        while any(map(is_alive, children.values())):
            await asyncio.sleep(0.02)
    assert not siblings.exists()


def siblings_of(command: list[str]) -> list[Path]:
    """Return the directory of the processes' sockets, by a process's command line."""
    return [Path(value) for option, value in pairwise(command) if option == "--siblings"]


async def test_signal_lets_answers_finish(programs: Programs, deployment: Deployment) -> None:
    await deployment.worker(speedup_ratio=1)
    frontend = programs.frontend("--frontend-processes", "2")
    url = await frontend.url()
    await until_served_everywhere(url)
    children = frontend.children()
    async with (
        httpx.AsyncClient(timeout=WITHIN_S) as http,
        http.stream("POST", f"{url}/v1/chat/completions", json=LONG) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        frontend.send(signal.SIGINT)
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    assert await frontend.ended() == 0
    assert not any(map(is_alive, children.values()))


async def test_hangup_lets_the_only_process_finish(programs: Programs, deployment: Deployment) -> None:
    """Without others there is no process to hand over to: it ends as by SIGTERM."""
    await deployment.worker(speedup_ratio=1)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    frontend = programs.frontend()
    signal.signal(signal.SIGHUP, before)
    url = await frontend.url()
    await until_healthy(url)
    async with (
        httpx.AsyncClient(timeout=WITHIN_S) as http,
        http.stream("POST", f"{url}/v1/chat/completions", json=LONG) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        frontend.send(signal.SIGHUP)
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    assert await frontend.ended() == 0


async def test_second_signal_ends_all_at_once(programs: Programs, deployment: Deployment) -> None:
    await deployment.worker(speedup_ratio=1)
    frontend = programs.frontend("--frontend-processes", "2", DYN_GRACEFUL_SHUTDOWN_S="3600")
    url = await frontend.url()
    await until_served_everywhere(url)
    children = frontend.children()
    async with (
        httpx.AsyncClient(timeout=WITHIN_S) as http,
        http.stream("POST", f"{url}/v1/chat/completions", json={**LONG, "max_tokens": 20_000}) as response,
    ):
        assert response.status_code == 200
        lines = response.aiter_lines()  # without this name it would hang up
        await anext(lines)
        frontend.send(signal.SIGTERM)
        await frontend.until("SIGTERM: the frontend processes drain", in_err=True)
        frontend.send(signal.SIGTERM)
        assert await frontend.ended() == 128 + signal.SIGTERM
    assert not any(map(is_alive, children.values()))
