"""The start of a service."""

from __future__ import annotations

import subprocess
import sys

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
