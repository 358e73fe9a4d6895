"""A client that waits for an instance logs that, and ends at the first Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynamo_redis.errors import NoInstances
from tests.integration.conftest import OpenRuntime
from tests.processes import PROGRAMS

WAIT_S = 60.0
CLIENT = PROGRAMS / "waiting_client.py"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("redis", ["there", "away"])
def test_first_signal_ends_a_waiting_client(
    redis: str, number: signal.Signals, dynamo_redis_url: str, dynamo_redis_prefix: str, tmp_path: Path
) -> None:
    url = dynamo_redis_url if redis == "there" else f"unix://{tmp_path}/no.sock"
    environment = {
        **os.environ,
        "DYN_REDIS_URL": url,
        "DYN_REDIS_PREFIX": dynamo_redis_prefix,
        "DYN_WAIT_FOR_REDIS": "true",
        "DYN_GRACEFUL_SHUTDOWN_S": "600",
    }
    written = tmp_path / "log"
    with written.open("wb") as log:
        client = subprocess.Popen([sys.executable, CLIENT, "a.b.c"], env=environment, stderr=log)
    try:
        said = (
            r"no instance of a\.b\.c is known: is a worker running\? \(waiting since"
            if redis == "there"
            else "waiting for it"
        )
        deadline = time.monotonic() + WAIT_S
        while not re.search(said, written.read_text()):
            assert client.poll() is None, written.read_text()
            assert time.monotonic() < deadline, written.read_text()
            time.sleep(0.05)
        client.send_signal(number)
        assert client.wait(WAIT_S) == 1
        assert "Traceback" not in written.read_text()
    finally:
        client.kill()
        client.wait()


async def test_wait_ends_with_the_runtime(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime()
    client = await runtime.endpoint("a.b.c").client()
    waiting = client.wait_for_instances()
    runtime.shutdown()
    with pytest.raises(NoInstances, match="before the shutdown"):
        await waiting
    late = await runtime.endpoint("a.b.d").client()
    with pytest.raises(NoInstances, match="before the shutdown"):
        await late.wait_for_instances()
