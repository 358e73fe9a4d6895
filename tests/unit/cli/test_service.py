"""The start of a service."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from dynamo_redis.cli.service import raise_file_limit
raise_file_limit()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard", "raised"), [(100, 200, 200), (200, 200, 200), (100, 512, 512)])
def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(soft: int, hard: int, raised: int) -> None:
    program = PROGRAM.format(soft=soft, hard=hard)
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(raised), str(hard)]
