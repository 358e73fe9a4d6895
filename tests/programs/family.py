"""Starts another program, prints "ready" and waits. With the argument `stubborn` it ignores SIGTERM."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "100"])
print("ready", flush=True)
time.sleep(100)
