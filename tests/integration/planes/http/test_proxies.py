"""The http plane through nginx and HAProxy, which users have between callers and workers."""

from __future__ import annotations

import asyncio
import getpass
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import AuthenticationFailed, InvalidRequest, PlaneError
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.select import make_client, make_server
from tests.tcp_plane import INSTANCE, SECRET, echo, eventually

_NGINX = """
daemon off;
user {user};
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory};
    proxy_temp_path {directory};
    fastcgi_temp_path {directory};
    uwsgi_temp_path {directory};
    scgi_temp_path {directory};
    client_max_body_size 64m;
    server {{
        listen 127.0.0.1:{port} http2;
        location / {{
            proxy_pass http://{worker};
            proxy_http_version 1.1;
            proxy_buffering off;
        }}
    }}
}}
"""
_HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend callers
    bind 127.0.0.1:{port} proto h2
    default_backend workers
backend workers
    server worker {worker} proto h2
"""


def _binary(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


@contextmanager
def proxy(kind: str, worker: str, directory: Path) -> Iterator[str]:
    """Run a proxy in front of a worker; yield its address."""
    binary = _binary(kind)
    if binary is None:
        pytest.skip(f"no {kind} on this machine; on Debian and Ubuntu: apt-get install {kind}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = directory / f"{kind}.conf"
    text = _NGINX if kind == "nginx" else _HAPROXY
    config.write_text(text.format(directory=directory, port=port, worker=worker, user=getpass.getuser()))
    arguments = ["-p", str(directory), "-c", str(config)] if kind == "nginx" else ["-f", str(config)]
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen([binary, *arguments], stdout=output, stderr=output)
    try:
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, (directory / "output").read_text()
                time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("kind", ["nginx", "haproxy"])
async def test_requests_pass_a_proxy(kind: str, tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def count(request: int, context: Context) -> AsyncIterator[int]:
        if request < 0:
            raise InvalidRequest("count upwards")
        for number in range(request):
            yield number
        try:
            if request == 5:
                await context.async_killed_or_stopped()
        finally:
            ended.set()

    settings = PlaneSettings.load(request_plane="http", http_rpc_port=0)
    server = make_server(settings, secret=SECRET, instance_id=INSTANCE)
    await server.start()
    server.register("echo", echo)
    server.register("count", count)
    client = make_client(settings)

    async def ask(subject: str, request: Any) -> list[Any]:
        to = Target(INSTANCE, address, subject, SECRET)
        return [item async for item in client.open(to, request, Context())]

    try:
        with proxy(kind, server.address, tmp_path) as address:
            await client.probe(Target(INSTANCE, address, "", SECRET), 20.0)
            assert await ask("echo", {"text": "héllo"}) == [{"text": "héllo"}]
            assert await ask("echo", bytes(3 << 20)) == [bytes(3 << 20)]
            assert await ask("count", 1000) == list(range(1000))
            with pytest.raises(InvalidRequest, match="count upwards"):
                await ask("count", -1)
            answers = await asyncio.gather(*(ask("count", 50) for _ in range(64)))
            assert answers == [list(range(50))] * 64
            # A stream flows while it is made, and its end at the caller reaches the worker.
            ended.clear()
            stream = client.open(Target(INSTANCE, address, "count", SECRET), 5, Context())
            assert [await anext(stream) for _ in range(5)] == list(range(5))
            await stream.aclose()
            await asyncio.wait_for(ended.wait(), 30)
            await eventually(lambda: not server.in_flight_count)
            stranger = client.open(Target(INSTANCE, address, "echo", b"another secret"), 1, Context())
            with pytest.raises(AuthenticationFailed):
                await anext(stranger)
        with pytest.raises(PlaneError) as caught:  # the proxy is gone
            await ask("echo", 1)
        assert caught.value.retryable
    finally:
        await client.aclose()
        await server.aclose()
