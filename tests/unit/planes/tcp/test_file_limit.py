"""The description of the limit of open files names the way to raise it."""

from __future__ import annotations

import subprocess
import sys

import pytest

SOURCE = """
import resource, sys
from dynamo_redis.planes.tcp.listener import describe_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
print(describe_file_limit())
"""


@pytest.mark.parametrize(
    ("soft", "hard", "said"),
    [
        (100, 200, "RLIMIT_NOFILE is 100; `ulimit -n` raises it, up to 200"),
        (200, 200, "RLIMIT_NOFILE is 200, the most that this process may have: raise it where the"),
    ],
)
def test_file_limit_is_described_with_its_remedy(soft: int, hard: int, said: str) -> None:
    argv = [sys.executable, "-c", SOURCE, str(soft), str(hard)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(said)
