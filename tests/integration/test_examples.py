"""The examples, as a reader of the README would run them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from dynamo_redis.events.block_hashes import chain, local_hashes
from dynamo_redis.runtime import DistributedRuntime, Settings
from dynamo_redis.wire.event import EventBatch
from dynamo_redis.wire.kv_event import read_kv_events
from tests.nats_server import find_nats_server

RUN = "uvloop.run(main())"


@pytest.fixture
def environment(dynamo_redis_url: str, dynamo_redis_prefix: str) -> dict[str, str]:
    return os.environ | {"DYN_REDIS_URL": dynamo_redis_url, "DYN_REDIS_PREFIX": dynamo_redis_prefix}


@contextmanager
def _started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_the_client_hears_the_worker(repository: Path, environment: dict[str, str]) -> None:
    examples = repository / "examples"
    with _started([sys.executable, str(examples / "hello_worker.py")], environment) as worker:
        client = subprocess.run(
            [sys.executable, str(examples / "hello_client.py"), "Grüße", "aus", "Köln"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (client.returncode, client.stdout.split()) == (0, ["Grüße", "aus", "Köln"]), client.stderr

        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=30) == 0


async def test_routers_hear_of_the_workers_blocks_and_load(
    repository: Path, environment: dict[str, str], dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    settings = Settings.load(redis_url=dynamo_redis_url, prefix=dynamo_redis_prefix)
    with _started([sys.executable, str(repository / "examples" / "kv_worker.py")], environment) as worker:
        async with DistributedRuntime(settings=settings) as runtime:

            async def ask(endpoint: str, request: Any) -> list[Any]:
                async with await runtime.endpoint(f"demo.llm.{endpoint}").client() as client:
                    await client.wait_for_instances(60)
                    return [item async for item in await client.generate(request, annotated=False)]

            prompt = list(range(11))
            for _ in range(2):
                answer = await ask("generate", {"token_ids": prompt})
                assert answer == [{"token_ids": prompt[::-1], "finish_reason": "stop"}]
            header, told = await ask("kv_dump", {"have": []})
            assert header["next_sequence"] == 2, "the second request had all it needed in the cache"
            (event,) = read_kv_events(EventBatch.from_bytes(told["batch"]).events)
            assert list(event.hashes) == chain(local_hashes(prompt, 4))
            (load,) = await ask("load_metrics", None)
            assert load["kv_stats"] == {
                "kv_active_blocks": 2,
                "kv_total_blocks": 1000,
                "gpu_cache_usage_perc": 0.002,
            }
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=30) == 0


def test_the_readme_shows_the_examples(repository: Path) -> None:
    """They are equal line by line, except type annotations and docstrings, which the README leaves out."""
    readme = (repository / "README.md").read_text(encoding="utf-8")
    for name, lines in {
        "hello_worker.py": (
            '.endpoint("demo.words.generate").serve_endpoint(generate)',
            "@dynamo_worker()",
            RUN,
        ),
        "hello_client.py": (
            '.endpoint("demo.words.generate").client()',
            "client.wait_for_instances(",
            "await client.round_robin(",
            "annotated=False)",
            RUN,
        ),
    }.items():
        source = (repository / "examples" / name).read_text(encoding="utf-8")
        for line in lines:
            assert line in readme
            assert line in source


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine: apt-get install curl")
@pytest.mark.parametrize("plane", ["tcp", "http", "nats", "redis"])
def test_a_whole_deployment_on_each_plane(repository: Path, plane: str, tmp_path: Path) -> None:
    """The script starts its own Redis, and its own nats-server if none answers."""
    if plane == "nats" and find_nats_server() is None:
        pytest.skip("no nats-server on this machine; on Debian and Ubuntu: apt-get install nats-server")
    ran = subprocess.run(
        ["sh", str(repository / "examples" / "agg_request_planes.sh"), f"--{plane}"],
        env=_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    heading, answer = ran.stdout.splitlines()
    assert heading == f"A chat over the {plane} plane:"
    assert json.loads(answer)["choices"][0]["message"]["content"]


def _environment(directory: Path) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nats_port = free.getsockname()[1]
    return {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "NATS_"))} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_RUNTIME_DIR": str(directory),
        "NATS_SERVER": f"nats://127.0.0.1:{nats_port}",
        "DYN_HTTP_RPC_PORT": "0",
    }


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine: apt-get install curl")
def test_the_script_of_planes_stops_while_it_starts(repository: Path, tmp_path: Path) -> None:
    """Also before `up` has handlers of its own for signals: nothing is left then, and nothing waits."""
    script = subprocess.Popen(
        ["sh", str(repository / "examples" / "agg_request_planes.sh"), "--redis"],
        env=_environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deployment: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 60
        while not deployment and time.monotonic() < deadline:
            for child in psutil.Process(script.pid).children():
                with contextlib.suppress(psutil.Error):
                    if "up" in child.cmdline():
                        deployment.append(child)
        assert deployment
        script.terminate()
        assert script.wait(45) == 128 + signal.SIGTERM
        assert not deployment[0].is_running()
    finally:
        for process in deployment:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        script.kill()


def test_the_script_of_planes_explains_itself(repository: Path) -> None:
    ran = subprocess.run(
        ["sh", str(repository / "examples" / "agg_request_planes.sh"), "--pigeon"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "--tcp | --http | --nats | --redis" in ran.stderr
