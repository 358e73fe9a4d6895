"""Starts a program twice as `stubborn`, prints the process ids and waits: `family_parent.py PROGRAM`."""

from __future__ import annotations

import sys
import time

from dynamo_redis.child import ChildProcess

children = [ChildProcess.start([sys.executable, sys.argv[1], "stubborn"]) for _ in range(2)]
print(*[child.pid for child in children], flush=True)
time.sleep(100)
