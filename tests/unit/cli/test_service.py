"""The start of a service."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
from dynamo_redis.cli.service import raise_file_limit
raise_file_limit()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard", "raised"), [(100, 200, 200), (200, 200, 200), (100, 512, 512)])
def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(soft: int, hard: int, raised: int) -> None:
    argv = [sys.executable, "-c", PROGRAM, str(soft), str(hard)]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(raised), str(hard)]


@pytest.mark.parametrize("command", ["frontend", "up"])
def test_two_planes_end_a_client_at_once(command: str, tmp_path: Path) -> None:
    """No Redis answers here, so an error of Redis would come first."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DYN_")}
    environment |= {"DYN_REQUEST_PLANE": "nats,tcp", "DYN_REDIS_URL": f"unix://{tmp_path}/no-redis.sock"}
    ended = subprocess.run(
        [sys.executable, "-m", "dynamo_redis", command],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "Invalid request plane mode: 'nats,tcp'" in ended.stderr
