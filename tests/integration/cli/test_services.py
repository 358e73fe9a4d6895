"""`ping`, `stats`, `call`, `bench` and `token`, by hand against real instances."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import anyio
import pytest

from dynamo_redis.errors import InvalidRequest
from dynamo_redis.names import format_instance_id
from dynamo_redis.runtime import DistributedRuntime
from dynamo_redis.testing import RuntimeFactory
from tests.nats_server import NatsServer, find_nats_server

ENDPOINT = "my.hello.generate"

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cli(dynamo_redis_url: str, dynamo_redis_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("DYN_REDIS_URL", dynamo_redis_url)
    monkeypatch.setenv("DYN_REDIS_PREFIX", dynamo_redis_prefix)
    monkeypatch.setenv("DYN_HTTP_RPC_PORT", "0")

    def run(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dynamo_redis", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            input=given,
            check=False,
        )

    return run


async def greet(request: dict[str, str]) -> AsyncIterator[str]:
    if "name" not in request:
        raise InvalidRequest("whom?")
    yield "Hello,"
    yield request["name"]


async def greeting(make: RuntimeFactory, plane: str) -> DistributedRuntime:
    worker = await make(request_plane=plane)
    await worker.endpoint(ENDPOINT).start_serving(greet, stats_handler=lambda: {"greeted": True})
    return worker


async def run(cli: Cli, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    return await anyio.to_thread.run_sync(lambda: cli(*arguments, given=given))


@pytest.fixture
def nats_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if find_nats_server() is None:
        pytest.skip("no nats-server on this machine; on Debian and Ubuntu: apt-get install nats-server")
    with NatsServer(tmp_path) as server:
        monkeypatch.setenv("NATS_SERVER", server.url)
        yield


async def test_all_planes_are_asked_at_once(
    cli: Cli, nats_server: None, dynamo_runtime_factory: RuntimeFactory
) -> None:
    planes = ("tcp", "http", "nats", "redis")
    workers = {plane: await greeting(dynamo_runtime_factory, plane) for plane in planes}
    ids = {plane: format_instance_id(worker.instance_id) for plane, worker in workers.items()}
    for plane in planes:
        called = await run(
            cli, "call", ENDPOINT, '{"name": "Ada"}', "--instance", ids[plane], "--plane", plane
        )
        assert (called.returncode, called.stdout) == (0, '"Hello,"\n"Ada"\n'), called.stderr
        assert f"2 items from {ids[plane]} in " in called.stderr
    pinged = await run(cli, "ping")
    assert pinged.returncode == 0, pinged.stderr
    for plane in planes:
        assert re.search(rf"{ids[plane]} +{plane} +[\d.]+ ms +\d", pinged.stdout)
    shown = await run(cli, "stats", ENDPOINT)
    assert len(re.findall(rf"{ENDPOINT} +1 +0 +0 +[\d.]+ ms", shown.stdout)) == 4
    answers = json.loads((await run(cli, "stats", "--json")).stdout)
    assert {answer["id"] for answer in answers} == set(ids.values())
    assert all(answer["endpoints"][0]["data"] == {"greeted": True} for answer in answers)


async def test_an_instance_that_is_silent_fails_the_command(
    cli: Cli, dynamo_runtime_factory: RuntimeFactory
) -> None:
    worker = await greeting(dynamo_runtime_factory, "tcp")
    assert worker._server is not None
    await worker._server.aclose()
    shown = await run(cli, "ping", "--timeout", "1")
    assert shown.returncode == 1
    assert "1 of 1 instances gave no answer" in shown.stderr


async def test_call_shows_errors_and_takes_the_standard_input(
    cli: Cli, dynamo_runtime_factory: RuntimeFactory
) -> None:
    await greeting(dynamo_runtime_factory, "tcp")
    assert (await run(cli, "call", ENDPOINT, "-", given='{"name": "Bob"}')).stdout == '"Hello,"\n"Bob"\n'
    refused = await run(cli, "call", ENDPOINT, "{}")
    assert refused.returncode == 1
    assert "whom?" in refused.stderr
    malformed = await run(cli, "call", ENDPOINT, "{")
    assert malformed.returncode == 2
    assert "the request is not JSON" in malformed.stderr
    unknown = await run(cli, "call", ENDPOINT, "{}", "--plane", "pigeon")
    assert "Invalid request plane mode: 'pigeon'. Valid options are: tcp, http, nats, redis" in unknown.stderr


async def test_bench_prints_rates_and_percentiles(cli: Cli, dynamo_runtime_factory: RuntimeFactory) -> None:
    await greeting(dynamo_runtime_factory, "tcp")
    shown = await run(cli, "bench", ENDPOINT, '{"name": "Ada"}', "-c", "4", "-d", "0.5")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"[\d,]+ requests/s, [\d,]+ items/s", shown.stdout)
    assert re.search(r"whole answer +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+", shown.stdout)
    failing = await run(cli, "bench", ENDPOINT, "{}", "-d", "0.3")
    assert failing.returncode == 1
    assert "invalid_request" in failing.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("token", "10151d906d3c1719", "--lifetime", "inf"),
        ("token", "10151d906d3c1719", "--lifetime", "nan"),
        ("ping", "--timeout", "nan"),
        ("call", ENDPOINT, "--timeout", "-1"),
        ("bench", ENDPOINT, "--duration", "nan"),
        ("call", ENDPOINT, r'"\ud800"'),
        ("call", ENDPOINT, str(1 << 64)),
    ],
)
async def test_unusable_argument_is_a_usage_error(cli: Cli, arguments: tuple[str, ...]) -> None:
    refused = await run(cli, *arguments)
    assert refused.returncode == 2
    assert "unexpected" not in refused.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine: apt-get install curl")
async def test_curl_with_a_token(cli: Cli, dynamo_runtime_factory: RuntimeFactory) -> None:
    worker = await greeting(dynamo_runtime_factory, "http")
    assert worker._server is not None
    url = f"http://{worker._server.address}/v1/rpc/my/hello/generate"
    token = (await run(cli, "token", format_instance_id(worker.instance_id))).stdout.strip()

    async def curl(*arguments: str) -> tuple[int, str]:
        answer = await anyio.to_thread.run_sync(
            lambda: subprocess.run(
                ["curl", "--silent", "--write-out", "\n%{http_code}", *arguments],
                capture_output=True,
                text=True,
                timeout=30,
                check=True,
            )
        )
        body, _, status = answer.stdout.rpartition("\n")
        return int(status), body

    bearer = ("--header", f"Authorization: Bearer {token}")
    for version in ("--http2-prior-knowledge", "--http1.1"):
        status, body = await curl(version, *bearer, url, "--data", '{"name": "Ada"}')
        assert (status, body) == (200, '"Hello,"\n"Ada"\n')
        status, body = await curl(version, url, "--data", '{"name": "Ada"}')
        assert (status, json.loads(body)["code"]) == (401, "authentication_failed")
        status, body = await curl(version, *bearer, url, "--data", "{}")
        assert (status, json.loads(body)["detail"]) == (400, "whom?")
        status, body = await curl(version, *bearer, url, "--data", "{")
        assert (status, json.loads(body)["code"]) == (400, "invalid_request")
        status, body = await curl(version, *bearer, f"{url}x", "--data", "{}")
        assert (status, json.loads(body)["code"]) == (404, "endpoint_not_found")
        status, _ = await curl(version, *bearer, url)
        assert status == 405
        status, _ = await curl(version, *bearer, "--header", "Content-Type: text/html", url, "--data", "{}")
        assert status == 415
        status, _ = await curl(version, *bearer, "--header", "Origin: http://evil", url, "--data", "{}")
        assert status == 403
        status, _ = await curl(version, f"http://{worker._server.address}/v1/rpc/-/live")
        assert status == 204


async def test_watched_stats_are_a_line_of_json_a_round(
    cli: Cli, dynamo_runtime_factory: RuntimeFactory
) -> None:
    worker = await greeting(dynamo_runtime_factory, "tcp")
    argv = [sys.executable, "-m", "dynamo_redis", "stats", "--watch", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as watching:
        try:
            assert watching.stdout is not None
            (row,) = json.loads(await anyio.to_thread.run_sync(watching.stdout.readline))
            assert row["id"] == format_instance_id(worker.instance_id)
        finally:
            watching.terminate()


async def test_a_wrong_plane_is_said_at_once(cli: Cli, dynamo_runtime_factory: RuntimeFactory) -> None:
    await greeting(dynamo_runtime_factory, "tcp")
    for command in ("call", "bench"):
        said = await run(cli, command, ENDPOINT, "{}", "--plane", "redis")
        assert said.returncode == 1
        assert said.stdout == ""
        assert "serves tcp, this client speaks redis" in said.stderr
        assert "--plane" in said.stderr


async def test_another_plane_of_an_instance_is_asked(
    cli: Cli, nats_server: None, dynamo_runtime_factory: RuntimeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await greeting(dynamo_runtime_factory, "nats,tcp")
    shown = format_instance_id(worker.instance_id)
    assert re.search(rf"{shown} +nats +[\d.]+ ms", (await run(cli, "ping")).stdout)
    monkeypatch.setenv("NATS_SERVER", "nats://127.0.0.1:1")
    pinged = await run(cli, "ping")
    assert pinged.returncode == 0, pinged.stderr
    assert re.search(rf"{shown} +tcp +[\d.]+ ms", pinged.stdout)


async def test_an_endpoint_without_instances_fails_the_command(cli: Cli) -> None:
    for command in ("ping", "stats"):
        said = await run(cli, command, "foo.bar.baz")
        assert said.returncode == 1
        assert "no instance of foo.bar.baz" in said.stderr


async def test_bench_says_why_requests_failed(cli: Cli, dynamo_runtime_factory: RuntimeFactory) -> None:
    await greeting(dynamo_runtime_factory, "tcp")
    said = await run(cli, "bench", ENDPOINT, "{}", "-d", "0.2", "-c", "1")
    assert said.returncode == 1
    assert re.search(r"\d+ × invalid_request \(whom\?\)", said.stderr)


async def test_token_takes_both_forms_of_an_id(cli: Cli, dynamo_runtime_factory: RuntimeFactory) -> None:
    worker = await greeting(dynamo_runtime_factory, "http")
    for instance in (format_instance_id(worker.instance_id), str(worker.instance_id)):
        assert (await run(cli, "token", instance)).returncode == 0
