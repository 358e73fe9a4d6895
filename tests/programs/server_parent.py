"""Starts an embedded server, prints its process id and waits: `server_parent.py DIRECTORY`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import anyio

from dynamo_redis.store.server import EmbeddedServer

server = EmbeddedServer(Path(sys.argv[1]))
anyio.run(server.start)
print(server.pid, flush=True)
time.sleep(60)
