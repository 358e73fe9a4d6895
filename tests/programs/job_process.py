"""Answers the jobs of a lane: echoes, waits, and breaks its limits, as the first word of a job says."""

from __future__ import annotations

import os
import time

from dynamo_redis.jobs.serving import serve


def answer(job: bytearray) -> bytes:
    match bytes(job).partition(b" "):
        case b"spin", _, _:
            while True:
                pass
        case b"sleep", _, _:
            time.sleep(600)
        case b"hoard", _, _:
            return bytes(1 << 30)
        case b"die", _, _:
            os._exit(3)
        case b"pid", _, _:
            return str(os.getpid()).encode()
        case b"echo", _, rest:
            return rest
        case b"environment", _, _:
            return repr(sorted(os.environ)).encode()
        case b"wait", _, path:
            while not os.path.exists(path):  # noqa: PTH110 - pathlib is not imported, as in `serving`
                time.sleep(0.005)
            return b"waited"
    return b"first"


serve(answer, memory_bytes=64 << 20, time_s=1)
