"""Runs `dynamo-redis` with these arguments, as if the packages of its extras were not installed."""

from __future__ import annotations

import sys
from typing import Any

EXTRAS = {
    "aiohttp", "google", "grpc", "httptools", "jinja2", "opentelemetry", "starlette", "tokenizers", "uvicorn",
    "zmq",
}  # fmt: skip


class Absent:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())

from dynamo_redis.cli.app import run  # noqa: E402

raise SystemExit(run())
