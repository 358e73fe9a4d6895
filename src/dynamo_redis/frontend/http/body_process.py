"""The process that parses large bodies.

Run as `python -m dynamo_redis.frontend.http.body_process <bytes of memory>`.
"""

from __future__ import annotations

import sys
from typing import Final

from dynamo_redis.frontend.http.bodies import pack
from dynamo_redis.jobs.serving import serve

READ_LIMIT_S: Final = 10.0
"""Most processor time for one body."""

if __name__ == "__main__":
    serve(pack, memory_bytes=int(sys.argv[1]), time_s=READ_LIMIT_S)
