"""A mock worker that writes the id of each request that reaches it, also of those that it refuses.

Run as `noting_worker.py FILE ARGUMENT...`, with the arguments of `dynamo-redis worker mock`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from dynamo_redis.cli.app import run
from dynamo_redis.planes.frames.server_connection import ServerConnection
from dynamo_redis.planes.frames.server_request import context_of

notes = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
admit = ServerConnection._on_open


def note(self: ServerConnection, received: list[Any]) -> None:
    headers = received[4]
    if type(headers) is dict:
        os.write(notes, f"{context_of(headers).id()}\n".encode())
    admit(self, received)


ServerConnection._on_open = note  # type: ignore[method-assign]
sys.exit(run(["worker", "mock", *sys.argv[2:]]))
