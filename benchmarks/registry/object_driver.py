"""The object store: the cost of checks (R10), and the effect of a large transfer on other clients (R11).

The suite `registry` runs both with the other rows; `python -m benchmarks.registry.object_driver` runs them
alone and prints more.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop

from dynamo_redis.store.objects.redis_objects import RedisObjectStore
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer

MEBIBYTE = 1 << 20
MODEL_FILE_BYTES = 11 * MEBIBYTE
LARGE_COUNT = 1024
PING_PAUSE_S = 0.001
PREFIX = "bench-objects"
TIMEOUT_S = 30.0


async def r10(url: str, rounds: int) -> tuple[list[float], list[float]]:
    """Put and read an object of 11 MiB, and SET and GET the same bytes. Returns the ms of each round of both,
    in turn.

    Both use one client's connections, with content that the server has never seen.
    """
    client = RedisClient(url, timeout_s=TIMEOUT_S)
    store = RedisObjectStore(client, PREFIX)
    ours: list[float] = []
    plain: list[float] = []
    for number in range(-1, rounds):  # the first is a warm-up of connections and threads
        content = os.urandom(MODEL_FILE_BYTES)
        began = time.perf_counter()
        await client.execute("SET", f"{PREFIX}:plain", content)
        back = await client.execute("GET", f"{PREFIX}:plain")
        between = time.perf_counter()
        await client.execute("DEL", f"{PREFIX}:plain")
        _check(back == content)
        resumed = time.perf_counter()
        await store.put("bench", "object", content)
        back = await store.read("bench", "object")
        ended = time.perf_counter()
        _check(back == content)
        await _erase(client)
        if number >= 0:
            ours.append(1e3 * (ended - resumed))
            plain.append(1e3 * (between - began))
    await store.aclose()
    return ours, plain


async def r11(url: str, rounds: int) -> tuple[list[float], list[float]]:
    """Return the worst PING of another process, in ms, while 1 GiB is put and read, and in as much time
    without load."""
    client = RedisClient(url, timeout_s=TIMEOUT_S)
    store = RedisObjectStore(client, PREFIX)
    busy: list[float] = []
    idle: list[float] = []
    with pinger(url) as pipe:
        await _transfer(store, 64)  # warm-up
        await _erase(client)
        for number in range(rounds):
            before_bytes = _peak_bytes()
            began = time.perf_counter()
            pipe.send(None)
            put_s, get_s = await _transfer(store, LARGE_COUNT)
            busy.append(await _worst_ms(pipe))
            took_s = time.perf_counter() - began
            longest_ms = await _longest_command_ms(client)
            await _erase(client)
            pipe.send(None)
            await asyncio.sleep(took_s)
            idle.append(await _worst_ms(pipe))
            print(
                f"R11 round {number + 1}: worst PING {busy[-1]:.2f} ms, idle {idle[-1]:.2f} ms;"
                f" put {put_s:.1f} s, get {get_s:.1f} s, memory +{(_peak_bytes() - before_bytes) >> 20} MiB,"
                f" longest command {longest_ms:.1f} ms",
                flush=True,
            )
    await store.aclose()
    return busy, idle


# --------------------------------------------------------------------------- the large object


async def _transfer(store: RedisObjectStore, mebibytes: int) -> tuple[float, float]:
    """Put an object piece by piece, and read it. Returns the seconds of each. No process ever holds the whole
    object."""
    began = time.perf_counter()
    info = await store.put("bench", "large", _pieces(mebibytes))
    between = time.perf_counter()
    size_bytes = 0
    async for piece in store.get("bench", "large"):
        size_bytes += len(piece)
    _check(size_bytes == info.size_bytes == mebibytes * MEBIBYTE)
    return between - began, time.perf_counter() - between


async def _pieces(mebibytes: int) -> AsyncIterator[bytes]:
    rest = os.urandom(MEBIBYTE - 8)
    for number in range(mebibytes):
        yield number.to_bytes(8, "big") + rest


async def _erase(client: RedisClient) -> None:
    """Delete the stored object at once instead of at its expiry, and in several steps."""
    async for key in client.scan(f"{{{PREFIX}/*"):
        await client.execute("UNLINK", key)


async def _longest_command_ms(client: RedisClient) -> float:
    """Return the longest command in ms of those in the server's slow log (10 ms and more by default) since
    the last call."""
    entries = await client.execute("SLOWLOG", "GET", -1)
    await client.execute("SLOWLOG", "RESET")
    return max((float(entry[2]) / 1e3 for entry in entries), default=0.0)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _check(right: bool) -> None:
    if not right:
        raise RuntimeError("the object read differs from the one written")


# --------------------------------------------------------------------------- the other client


@contextlib.contextmanager
def pinger(url: str) -> Iterator[Connection]:
    """Run a process that sends PINGs from one message on its pipe to the next, and answers with the worst, in
    ms."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_ping, args=(url, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        _check(ours.recv() == "ready")
        yield ours
    finally:
        ours.close()  # ends the process
        process.join()


async def _worst_ms(pipe: Connection) -> float:
    pipe.send(None)
    worst_ms: float = await asyncio.to_thread(pipe.recv)
    return worst_ms


def _ping(url: str, pipe: Connection) -> None:
    host, _, port = url.rpartition("/")[2].rpartition(":")
    with socket.create_connection((host, int(port))) as connection, contextlib.suppress(EOFError, OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pipe.send("ready")
        while True:
            pipe.recv()
            worst_s = 0.0
            while not pipe.poll():
                began = time.perf_counter()
                connection.sendall(b"PING\r\n")
                connection.recv(64)
                worst_s = max(worst_s, time.perf_counter() - began)
                time.sleep(PING_PAUSE_S)
            pipe.recv()
            pipe.send(1e3 * worst_s)


# --------------------------------------------------------------------------- alone


async def _alone(rows: str, rounds: int, appendonly: str) -> None:
    settings = {"appendonly": appendonly, "slowlog-log-slower-than": "500"}
    with tempfile.TemporaryDirectory() as directory:
        async with EmbeddedServer(Path(directory), port=0, settings=settings) as server:
            for name, measure in (("R10", r10), ("R11", r11)):
                if name in rows.upper().split(","):
                    ours, others = await measure(server.url, rounds)
                    ratio = statistics.median(one / other for one, other in zip(ours, others, strict=True))
                    print(
                        f"{name}: {statistics.median(ours):.2f} ms ÷ {statistics.median(others):.2f} ms,"
                        f" median of {rounds} ratios {ratio:.2f} (appendonly {appendonly})"
                    )


def main() -> None:
    """Run both rows, or one, on a server of their own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.registry.object_driver", description=__doc__)
    parser.add_argument("--rows", default="R10,R11")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--appendonly", choices=["yes", "no"], default="yes")
    arguments = parser.parse_args()
    uvloop.run(_alone(arguments.rows, arguments.rounds, arguments.appendonly))


if __name__ == "__main__":
    main()
