"""Runs `dynamo-redis` with these arguments, and gets SIGTERM as soon as it has started a child process."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from dynamo_redis.child import ChildProcess
from dynamo_redis.cli.app import run

start = ChildProcess.start


def start_and_signal(*args: Any, **options: Any) -> ChildProcess:
    child = start(*args, **options)
    os.kill(os.getpid(), signal.SIGTERM)
    return child


ChildProcess.start = start_and_signal  # type: ignore[method-assign]
sys.exit(run(sys.argv[1:]))
